-- Groups that somebody made, so that they are there before a device is in them. A group that devices are in needs no row: it is
-- there while they are (`device.group_path`), and so are those above it.
create table device_group (
    tenant_key bigint      not null constraint device_group_tenant_key_fkey references tenant (key) on delete cascade,
    path       text        not null,        -- site/line-3
    created_at timestamptz not null,
    constraint device_group_pkey primary key (tenant_key, path)
);
alter table device_group enable row level security;
-- Seen by whoever would see a device in it of which nothing else is known.
create policy tenant on device_group
    using (tenant_key = (select current_tenant())
           and ((select current_scope()) is null or in_scope((select current_scope()), path, null, '{}')));
