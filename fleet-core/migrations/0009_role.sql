-- Roles that people make. Built-in roles stay in the code, and their names are reserved (ADR 7).
create table role (
    key         bigint generated always as identity primary key,
    -- Null: a role of the platform, whose rules may name any topic.
    tenant_key  bigint      null constraint role_tenant_key_fkey references tenant (key) on delete cascade,
    id          text        not null
                            constraint role_id_grammar check (id ~ '^[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}$'),
    permissions text[]      not null,
    topic_rules jsonb       not null,     -- [{"effect", "action", "filter"}], checked again whenever they are read
    version     bigint      not null default 1,  -- the ETag
    created_at  timestamptz not null,
    updated_at  timestamptz not null,
    constraint role_id_key unique (tenant_key, id)
);
create unique index role_platform_id_key on role (id) where tenant_key is null;

-- `role` is the name of a built-in role, `role_key` a role that somebody made.
alter table app_user
    add column role_key   bigint  null constraint app_user_role_key_fkey references role (key),
    add column platform   boolean not null default false,  -- may make roles of the platform and give them away
    add column version    bigint  not null default 1,      -- the ETag
    add column updated_at timestamptz not null default now(),
    add constraint app_user_role_check check (role is null or role_key is null);
update app_user set updated_at = created_at;
create index app_user_tenant_key_idx on app_user (tenant_key, id);
create index app_user_role_key_idx on app_user (role_key) where role_key is not null;
-- There was one admin before there was a word for it.
update app_user set platform = true
 where id = (select u.id
               from app_user u
              where u.role = 'admin' and u.tenant_key = (select min(key) from tenant)
              order by u.created_at, u.id
              limit 1);

-- A program's way in: a secret with a role of its own, that ends with the user who made it.
-- The secret has 256 bits of entropy, so a plain SHA-256 is enough at rest.
create table api_key (
    id          uuid        primary key,
    user_id     uuid        not null constraint api_key_user_id_fkey references app_user (id) on delete cascade,
    name        text        not null,
    role        text        null,
    role_key    bigint      null constraint api_key_role_key_fkey references role (key),
    secret_hash bytea       not null constraint api_key_secret_hash_key unique,
    created_at  timestamptz not null,
    expires_at  timestamptz null,
    constraint api_key_role_check check ((role is null) <> (role_key is null))
);
create index api_key_user_id_idx on api_key (user_id);
create index api_key_role_key_idx on api_key (role_key) where role_key is not null;

-- A session that was begun with an API key has the key's role, and ends with the key.
alter table session
    add column api_key_id uuid null constraint session_api_key_id_fkey references api_key (id) on delete cascade;
create index session_api_key_id_idx on session (api_key_id) where api_key_id is not null;
