-- Who was sent to the OpenID provider and has not come back yet. SHA-256 of random secrets: the state comes back in the URL,
-- the other one in a cookie of the browser that was sent.
create table oidc_login (
    state_hash   bytea       primary key,
    browser_hash bytea       not null,
    nonce        text        not null,  -- to be found in the ID token
    verifier     text        not null,  -- of PKCE (RFC 7636)
    created_at   timestamptz not null,
    expires_at   timestamptz not null
);
create index oidc_login_created_at_idx on oidc_login (created_at);
revoke all on oidc_login from muster_tenant;

-- Whose account an identity at the provider opens.
create table oidc_identity (
    issuer     text        not null,
    subject    text        not null,
    user_id    uuid        not null constraint oidc_identity_user_id_fkey references app_user (id) on delete cascade,
    created_at timestamptz not null,
    primary key (issuer, subject)
);
create index oidc_identity_user_id_idx on oidc_identity (user_id);
alter table oidc_identity enable row level security;
create policy tenant on oidc_identity
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));
