-- Questions to the log that people keep, for themselves or for all of their tenant.
create table saved_search (
    id         uuid        primary key,
    tenant_key bigint      not null constraint saved_search_tenant_key_fkey references tenant (key) on delete cascade,
    user_id    uuid        not null constraint saved_search_user_id_fkey references app_user (id) on delete cascade,
    name       text        not null,
    query      text        not null,
    time_from  text        null,          -- as it was written: now-1h stays relative
    time_to    text        null,
    shared     boolean     not null,      -- whether others of the tenant see it
    version    bigint      not null default 1,  -- the ETag
    created_at timestamptz not null,
    updated_at timestamptz not null,
    constraint saved_search_name_key unique (user_id, name)
);
create index saved_search_tenant_key_idx on saved_search (tenant_key, id);
alter table saved_search enable row level security;
create policy tenant on saved_search using (tenant_key = (select current_tenant()));
