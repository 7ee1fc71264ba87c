-- People who log in, and the keys that sign their access tokens.
-- `role` is the name of a built-in role; bindings and custom roles come with their own migration.
create table app_user (
    id            uuid        primary key,
    tenant_key    bigint      not null constraint app_user_tenant_key_fkey references tenant (key) on delete cascade,
    email         text        not null,
    password_hash text        not null,  -- PHC string, Argon2id
    role          text        null,
    disabled      boolean     not null default false,
    created_at    timestamptz not null
);
-- One login form serves every tenant, so an address names one user of the platform.
create unique index app_user_email_key on app_user (lower(email));

-- Several processes share one database and must accept each other's tokens, so the keys live here.
create table signing_key (
    kid        text        primary key,
    pkcs8      bytea       not null,     -- Ed25519, PKCS#8 v2
    created_at timestamptz not null,
    retired_at timestamptz null          -- still verifies, no longer signs
);
