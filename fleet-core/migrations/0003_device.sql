-- A device: its name in topics is immutable, everything else may change.
create table device (
    key         bigint generated always as identity primary key,
    tenant_key  bigint      not null constraint device_tenant_key_fkey references tenant (key) on delete cascade,
    id          text        not null
                            constraint device_id_grammar check (id ~ '^[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}$'),
    type        text        null,
    group_path  text        null,        -- site/line-3
    labels      jsonb       not null default '{}',
    gateway_key bigint      null constraint device_gateway_key_fkey references device (key) on delete set null,
    disabled    boolean     not null default false,
    version     bigint      not null default 1,  -- the ETag
    created_at  timestamptz not null,
    updated_at  timestamptz not null,
    constraint device_id_key unique (tenant_key, id)
);
create index device_gateway_key_idx on device (gateway_key) where gateway_key is not null;

-- A device's tokens. The token has 256 bits of entropy, so a plain SHA-256 is enough at rest.
-- Two may be valid at once: the old one keeps working while a rotation overlaps.
create table credential (
    id          uuid        primary key,
    device_key  bigint      not null constraint credential_device_key_fkey references device (key) on delete cascade,
    secret_hash bytea       not null,
    created_at  timestamptz not null,
    expires_at  timestamptz null,
    revoked_at  timestamptz null
);
create index credential_device_key_idx on credential (device_key);

-- What is known of a device's life. Written often, so apart from `device` and with room for HOT updates.
-- A row exists from the first sign of life.
create table device_status (
    device_key     bigint      primary key constraint device_status_device_key_fkey references device (key) on delete cascade,
    state          text        not null constraint device_status_state_check
                               check (state in ('online', 'sleeping', 'offline', 'lost')),
    state_since    timestamptz not null,
    sleeping_until timestamptz null,
    reason         text        null,     -- why the state is what it is, for a human
    last_seen_at   timestamptz not null,
    boot_id        text        null,
    firmware       text        null,
    -- Sequence numbers: the highest seen since boot, how many never came, and which (bounded).
    last_seq       bigint      null,
    last_seq_ts    timestamptz null,     -- the time of that reading: where catching up after a crash begins
    missing        bigint      not null default 0,
    missing_ranges jsonb       not null default '[]',
    received       bigint      not null default 0,  -- readings since the device was enrolled
    clamped        bigint      not null default 0   -- readings whose clock ran ahead
) with (fillfactor = 50);
