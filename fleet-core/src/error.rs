//! The one error of this crate. The doors translate it: `api/src/problem.rs` to a status code,
//! the broker to a reason code.

use crate::device::GroupPath;
use crate::id::{
    ApiKeyId, AuthorityId, BadId, BindingId, ClaimId, ClaimRequestId, CommandId, CredentialId, DecommissionId,
    DeviceId, LoginSessionId, RoleId, SavedSearchId, SessionId, TenantId, UserId,
};
use crate::topic_rule::BadRule;

/// What can go wrong with a fleet. The texts are for the caller and say what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device of that name in the caller's tenant.
    #[error("device {0} does not exist")]
    NoSuchDevice(DeviceId),
    /// The name is taken; names are never reused while the device exists.
    #[error("device {0} exists already")]
    DeviceExists(DeviceId),
    /// The gateway named for a child does not exist.
    #[error("gateway {0} does not exist: enrol it first")]
    NoSuchGateway(DeviceId),
    /// A device cannot be its own gateway, nor can a gateway stand behind another.
    #[error(
        "device {0} cannot be a gateway here: expected a device that has no gateway of its own and is not the device itself"
    )]
    BadGateway(DeviceId),
    /// Somebody changed the row since the caller read it.
    #[error("it has changed since: expected version {expected}, found {found}")]
    VersionMismatch {
        /// The version the caller had read.
        expected: i64,
        /// The version that is stored.
        found: i64,
    },
    /// The shadow was changed since the version that the change is about.
    #[error("the shadow has changed since: expected version {expected}, found {found}")]
    ShadowConflict {
        /// The version the change is about.
        expected: i64,
        /// The version it has.
        found: i64,
    },
    /// One side of the shadow would be too large.
    #[error("{side} would have {bytes} bytes: expected at most {most}")]
    ShadowTooLarge {
        /// Which side.
        side: &'static str,
        /// As JSON.
        bytes: usize,
        /// The bound.
        most: usize,
    },
    /// No such command in the caller's tenant, or none that the caller may see.
    #[error("command {0} does not exist")]
    NoSuchCommand(CommandId),
    /// It has come to its end.
    #[error("command {0} is finished: expected one that is not")]
    CommandFinished(CommandId),
    /// So old versions are not kept.
    #[error("what the shadow was then is not kept any more: ask for a later time")]
    ShadowForgotten,
    /// No tenant of that name.
    #[error("tenant {0} does not exist")]
    NoSuchTenant(TenantId),
    /// The name is taken.
    #[error("tenant {0} exists already")]
    TenantExists(TenantId),
    /// No such row in the tenant's audit, or none that the caller may see.
    #[error("audit entry {0} does not exist")]
    NoSuchAuditEntry(i64),
    /// No such credential of this device.
    #[error("credential {0} does not exist")]
    NoSuchCredential(CredentialId),
    /// No such session in the caller's tenant.
    #[error("session {0} does not exist, or has ended")]
    NoSuchSession(SessionId),
    /// No such login session of this user.
    #[error("login session {0} does not exist, or has ended")]
    NoSuchLoginSession(LoginSessionId),
    /// Who has left for good does not come back.
    #[error("device {0} is decommissioned: enrol another one")]
    Decommissioned(DeviceId),
    /// No such decommission in the caller's tenant, or none that the caller may see.
    #[error("decommission {0} does not exist")]
    NoSuchDecommission(DecommissionId),
    /// No such saved search of this user, nor one that is shared.
    #[error("saved search {0} does not exist")]
    NoSuchSavedSearch(SavedSearchId),
    /// The user has one of that name.
    #[error("you have a saved search {0:?} already")]
    SavedSearchExists(String),
    /// Only its owner changes it.
    #[error("saved search {0} is somebody else's: save one of your own")]
    NotOwner(SavedSearchId),
    /// Two are valid already.
    #[error("device {0} has two valid credentials already: revoke one first, or rotate")]
    TooManyCredentials(DeviceId),
    /// The certificate is a credential already, of this device or another.
    #[error("the certificate is registered already: revoke it there first")]
    CertificateTaken,
    /// No such authority in the caller's tenant.
    #[error("authority {0} does not exist")]
    NoSuchAuthority(AuthorityId),
    /// The tenant has an authority of that name, or with that certificate.
    #[error("an authority with this {0} exists already")]
    AuthorityExists(&'static str),
    /// What cannot be undone is done in two steps.
    #[error("authority {0} is enabled: disable it first, and see that no device needs it")]
    AuthorityEnabled(AuthorityId),
    /// There is no authority by which to sign, or this one cannot.
    #[error("{0}")]
    CannotSign(String),
    /// The authority is registered, and no list of it was uploaded.
    #[error("authority {0} has no revocation list")]
    NoRevocationList(AuthorityId),
    /// The list is older than the one that is in force.
    #[error("the revocation list has number {found}: expected {known} or more, the number of the one in force")]
    OldRevocationList {
        /// The number of the list that was given.
        found: String,
        /// The number of the list in force.
        known: String,
    },
    /// The file with the key for secrets at rest cannot be used; the text says why.
    #[error("{0}")]
    Seal(String),
    /// No role of that name that the caller could see or give away.
    #[error("role {0} does not exist")]
    NoSuchRole(RoleId),
    /// The name is taken, by a built-in role, by one of the tenant or by one of the platform.
    #[error("role {0} exists already")]
    RoleExists(RoleId),
    /// Somebody has the role.
    #[error("role {0} is in use: expected no user and no API key with it")]
    RoleInUse(RoleId),
    /// Built-in roles are the same everywhere.
    #[error("role {0} is built in: it cannot be changed")]
    RoleBuiltIn(RoleId),
    /// A topic rule is no rule, or reaches too far.
    #[error(transparent)]
    BadRule(#[from] BadRule),
    /// Nobody gives what they do not have.
    #[error("role {0} allows more than you may do yourself: expected a role, and a scope, within your own rights")]
    Exceeds(RoleId),
    /// Nobody changes who may do more.
    #[error("this user may do more than you: expected one whose rights are within your own")]
    Above,
    /// No such binding in the caller's tenant.
    #[error("binding {0} does not exist")]
    NoSuchBinding(BindingId),
    /// The user has just this role for just these devices.
    #[error("the user has this role in this scope already")]
    BindingExists,
    /// Only who has platform standing may do that.
    #[error("this needs platform standing: only a user who has it may {0}")]
    NotPlatform(&'static str),
    /// No such user in the caller's tenant.
    #[error("user {0} does not exist")]
    NoSuchUser(UserId),
    /// An address names one user of the whole server.
    #[error("another user has this e-mail address already")]
    EmailTaken,
    /// Nobody would be left who could manage access.
    #[error("this is the last enabled {0}: make another one first")]
    LastAdmin(&'static str),
    /// No such API key in the caller's tenant.
    #[error("API key {0} does not exist")]
    NoSuchApiKey(ApiKeyId),
    /// No such claim in the caller's tenant.
    #[error("claim {0} does not exist")]
    NoSuchClaim(ClaimId),
    /// No such request in the caller's tenant.
    #[error("request {0} does not exist")]
    NoSuchClaimRequest(ClaimRequestId),
    /// As many devices as a claim was made for have come.
    #[error("claim {0} is used up: as many devices as it was made for have come")]
    ClaimUsedUp(ClaimId),
    /// Somebody has decided already.
    #[error("request {0} is decided already")]
    Decided(ClaimRequestId),
    /// No such group that the caller may see.
    #[error("group {0} does not exist")]
    NoSuchGroup(GroupPath),
    /// There is something at this path already.
    #[error("there is a group {0} already, or something is said about it")]
    GroupExists(GroupPath),
    /// It is not empty.
    #[error("group {0} is not empty: there are devices or groups in it, or bindings, API keys or claims are about it")]
    GroupInUse(GroupPath),
    /// The caller may not change every device that can be in it.
    #[error("group {0} is beyond what your roles reach: expected one within their scope")]
    GroupOutOfScope(GroupPath),
    /// Whoever moves a group, or changes a device, could do more with it then.
    #[error("the change would give you more: expected one after which you have no right ({0}) that you have not now")]
    Gains(&'static str),
    /// A tenant has as many as its bound allows.
    #[error("there are {most} {what} already: expected at most that many")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        most: usize,
    },
    /// E-mail or password is wrong, or the user is disabled; which of them is not said.
    #[error("e-mail or password is wrong")]
    BadLogin,
    /// The provider gives the identity no role here.
    #[error("the provider gives this identity no role here: ask whoever manages it there")]
    OidcNoRole,
    /// No account belongs to the identity, or it is disabled.
    #[error("no account belongs to this identity: ask an administrator")]
    OidcNoAccount,
    /// The provider does not vouch for an e-mail address.
    #[error("the provider vouches for no e-mail address of this identity")]
    OidcUnverified,
    /// The user has a second factor, and no code was given.
    #[error("a code of the authenticator is needed: expected `code`, or a recovery code in its place")]
    TotpRequired,
    /// The code is wrong, or was used before.
    #[error("the code is wrong, or was used before: wait for the next one")]
    BadCode,
    /// The user has a second factor already.
    #[error("there is an authenticator already: remove it first")]
    TotpOn,
    /// The user has no second factor.
    #[error("there is no authenticator")]
    TotpOff,
    /// No link to a new password, or one that was used, replaced or has expired.
    #[error("the link has been used or has expired: ask an administrator for a new one")]
    BadResetToken,
    /// Too many failed logins of this account or from this address; the text does not say of which.
    #[error("too many failed logins: try again in {retry_after_s} s")]
    Locked {
        /// What waits: `account` or `address`.
        by: &'static str,
        /// How long.
        retry_after_s: u64,
    },
    /// The token is not one of ours, has expired, or its user is gone.
    #[error("the access token is not valid: {0}")]
    BadToken(&'static str),
    /// An `Idempotency-Key` came again with a different request.
    #[error("this Idempotency-Key was used for a different request")]
    IdempotencyConflict,
    /// A value outside its rules; the text says which and what was expected.
    #[error("{0}")]
    Invalid(String),
    /// A name or id outside its grammar.
    #[error(transparent)]
    BadId(#[from] BadId),
    /// Nobody holds connections at the moment, or none of those who do answered in time.
    #[error("{0}: try again shortly, and see that a server with the role broker is running")]
    NoBroker(&'static str),
    /// More of something at once than its bound allows; worth trying again later.
    #[error("too many {0} at once: try again shortly")]
    Busy(&'static str),
    /// The schema was migrated by a newer binary.
    #[error(
        "the database has schema version {found}, this binary knows {known}: use the newer muster, or restore a backup"
    )]
    SchemaTooNew {
        /// Version of the schema in the database.
        found: i64,
        /// Newest version this binary knows.
        known: i64,
    },
    /// The embedded PostgreSQL cannot run; the text says what to do.
    #[error("{0}")]
    Postgres(String),
    /// The database that was given cannot be used; the text says what was expected.
    #[error("{0}")]
    UnusableDatabase(String),
    /// The index of log lines failed; it can be made anew from the database.
    #[error("the index of log lines failed: {0}")]
    Index(#[from] tantivy::TantivyError),
    /// As many searches as are worked on at once are under way.
    #[error("too many searches are under way: try again shortly")]
    SearchBusy,
    /// There was too much to look through.
    #[error("the search took too long: expected less to look through, such as a shorter time")]
    SearchTimeout,
    /// Lines fall into more stretches of time than are counted.
    #[error("more than {0} stretches: expected a longer interval, or a shorter time")]
    TooManyBuckets(usize),
    /// A migration failed.
    #[error("migration failed")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The database failed or is away.
    #[error("database failed")]
    Database(#[from] sqlx::Error),
    /// A library answered what it never should; the text is for the log.
    #[error("internal: {0}")]
    Internal(String),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns the violation of a named constraint into the rule it keeps.
pub trait OrOn<T> {
    /// `otherwise` when `constraint` was violated, else the error as it is.
    fn or_on(self, constraint: &str, otherwise: impl FnOnce() -> Error) -> Result<T>;
}

impl<T> OrOn<T> for Result<T, sqlx::Error> {
    fn or_on(self, constraint: &str, otherwise: impl FnOnce() -> Error) -> Result<T> {
        self.map_err(|error| match &error {
            sqlx::Error::Database(db) if db.constraint() == Some(constraint) => otherwise(),
            _ => Error::Database(error),
        })
    }
}

impl<T> OrOn<T> for Result<T> {
    fn or_on(self, constraint: &str, otherwise: impl FnOnce() -> Error) -> Result<T> {
        match self {
            Err(Error::Database(error)) => Err(error).or_on(constraint, otherwise),
            other => other,
        }
    }
}

/// Whether the row is still one of the versions the caller `expected`; without any, it may be what it is.
pub(crate) fn check_version(found: i64, expected: &[i64]) -> Result<()> {
    match expected.first() {
        Some(first) if !expected.contains(&found) => Err(Error::VersionMismatch { expected: *first, found }),
        _ => Ok(()),
    }
}

/// Whether the statement itself was refused (a data or constraint error), so that sending it again cannot help.
/// Everything else (the connection, the server, a full disk, a deadlock) may pass by itself.
pub fn is_refused(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(db) => db.code().is_some_and(|code| code.starts_with("22") || code.starts_with("23")),
        sqlx::Error::Encode(_) | sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } => true,
        _ => false,
    }
}
