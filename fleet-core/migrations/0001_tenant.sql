-- A tenant owns everything else. The name in topics and URLs is `id`; rows refer to `key`,
-- which is narrow and never leaves the database.
create table tenant (
    key        bigint generated always as identity primary key,
    id         text        not null constraint tenant_id_key unique
                           constraint tenant_id_grammar check (id ~ '^[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}$'),
    created_at timestamptz not null
);
