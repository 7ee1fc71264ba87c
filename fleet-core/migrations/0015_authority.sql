-- Certificate authorities of tenants (ADR 11): built-in ones, whose keys are here and sign what devices ask for, and registered
-- ones, whose keys are elsewhere. A certificate of either stands for devices of its tenant alone.
create table authority (
    id              uuid        primary key,
    tenant_key      bigint      not null constraint authority_tenant_key_fkey references tenant (key) on delete cascade,
    name            text        not null,
    kind            text        not null constraint authority_kind_check check (kind in ('built-in', 'registered')),
    certificate     bytea       not null,  -- DER
    chain           bytea[]     not null default '{}',  -- DER: of those above it, the nearest first
    fingerprint     bytea       not null,  -- its SHA-256
    subject_digest  bytea       not null,  -- SHA-256 of its subject, which is the issuer in what it signs
    sealed_key      bytea       null,      -- PKCS#8, encrypted with a key that is in no row
    disabled        boolean     not null default false,
    not_after       timestamptz not null,
    version         bigint      not null default 1,  -- the ETag
    created_at      timestamptz not null,
    updated_at      timestamptz not null,
    constraint authority_name_key unique (tenant_key, name),
    constraint authority_fingerprint_key unique (tenant_key, fingerprint),
    constraint authority_sealed_key_check check ((sealed_key is not null) = (kind = 'built-in'))
);
create index authority_subject_digest_idx on authority (subject_digest);

-- The newest revocation list of an authority: signed here, or uploaded.
create table revocation_list (
    authority_id uuid        primary key constraint revocation_list_authority_id_fkey
                             references authority (id) on delete cascade,
    der          bytea       not null,
    number       bytea       not null,     -- 20 bytes, the most significant first
    next_update  timestamptz not null,
    renew_at     timestamptz null          -- of a built-in authority: made anew when it is asked for after that
);

-- Certificates taken back that have no row in `credential`: those on the list of a registered authority, and those of devices
-- that are gone.
create table revoked_certificate (
    authority_id uuid        not null constraint revoked_certificate_authority_id_fkey
                             references authority (id) on delete cascade,
    serial       bytea       not null,     -- 20 bytes
    revoked_at   timestamptz not null,
    reason       text        not null,
    not_after    timestamptz null,         -- where it is known: later it need not be on a list
    constraint revoked_certificate_key primary key (authority_id, serial)
);

alter table credential
    add column authority_id      uuid        null constraint credential_authority_id_fkey
                                             references authority (id) on delete set null,
    add column serial            bytea       null,  -- 20 bytes
    add column public_key_digest bytea       null,  -- SHA-256 of its SubjectPublicKeyInfo
    add column der               bytea       null,  -- of one signed here: sent again to a device that missed it
    add column renew_after       timestamptz null,  -- the device may ask for the next one from then on
    add column renewals          smallint    not null default 0,  -- how often it has
    add column first_used_at     timestamptz null,  -- a client came in by it
    add column revocation_reason text        null;
update credential
   set renew_after = created_at + (not_after - created_at) * 2 / 3
 where not_after is not null;
create index credential_authority_id_idx on credential (authority_id, serial) where authority_id is not null;

-- The second line between tenants (ADR 8). Whoever may issue certificates for some devices needs an authority for it, but only
-- whoever reaches all of them may change one.
alter table authority enable row level security;
create policy tenant on authority for select
    using (tenant_key = (select current_tenant()));
create policy tenant_insert on authority for insert
    with check (tenant_key = (select current_tenant()) and (select current_scope()) is null);
create policy tenant_update on authority for update
    using (tenant_key = (select current_tenant()) and (select current_scope()) is null);
create policy tenant_delete on authority for delete
    using (tenant_key = (select current_tenant()) and (select current_scope()) is null);
alter table revocation_list enable row level security;
create policy tenant on revocation_list using (exists (select from authority a where a.id = authority_id));
alter table revoked_certificate enable row level security;
create policy tenant on revoked_certificate using (exists (select from authority a where a.id = authority_id));
