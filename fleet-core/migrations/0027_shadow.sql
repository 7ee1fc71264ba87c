-- What a device is to be and what it says it is (design §7). Each change makes the next version.
create table shadow (
    device_key bigint      primary key constraint shadow_device_key_fkey references device (key) on delete cascade,
    version    bigint      not null,
    desired    jsonb       not null,
    reported   jsonb       not null,
    told       jsonb       not null default '{}',  -- `desired` as the device last heard of it
    updated_at timestamptz not null
);

-- Each version as it was, the newest included; a bounded number of them.
create table shadow_history (
    device_key bigint      not null constraint shadow_history_device_key_fkey references device (key) on delete cascade,
    version    bigint      not null,
    desired    jsonb       not null,
    reported   jsonb       not null,
    by         text        not null,               -- `device`, the id of a user or an API key, a part of the server
    at         timestamptz not null,
    constraint shadow_history_key primary key (device_key, version)
);

-- Levels of logging that end by themselves.
create table log_level (
    device_key bigint      primary key constraint log_level_device_key_fkey references device (key) on delete cascade,
    level      text        not null,               -- what is desired meanwhile,
    former     text        null,                   -- what was desired before, and will be again,
    until      timestamptz not null,               -- and when
    set_by     text        not null,
    set_at     timestamptz not null
);
create index log_level_until_idx on log_level (until);

-- Devices for which something new waits: the broker that holds the connection of one looks for it. A row is a hint, and gone within
-- seconds; what it hints at is sent again whenever the device connects.
create table dispatch (
    device_key bigint      not null constraint dispatch_device_key_fkey references device (key) on delete cascade,
    kind       text        not null constraint dispatch_kind_check check (kind in ('shadow', 'command')),
    turn       bigint      not null,               -- raised by whatever comes meanwhile
    at         timestamptz not null,
    constraint dispatch_key primary key (device_key, kind)
);

-- The second line between tenants (ADR 8): whoever sees the device sees these.
alter table shadow enable row level security;
create policy tenant on shadow using (exists (select from device d where d.key = device_key));
alter table shadow_history enable row level security;
create policy tenant on shadow_history using (exists (select from device d where d.key = device_key));
alter table log_level enable row level security;
create policy tenant on log_level using (exists (select from device d where d.key = device_key));
alter table dispatch enable row level security;
create policy tenant on dispatch using (exists (select from device d where d.key = device_key));
