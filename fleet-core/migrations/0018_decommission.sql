-- Devices that leave for good. The row stays when the device does not: it is the report of what was deleted.
create table decommission (
    id          uuid        primary key,  -- v7
    tenant_key  bigint      not null constraint decommission_tenant_key_fkey references tenant (key) on delete cascade,
    device_key  bigint      null,         -- no foreign key; null once everything of the device is gone
    device_id   text        not null,
    type        text        null,         -- these three as they were: by them it is seen who may read it
    group_path  text        null,
    labels      jsonb       not null,
    purge       boolean     not null,
    asked_by    uuid        not null,     -- no foreign key: it outlives the user
    asked_at    timestamptz not null,
    deleted     jsonb       not null default '{}',  -- rows by table, counted in the transactions that deleted them
    left_over   jsonb       null,         -- the same tables counted again in the last transaction
    finished_at timestamptz null
);
create index decommission_tenant_key_idx on decommission (tenant_key, id);
create unique index decommission_unfinished_key on decommission (device_key) where finished_at is null;

-- See migration 0011.
alter table decommission enable row level security;
create policy tenant on decommission
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or in_scope((select current_scope()), group_path, type, labels)));
revoke delete on decommission from muster_tenant;

-- Such a device is disabled too, so every door is closed to it; it cannot be enabled again.
alter table device add column decommissioned_at timestamptz null;
