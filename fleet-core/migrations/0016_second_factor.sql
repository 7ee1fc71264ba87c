-- One-time passwords by time (RFC 6238), a second factor beside the password.
create table totp (
    user_id      uuid        primary key constraint totp_user_id_fkey references app_user (id) on delete cascade,
    secret       bytea       not null,  -- sealed by the key file: see `seal.rs`
    confirmed_at timestamptz null,      -- asked for at logins from then on
    last_step    bigint      not null,  -- no code of this step of 30 s, or of an earlier one, is accepted any more
    created_at   timestamptz not null
);

-- What stands in for a code when the device is lost, once each. SHA-256 of 80 random bits.
create table recovery_code (
    user_id   uuid  not null constraint recovery_code_user_id_fkey references totp (user_id) on delete cascade,
    code_hash bytea not null,
    primary key (user_id, code_hash)
);

-- See migration 0011.
alter table totp enable row level security;
create policy tenant on totp
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));
alter table recovery_code enable row level security;
create policy tenant on recovery_code
    using (exists (select from app_user u where u.id = user_id and u.tenant_key = (select current_tenant())));
