-- The second line between tenants (ADR 8). The first is the predicate in each statement; this one catches what forgets it:
-- a request runs as `muster_tenant`, bound to one tenant and to the caller's scope in it, and sees and changes nothing else.
-- Whoever owns the tables (writers, brokers, logins, migrations) is not subject to it.
--
-- Policies of tables made by earlier migrations stand here. A later table brings its own, or takes its privileges away
-- from `muster_tenant`; a test finds one that does neither.

-- Roles belong to the whole cluster, in which other databases may be migrated at the same time.
do $$
begin
    if not exists (select from pg_roles where rolname = 'muster_tenant') then
        begin
            create role muster_tenant nologin noinherit;
        exception
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                raise 'the role muster_tenant is missing and % may not create it: as a superuser, '
                      'create role muster_tenant nologin; grant muster_tenant to %', current_user, current_user;
        end;
    end if;
    if not pg_has_role(current_user, 'muster_tenant', 'member') then
        begin
            execute format('grant muster_tenant to %I', current_user);
        exception
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                raise '% may not become muster_tenant: as a superuser, grant muster_tenant to %', current_user, current_user;
        end;
    end if;
end
$$;

-- Whose request it is: null, and thus nothing to see, unless it was said.
create function current_tenant() returns bigint language sql stable parallel safe
    return nullif(current_setting('muster.tenant', true), '')::bigint;
-- Which of the tenant's devices it may reach: null for all of them.
create function current_scope() returns jsonb language sql stable parallel safe
    return nullif(current_setting('muster.scope', true), '')::jsonb;
-- The devices whose readings it has asked for: a check of each of many rows would cost more than reading it.
create function opened_devices() returns bigint[] language sql stable parallel safe
    return nullif(current_setting('muster.devices', true), '')::bigint[];
-- Whether it stands above tenants.
create function above_tenants() returns boolean language sql stable parallel safe
    return coalesce(current_setting('muster.platform', true), '') = 'on';

-- Whether a device is within a scope, a list of conjunctions of which one must hold:
-- [{"group": "site/line-3", "type": "freezer", "labels": {"site": "oslo"}, "not": [{"labels": {"kind": "spare"}}]}], each part
-- of which may be left out; none of those in "not" may hold.
-- In plpgsql, which takes 2 µs a device; as a query it takes 10.
create function in_scope(scope jsonb, group_path text, type text, labels jsonb) returns boolean
    language plpgsql immutable parallel safe as $$
declare
    one jsonb;
begin
    for n in 0 .. jsonb_array_length(scope) - 1 loop
        one := scope -> n;
        if (not one ? 'group'
            or coalesce(group_path = one ->> 'group' or starts_with(group_path, (one ->> 'group') || '/'), false))
           and (not one ? 'type' or coalesce(type = one ->> 'type', false))
           and (not one ? 'labels' or labels @> (one -> 'labels'))
           and (not one ? 'not' or not in_scope(one -> 'not', group_path, type, labels))
        then
            return true;
        end if;
    end loop;
    return false;
end
$$;

-- Each `(select …)` is computed once a statement, not once a row.

alter table tenant enable row level security;
create policy tenant on tenant
    using (key = (select current_tenant()) or (select above_tenants()));

alter table app_user enable row level security;
-- Who stands above tenants sees who else does.
create policy tenant on app_user
    using (tenant_key = (select current_tenant()) or platform and (select above_tenants()))
    with check (tenant_key = (select current_tenant()));

alter table api_key enable row level security;
create policy tenant on api_key
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));

alter table binding enable row level security;
create policy tenant on binding using (tenant_key = (select current_tenant()));

alter table role enable row level security;
-- Roles of the platform are given to users of tenants, so they can be read there. Their names must differ from those of
-- all tenants, which only who stands above them can see.
create policy tenant on role for select
    using (tenant_key = (select current_tenant()) or tenant_key is null or (select above_tenants()));
create policy tenant_insert on role for insert
    with check (tenant_key = (select current_tenant()) or tenant_key is null and (select above_tenants()));
create policy tenant_update on role for update
    using (tenant_key = (select current_tenant()) or tenant_key is null and (select above_tenants()));
create policy tenant_delete on role for delete
    using (tenant_key = (select current_tenant()) or tenant_key is null and (select above_tenants()));

alter table device enable row level security;
create policy tenant on device
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or in_scope((select current_scope()), group_path, type, labels)));

-- What hangs on a device is seen by whoever sees the device.
alter table credential enable row level security;
create policy tenant on credential using (exists (select from device d where d.key = device_key));
alter table device_status enable row level security;
create policy tenant on device_status using (exists (select from device d where d.key = device_key));
alter table device_latest enable row level security;
create policy tenant on device_latest using (exists (select from device d where d.key = device_key));
alter table telemetry enable row level security;
-- `device::open` looks for the device, as far as the request may see it, and says so here.
create policy tenant on telemetry using (device_key = any ((select opened_devices())::bigint[]));

alter table shape enable row level security;
create policy tenant on shape using (tenant_key = (select current_tenant()));
alter table idempotency enable row level security;
create policy tenant on idempotency using (tenant_key = (select current_tenant()));

-- What belongs to no device, or to one that is gone, is for those who may reach all of them.
alter table dead_letter enable row level security;
create policy tenant on dead_letter
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or exists (select from device d where d.id = device_id)));
alter table connection_event enable row level security;
create policy tenant on connection_event
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or exists (select from device d where d.key = device_key)));
alter table session enable row level security;
create policy tenant on session
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or exists (select from device d where d.key = device_key)));
alter table session_subscription enable row level security;
create policy tenant on session_subscription using (exists (select from session s where s.id = session_id));

-- What waits for clients is read by brokers only; how much, by whoever sees the session.
create function session_queue(sessions uuid[]) returns table (session_id uuid, messages bigint, bytes bigint)
    language sql stable security definer
    begin atomic
        select m.session_id, count(*), sum(m.bytes)
          from session_message m
          join session s on s.id = m.session_id
         where s.id = any (sessions) and (current_tenant() is null or s.tenant_key = current_tenant())
         group by m.session_id;
    end;

-- What a request may do at all. Partitions are reached through their table, so that its policy holds.
do $$
declare
    name text;
begin
    for name in
        select relname from pg_class
         where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p') and not relispartition
           and relname <> '_sqlx_migrations'
    loop
        execute format('grant select, insert, update, delete on table %I to muster_tenant', name);
    end loop;
    execute format('grant usage on schema %I to muster_tenant', current_schema());
    execute format('alter default privileges in schema %I grant select, insert, update, delete on tables to muster_tenant',
                   current_schema());
    execute format('alter default privileges in schema %I grant usage on sequences to muster_tenant', current_schema());
end
$$;
revoke all on signing_key, session_message, session_received, retained_message from muster_tenant;
revoke all on broker_node, control_request, control_answer from muster_tenant;
revoke insert, delete on policy_epoch from muster_tenant;
revoke delete on tenant from muster_tenant;
