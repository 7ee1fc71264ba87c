-- When a version of firmware was first told by a device of the tenant: what is new since then is asked of the patterns of log lines.
create table firmware_seen (
    tenant_key bigint      not null constraint firmware_seen_tenant_key_fkey references tenant (key) on delete cascade,
    version    text        not null,        -- as the device said it
    first_at   timestamptz not null,
    constraint firmware_seen_pkey primary key (tenant_key, version)
);
-- What is known already when this begins.
insert into firmware_seen (tenant_key, version, first_at)
     select d.tenant_key, s.firmware, min(s.last_seen_at)
       from device_status s
       join device d on d.key = s.device_key
      where s.firmware is not null
   group by d.tenant_key, s.firmware;
alter table firmware_seen enable row level security;
create policy tenant on firmware_seen using (tenant_key = (select current_tenant()));
