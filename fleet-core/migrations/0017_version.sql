-- Versions of firmware are compared as `fleet_core::version` compares them: text that is ordered, byte by byte, as versions are, or
-- null for what is no version. A property test holds both to the same. Numbers are padded and joined by '.', behind them '-' for a
-- release or '!' and the identifiers of a pre-release, numbers marked 0 and all else 1.
create function version_rank(version text) returns text language plpgsql immutable strict parallel safe as $$
declare
    core text := split_part(regexp_replace(version, '^[vV]', ''), '+', 1);
    cut  int  := position('-' in core);
    pre  text := case when cut > 0 then substr(core, cut + 1) end;
    rank text := '';
    part text;
begin
    core := case when cut > 0 then left(core, cut - 1) else core end;
    if octet_length(version) > 128 or core !~ '^[0-9]{1,10}(\.[0-9]{1,10})*$'
       or pre !~ '^[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*$'
    then
        return null;
    end if;
    foreach part in array string_to_array(regexp_replace(core, '(\.0+)+$', ''), '.') loop
        rank := rank || case when rank = '' then '' else '.' end || lpad(part, 10, '0');
    end loop;
    if pre is null then
        return rank || '-';
    end if;
    rank := rank || '!';
    foreach part in array string_to_array(pre, '.') loop
        rank := rank || case when right(rank, 1) = '!' then '' else ' ' end
                     || case when part ~ '^[0-9]{1,10}$' then '0' || lpad(part, 10, '0') else '1' || part end;
    end loop;
    return rank;
end
$$;
