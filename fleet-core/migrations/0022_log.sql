-- Lines that devices write. The key is the idempotency rule, and the way to the lines of one device.
-- seq < 0 is a hash of the line, standing in for a sequence number that was not sent.
create table log (
    device_key bigint      not null,
    ts         timestamptz not null,
    seq        bigint      not null,
    writer     smallint    not null,      -- who stored it,
    place      bigint      not null,      -- and where among what it stored: places follow the order of commits
    level      smallint    not null constraint log_level_check check (level between 1 and 6),   -- trace to fatal
    target     text        null,          -- the part of the program that wrote it
    message    text        not null,
    trace_id   text        null,
    fields     jsonb       null,          -- {"rssi": -81}: scalars, and arrays of them
    cut        smallint    not null,      -- what was too long: 1 the message, 2 the fields
    sent_at    timestamptz null,          -- the device's own time, where it ran ahead and `ts` was clamped
    constraint log_key primary key (device_key, ts, seq)
) partition by range (ts);
-- Lines older than the oldest day kept apart, or of a day that has no partition yet.
create table log_default partition of log default;
create index log_default_ts_idx on log_default (ts);
-- Whoever follows a writer goes along this.
create index log_place_idx on log (writer, place);
-- A clamped line that is sent again is found by the time its device gave it.
create index log_sent_at_idx on log (device_key, sent_at, seq) where sent_at is not null;

-- How far each writer has come. A writer's row is locked until its batch is committed, so that whoever has read up to a place has
-- missed nothing before it.
create table log_writer (
    writer smallint primary key,
    last   bigint   not null
);

-- The second line between tenants (ADR 8): as for readings.
alter table log enable row level security;
create policy tenant on log using (device_key = any ((select opened_devices())::bigint[]));
revoke all on log_default, log_writer from muster_tenant;
