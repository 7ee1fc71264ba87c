-- The names and kinds of the values of a reading, stored once and referred to by number:
-- a fleet has few shapes and many readings (ADR 3).
create table shape (
    id         integer generated always as identity primary key,
    tenant_key bigint  not null constraint shape_tenant_key_fkey references tenant (key) on delete cascade,
    digest     bytea   not null,          -- SHA-256 of metrics and kinds: names are too long for a B-tree
    metrics    text[]  not null,          -- sorted
    kinds      text    not null,          -- one letter a metric: n number, b boolean (as 0 or 1)
    constraint shape_digest_key unique (tenant_key, digest)
);

-- Readings. The key is the idempotency rule and the query index in one.
-- seq < 0 is a hash of the values, standing in for a sequence number that was not sent.
create table telemetry (
    device_key bigint      not null,
    ts         timestamptz not null,
    seq        bigint      not null,
    shape_id   integer     not null,
    nums       float8[]    not null,      -- in the order of shape.metrics
    rest       jsonb       null,          -- values that are not a number or a boolean
    sent_at    timestamptz null,          -- the device's own time, where it ran ahead and `ts` was clamped
    constraint telemetry_key primary key (device_key, ts, seq)
) partition by range (ts);
-- Readings older than the oldest day kept apart, or of a day that has no partition yet.
create table telemetry_default partition of telemetry default;
create index telemetry_default_ts_idx on telemetry_default (ts);
-- A clamped reading that is sent again is found by the time its device gave it.
create index telemetry_sent_at_idx on telemetry (device_key, sent_at, seq) where sent_at is not null;

-- The newest value of every metric of a device: {"temp": [1763692212345, 918, 21.4]}, that is time in ms, seq
-- and value; without the value when that is large: it is read from its reading then.
create table device_latest (
    device_key bigint      primary key constraint device_latest_device_key_fkey references device (key) on delete cascade,
    newest     timestamptz not null,
    doc        jsonb       not null
) with (fillfactor = 50);

-- Payloads that could not be read. They were acknowledged, so they are kept, with the reason.
create table dead_letter (
    id          uuid        primary key,  -- v7, made on arrival: a retried batch stores it once
    tenant_key  bigint      not null constraint dead_letter_tenant_key_fkey references tenant (key) on delete cascade,
    device_id   text        not null,
    topic       text        not null,
    reason      text        not null,
    payload     bytea       not null,
    received_at timestamptz not null
);
create index dead_letter_tenant_key_idx on dead_letter (tenant_key, id desc);
create index dead_letter_device_idx on dead_letter (tenant_key, device_id, id desc);
create index dead_letter_received_at_idx on dead_letter (received_at);
