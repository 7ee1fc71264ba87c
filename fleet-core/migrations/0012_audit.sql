-- Who changed what: one chain of rows for each tenant, each sealed with the hash of the one before (ADR 13).

create table audit (
    tenant_key    bigint      not null constraint audit_tenant_key_fkey references tenant (key),
    seq           bigint      not null,  -- 1, 2, 3 …: without gaps
    at            timestamptz not null,  -- to the millisecond, as it is hashed
    actor_kind    text        not null,
    actor_id      text        null,
    actor_name    text        null,      -- as it was then
    action        text        not null,  -- noun.verb
    resource_kind text        not null,
    resource_id   text        not null,
    device        text        null,      -- the device it is about, by its id
    before        text        null,      -- JSON, as text: these bytes are hashed
    after         text        null,
    address       text        null,
    request_id    text        null,
    user_agent    text        null,
    prev_hash     bytea       not null,
    hash          bytea       not null,
    constraint audit_key primary key (tenant_key, seq)
);
create index audit_at_idx on audit (tenant_key, at);
create index audit_actor_idx on audit (tenant_key, actor_id, seq);
create index audit_resource_idx on audit (tenant_key, resource_kind, resource_id, seq);
create index audit_device_idx on audit (tenant_key, device, seq) where device is not null;

-- Where a chain ends, so that rows cut from its end are missed; and where it begins once old rows were deleted. Whoever adds a
-- row holds this one, so that the chain has one order.
create table audit_head (
    tenant_key bigint primary key constraint audit_head_tenant_key_fkey references tenant (key) on delete cascade,
    seq        bigint not null,  -- of the last row
    hash       bytea  not null,
    kept_after bigint not null default 0,                          -- of the last row that was deleted
    kept_hash  bytea  not null default decode(repeat('00', 32), 'hex')
);

-- A guard against mistakes; what proves that nothing was changed is the chain.
create function audit_is_append_only() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and coalesce(current_setting('muster.audit_retention', true), '') = 'on' then
        return old;
    end if;
    raise 'the audit is append-only' using errcode = 'insufficient_privilege';
end
$$;
create trigger audit_append_only before update or delete on audit for each row execute function audit_is_append_only();
create trigger audit_append_only_all before truncate on audit for each statement execute function audit_is_append_only();

revoke update, delete on audit from muster_tenant;
revoke delete on audit_head from muster_tenant;

-- See migration 0011. What is about no device, or one that is gone, is for who may reach all; anybody's deeds are written down.
alter table audit enable row level security;
create policy tenant on audit for select
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or exists (select from device d where d.id = device)));
create policy tenant_insert on audit for insert with check (tenant_key = (select current_tenant()));
alter table audit_head enable row level security;
create policy tenant on audit_head using (tenant_key = (select current_tenant()));
