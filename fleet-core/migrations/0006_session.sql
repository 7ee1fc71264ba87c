-- What outlives an MQTT connection: sessions, what they subscribed to, what waits for them; and retained messages.

-- Belongs to a device or a user and goes with it. Written with every batch of messages, hence the room for HOT updates.
create table session (
    id           uuid        primary key,
    name         text        not null constraint session_name_key unique,  -- the broker's: owner and client id
    tenant_key   bigint      not null constraint session_tenant_key_fkey references tenant (key) on delete cascade,
    device_key   bigint      null constraint session_device_key_fkey references device (key) on delete cascade,
    user_id      uuid        null constraint session_user_id_fkey references app_user (id) on delete cascade,
    client_id    text        not null,
    expiry_s     bigint      not null,            -- 4294967295: never
    connected    boolean     not null,
    since        timestamptz not null,            -- connected, or away
    expires_at   timestamptz null,                -- while away; null: never
    will         jsonb       null,
    last_offset  bigint      not null default 0,  -- the highest a message was ever given
    sent_to      bigint      not null default 0,  -- the highest that was sent before the connection ended
    dropped      bigint      not null default 0,  -- messages that found the queue full
    dropped_at   timestamptz null,
    created_at   timestamptz not null,
    constraint session_owner_check check (num_nonnulls(device_key, user_id) = 1)
) with (fillfactor = 50);
create index session_tenant_key_idx on session (tenant_key, id);
create index session_device_key_idx on session (device_key, id) where device_key is not null;
create index session_user_id_idx on session (user_id) where user_id is not null;

-- A filter may be longer than a B-tree takes, so its digest stands for it.
create table session_subscription (
    session_id          uuid     not null constraint session_subscription_session_id_fkey
                                 references session (id) on delete cascade,
    digest              bytea    not null,  -- SHA-256 of the filter
    filter              text     not null,  -- with $share/{group}/
    qos                 smallint not null,
    no_local            boolean  not null,
    retain_as_published boolean  not null,
    subscription_id     integer  null,
    constraint session_subscription_key primary key (session_id, digest)
);

-- Messages that wait for a client, or for its acknowledgement. No foreign key: its check costs as much as the insert.
-- Whoever deletes a session deletes its messages in the same statement; what is left when one goes with its owner
-- can be seen by nobody and is removed at the next start or by age.
create table session_message (
    session_id       uuid        not null,
    msg_offset       bigint      not null,
    released         boolean     not null default false,  -- QoS 2: received by the client, who keeps the rest
    qos              smallint    not null,
    retain           boolean     not null,
    bytes            integer     not null,                -- what it counts against the limits of a queue
    subscription_ids integer[]   not null,
    accepted_at      timestamptz not null,
    expires_at       timestamptz null,
    topic            text        not null,
    payload          bytea       not null,
    properties       jsonb       null,
    constraint session_message_key primary key (session_id, msg_offset)
) with (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 10000,
        autovacuum_vacuum_insert_scale_factor = 0.2, autovacuum_vacuum_cost_delay = 0);
-- Rows live shortly: compressing them is not worth its time.
alter table session_message alter column payload set storage external;
create index session_message_accepted_at_idx on session_message (accepted_at);
create index session_message_expires_at_idx on session_message (expires_at) where expires_at is not null;

-- QoS 2 messages from clients, by packet id, until they are released. No foreign key, as above.
create table session_received (
    session_id uuid    not null,
    packet_id  integer not null,
    constraint session_received_key primary key (session_id, packet_id)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 10000);

-- The newest retained message of each topic.
create table retained_message (
    digest      bytea       primary key,  -- SHA-256 of the topic, which may be longer than a B-tree takes
    topic       text        not null,
    qos         smallint    not null,
    payload     bytea       not null,
    properties  jsonb       null,
    accepted_at timestamptz not null,
    expires_at  timestamptz null
);
