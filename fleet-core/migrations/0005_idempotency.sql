-- Answers to creating POSTs that carried an Idempotency-Key, kept for a day.
-- Secrets are not in `answer`: a replay says that they were shown once.
create table idempotency (
    tenant_key   bigint      not null constraint idempotency_tenant_key_fkey references tenant (key) on delete cascade,
    user_id      uuid        not null,
    key          text        not null,
    request_hash bytea       not null,
    status       smallint    not null,
    answer       jsonb       not null,
    created_at   timestamptz not null,
    constraint idempotency_key primary key (tenant_key, user_id, key)
);
create index idempotency_created_at_idx on idempotency (created_at);
