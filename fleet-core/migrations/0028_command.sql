-- What devices are to do (design §7): one row a command, from its order to its end.
create table command (
    id           uuid        primary key,          -- v7: newer ones sort later
    device_key   bigint      not null constraint command_device_key_fkey references device (key) on delete cascade,
    name         text        not null,
    params       jsonb       not null,
    state        text        not null constraint command_state_check
                             check (state in ('queued', 'sent', 'delivered', 'in_progress', 'succeeded', 'failed', 'rejected',
                                              'timed_out', 'expired', 'cancelled')),
    deadline     timestamptz not null,
    sent_to      uuid        null,                 -- the connection it was sent on last
    delivered_at timestamptz null,
    progress     float8      null,                 -- 0 to 100, as the device says
    result       jsonb       null,
    error        jsonb       null,
    steps        jsonb       not null,             -- [{"state", "at", "evidence"}]: how it came to its state, and what came too late
    created_by   text        not null,
    created_at   timestamptz not null,
    updated_at   timestamptz not null
);
create index command_device_idx on command (device_key, id desc);
-- What is under way, for its device and by its deadline.
create index command_open_idx on command (device_key, id) where state in ('queued', 'sent', 'delivered', 'in_progress');
create index command_deadline_idx on command (deadline) where state in ('queued', 'sent', 'delivered', 'in_progress');
create index command_finished_idx on command (updated_at) where state not in ('queued', 'sent', 'delivered', 'in_progress');

alter table command enable row level security;
create policy tenant on command using (exists (select from device d where d.key = device_key));
