-- Who has which role for which devices. A user's own role (`app_user.role`, `role_key`) holds for the whole tenant; a binding
-- gives one more, within a scope.
create table binding (
    id         uuid        primary key,
    tenant_key bigint      not null constraint binding_tenant_key_fkey references tenant (key) on delete cascade,
    user_id    uuid        not null constraint binding_user_id_fkey references app_user (id) on delete cascade,
    role       text        null,      -- the name of a built-in role, or
    role_key   bigint      null constraint binding_role_key_fkey references role (key),
    scope      jsonb       not null,  -- {"kind": "tenant"}, {"kind": "group", "group": …}, {"kind": "selector", "selector": …}
    created_at timestamptz not null,
    constraint binding_role_check check ((role is null) <> (role_key is null))
);
create unique index binding_key on binding (user_id, coalesce(role, ''), coalesce(role_key, 0), scope);
create index binding_tenant_key_idx on binding (tenant_key, id);
create index binding_role_key_idx on binding (role_key) where role_key is not null;

-- What an API key may do, it may do for these devices.
alter table api_key
    add column scope jsonb not null default '{"kind": "tenant"}';
