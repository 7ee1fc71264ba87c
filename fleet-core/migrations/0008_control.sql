-- Live control: what the doors tell each other about open connections. Rows, because the doors never call each other.

-- One row, raised in the transaction of every change of rights. It follows commit order, since whoever raises it holds
-- its lock until COMMIT: a broker that has seen an epoch sees everything that was changed up to it.
create table policy_epoch (
    id    boolean primary key default true constraint policy_epoch_id_check check (id),
    epoch bigint  not null
);
insert into policy_epoch (epoch) values (1);

-- The brokers that are alive: a lease that each renews, by the database's clock, since theirs may differ.
create table broker_node (
    id           uuid        primary key,
    started_at   timestamptz not null,
    heartbeat_at timestamptz not null
);

-- A question to every live broker; who asked deletes it with its answers, else it goes when it has expired.
create table control_request (
    id         uuid        primary key,
    request    jsonb       not null,
    asked_at   timestamptz not null,
    expires_at timestamptz not null
);
create table control_answer (
    request_id uuid  not null constraint control_answer_request_id_fkey references control_request (id) on delete cascade,
    broker_id  uuid  not null,
    answer     jsonb not null,
    primary key (request_id, broker_id)
);

-- What happened to a client, at most once a minute and kind; `count` says how often within it.
create table connection_event (
    id         uuid        primary key,  -- v7: newer ones sort later
    tenant_key bigint      not null constraint connection_event_tenant_key_fkey references tenant (key) on delete cascade,
    device_key bigint      null,         -- no foreign key: an event outlives its device
    client_id  text        not null,
    kind       text        not null constraint connection_event_kind_check
                           check (kind in ('flapping', 'identity-conflict', 'queue-overflow', 'rate-limited',
                                           'disconnected-by-operator', 'trace-started')),
    detail     jsonb       not null,     -- of the newest one
    count      bigint      not null,
    at         timestamptz not null,     -- of the newest one
    minute     timestamptz not null
);
-- Client ids of two users, or of a user and a device, may be the same: their events of one minute share a row then.
create unique index connection_event_minute_key on connection_event (tenant_key, coalesce(device_key, 0), client_id, kind, minute);
create index connection_event_tenant_idx on connection_event (tenant_key, id desc);
create index connection_event_device_idx on connection_event (device_key, id desc) where device_key is not null;
