-- A login, from the password to the logout. Access tokens name it and end with its row, and so does its refresh token.
create table login_session (
    id            uuid        primary key,  -- v7; `sid` of the access tokens
    user_id       uuid        not null constraint login_session_user_id_fkey references app_user (id) on delete cascade,
    method        text        not null constraint login_session_method_check check (method in ('password', 'oidc')),
    -- The refresh token is two secrets of 256 random bits, so plain SHA-256 is enough at rest: the family stays, the
    -- other changes with each use. A right family with a wrong secret is an old token that somebody kept.
    family_hash   bytea       not null constraint login_session_family_hash_key unique,
    secret_hash   bytea       not null,
    previous_hash bytea       null,         -- for a moment after rotated_at it is answered with the same successor …
    successor_key bytea       not null,     -- … which is HMAC-SHA256 of the secret before it under this key
    rotated_at    timestamptz not null,
    address       text        null,         -- of the client, when it logged in
    user_agent    text        null,         -- the same, cut
    created_at    timestamptz not null,
    last_used_at  timestamptz not null,     -- when its refresh token was used, or it began
    expires_at    timestamptz not null,     -- unless it is used before
    ends_at       timestamptz not null      -- whatever happens
);
create index login_session_user_id_idx on login_session (user_id, last_used_at);
create index login_session_expires_at_idx on login_session (expires_at);

-- See migration 0011.
alter table login_session enable row level security;
create policy tenant on login_session
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));

-- Tries to log in that are not known to have been right, so that guessing gets slower in whatever process it is tried. An
-- account is counted whether it exists or not: its wait must not tell.
create table login_failure (
    kind          text        not null constraint login_failure_kind_check check (kind in ('account', 'address')),
    subject       bytea       not null,  -- SHA-256 of the e-mail address in lower case, or of the network
    user_id       uuid        null constraint login_failure_user_id_fkey references app_user (id) on delete cascade,
    failures      integer     not null,  -- since the last success
    tried_at      timestamptz not null,
    blocked_until timestamptz not null,
    primary key (kind, subject)
);
create index login_failure_tried_at_idx on login_failure (tried_at);
create index login_failure_user_id_idx on login_failure (user_id) where user_id is not null;

alter table login_failure enable row level security;
create policy tenant on login_failure
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));

-- Null: a user who was invited, or who logs in by other means, and has no password.
alter table app_user alter column password_hash drop not null;

-- A way to a new password, once: a link that an administrator hands out. SHA-256 of 256 random bits.
create table password_reset (
    user_id    uuid        primary key constraint password_reset_user_id_fkey references app_user (id) on delete cascade,
    token_hash bytea       not null constraint password_reset_token_hash_key unique,
    created_at timestamptz not null,
    expires_at timestamptz not null
);

alter table password_reset enable row level security;
create policy tenant on password_reset
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));

-- A key that is retired signs no more from `retired_at` on, and verifies what it signed until `expires_at`. Its private
-- half is forgotten then; the public one is what others check tokens by.
alter table signing_key
    add column public_key bytea       null,
    add column expires_at timestamptz null,
    alter column pkcs8 drop not null,
    add constraint signing_key_half_check check (pkcs8 is not null or public_key is not null);
update signing_key set expires_at = retired_at + interval '1 day' where retired_at is not null;
