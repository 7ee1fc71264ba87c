-- Claims (ADR 10): secrets that many devices share, by which each may ask once to become a device of the fleet, and what was asked.
-- The secret has 256 bits of entropy, so a plain SHA-256 is enough at rest.
create table claim (
    id              uuid        primary key,
    tenant_key      bigint      not null constraint claim_tenant_key_fkey references tenant (key) on delete cascade,
    name            text        not null,
    secret_hash     bytea       not null constraint claim_secret_hash_key unique,
    approval        text        not null constraint claim_approval_check check (approval in ('auto', 'manual')),
    type            text        null,          -- what its devices are given; each wins over what the device says
    group_path      text        null,
    labels          jsonb       not null default '{}',
    id_pattern      text        null,          -- freezer-*
    max_devices     integer     not null,
    enrolled        integer     not null default 0,
    refused         bigint      not null default 0,  -- requests, since the claim was made
    last_refusal    text        null,
    last_refused_at timestamptz null,
    minute          timestamptz null,          -- requests of this minute are counted
    asked           integer     not null default 0,
    created_by      uuid        not null,      -- no foreign key: a claim outlives the user who made it
    created_at      timestamptz not null,
    expires_at      timestamptz not null,
    revoked_at      timestamptz null
);
create index claim_tenant_key_idx on claim (tenant_key, id);

-- What was asked with a claim. Asked again with the same nonce it is the same request, and has the same answer.
-- Either the device made its token itself and shows the hash of it, or its public key seals the token that is made for it:
-- whoever else reads an answer learns nothing.
create table claim_request (
    id            uuid        primary key,
    claim_id      uuid        not null constraint claim_request_claim_id_fkey references claim (id) on delete cascade,
    tenant_key    bigint      not null constraint claim_request_tenant_key_fkey references tenant (key) on delete cascade,
    device_id     text        not null,
    nonce         text        not null,
    token_hash    bytea       null,
    public_key    bytea       null,
    type          text        null,
    labels        jsonb       not null,
    serial        text        null,
    asker         text        not null,          -- the MQTT client id, or where the request came from
    address       text        not null,
    state         text        not null constraint claim_request_state_check
                              check (state in ('pending', 'approved', 'rejected')),
    reason        text        null,              -- why it was rejected
    sealed        jsonb       null,              -- the token, for the public key alone
    device_key    bigint      null,              -- no foreign key: what was asked outlives the device
    asked         integer     not null default 1,
    asked_at      timestamptz not null,
    last_asked_at timestamptz not null,
    decided_at    timestamptz null,
    decided_by    uuid        null,              -- null: the claim needs no approval
    constraint claim_request_nonce_key unique (claim_id, device_id, nonce),
    constraint claim_request_proof_check check (num_nonnulls(token_hash, public_key) = 1)
);
create index claim_request_tenant_key_idx on claim_request (tenant_key, id);
create index claim_request_pending_idx on claim_request (tenant_key, id) where state = 'pending';
create index claim_request_device_idx on claim_request (tenant_key, device_id);

alter table claim enable row level security;
create policy tenant on claim
    using (tenant_key = (select current_tenant()) and (select current_scope()) is null);
alter table claim_request enable row level security;
create policy tenant on claim_request
    using (tenant_key = (select current_tenant()) and (select current_scope()) is null);
