-- A device may prove itself by a certificate instead of a token: one row in `credential`, which has either a secret or the
-- SHA-256 of the certificate. Whoever holds its key has shown that in the TLS handshake, so nothing secret is kept.
alter table credential
    alter column secret_hash drop not null,
    add column fingerprint bytea       null,  -- SHA-256 of the DER
    add column subject     text        null,
    add column not_after   timestamptz null,  -- its own end; expires_at is this or earlier
    add constraint credential_kind_check check
        ((secret_hash is null) = (fingerprint is not null)
         and (fingerprint is null) = (subject is null) and (fingerprint is null) = (not_after is null));

-- One certificate is one device's. A revoked one may be registered anew.
create unique index credential_fingerprint_key on credential (fingerprint) where revoked_at is null;
-- Of those that were revoked too: their fingerprints stay refused.
create index credential_fingerprint_idx on credential (fingerprint) where fingerprint is not null;
