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
