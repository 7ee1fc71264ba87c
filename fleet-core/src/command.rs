//! Commands: what devices are to do, and what becomes of it.
//!
//! [`create`] orders one, [`to_send`] gives those that a connection is to be sent, [`deliver`] notes what was acknowledged, [`respond`] what the device
//! says, [`cancel`] takes one back, [`work`] ends what its deadline has overtaken. Holds: `queued → sent → delivered → in_progress → succeeded | failed | rejected |
//! timed_out | expired | cancelled`, where steps may be skipped and none goes back; a final state stays, and what comes later is kept as evidence; each
//! step has its time; a command that a device has not acknowledged is sent again on its next connection, until the deadline; how many a device has
//! open is bounded (ADR 16). Ignorant of: MQTT, HTTP, what commands mean.

mod response;
mod steps;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;

pub use response::{Outcome, Response, respond};
pub use steps::{MAX_WORK, Sent, deliver, forget, to_send, work};

use crate::config;
use crate::dispatch::{self, Kind};
use crate::error::{Error, Result};
use crate::id::{CommandId, DeviceId, DeviceKey, TenantKey};
use crate::shadow::Document;
use crate::status::DeviceStatus;

/// Most commands on a page.
pub const MAX_PAGE: i64 = 1000;
/// Longest name, in characters.
pub const MAX_NAME_CHARS: usize = 64;
/// Steps that are kept of a command; of those that repeat, such as being sent again, no more are written down then.
pub const MAX_STEPS: i32 = 50;

/// How far a command has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// It waits for its device.
    Queued,
    /// It was sent.
    Sent,
    /// The device has acknowledged the message.
    Delivered,
    /// The device works on it.
    InProgress,
    /// The device has done it.
    Succeeded,
    /// The device could not do it.
    Failed,
    /// The device will not do it.
    Rejected,
    /// The device had it, and has not ended it by the deadline.
    TimedOut,
    /// The device has not had it by the deadline.
    Expired,
    /// Somebody took it back.
    Cancelled,
}

impl State {
    /// All of them, in order.
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Sent,
        Self::Delivered,
        Self::InProgress,
        Self::Succeeded,
        Self::Failed,
        Self::Rejected,
        Self::TimedOut,
        Self::Expired,
        Self::Cancelled,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Sent => "sent",
            Self::Delivered => "delivered",
            Self::InProgress => "in_progress",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::TimedOut => "timed_out",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// Whether it is the end.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Sent | Self::Delivered | Self::InProgress)
    }
}

/// The name of a command: 1 to 64 of `a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// It as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if (1..=MAX_NAME_CHARS).contains(&text.len()) && text.bytes().all(is_letter) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::Invalid("name: expected 1 to 64 of a-z 0-9 . _ -".to_owned()))
    }
}

/// A command to be ordered.
#[derive(Debug, Clone)]
pub struct New {
    /// What is to be done.
    pub name: Name,
    /// With what.
    pub params: Document,
    /// Until when.
    pub deadline: DateTime<Utc>,
}

/// A command.
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    /// Its id.
    pub id: CommandId,
    /// The device.
    pub device: DeviceId,
    /// The device's row.
    pub device_key: DeviceKey,
    /// What is to be done.
    pub name: String,
    /// With what.
    pub params: Value,
    /// How far it has come.
    pub state: State,
    /// Until when it is worth something.
    pub deadline: DateTime<Utc>,
    /// How much of it is done, 0 to 100, as the device says.
    pub progress: Option<f64>,
    /// What came of it.
    pub result: Option<Value>,
    /// What went wrong.
    pub error: Option<Value>,
    /// How it came to its state: `[{"state", "at", "evidence"}]`, and what came too late, without a state.
    pub steps: Value,
    /// The id of who ordered it.
    pub created_by: String,
    /// When.
    pub created_at: DateTime<Utc>,
    /// When it was changed last.
    pub updated_at: DateTime<Utc>,
}

impl Command {
    /// Why it is not finished, for people; `status` is its device's.
    pub fn waits_for(&self, status: Option<&DeviceStatus>) -> Option<String> {
        let seen = || match status {
            None => "the device was never seen".to_owned(),
            Some(status) => {
                format!("the device is {} since {}", status.state.as_str(), status.state_since.to_rfc3339())
            }
        };
        Some(match self.state {
            State::Queued if status.is_some_and(|status| status.state.as_str() == "online") => {
                "the device is connected: it is sent as soon as it listens on commands/+/request".to_owned()
            }
            State::Queued => format!("{}: it is sent when the device connects", seen()),
            State::Sent => format!("it was sent, and the device has not acknowledged it; {}", seen()),
            State::Delivered => "the device has it, and has not answered".to_owned(),
            State::InProgress => match self.progress {
                Some(progress) => format!("the device works on it: {progress} %"),
                None => "the device works on it".to_owned(),
            },
            _ => return None,
        })
    }
}

/// A step as it is kept.
fn step(state: Option<State>, at: DateTime<Utc>, evidence: &Value) -> Value {
    json!({ "state": state.map(State::name), "at": at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true), "evidence": evidence })
}

struct Row {
    id: CommandId,
    device: DeviceId,
    device_key: DeviceKey,
    name: String,
    params: Value,
    state: String,
    deadline: DateTime<Utc>,
    progress: Option<f64>,
    result: Option<Value>,
    error: Option<Value>,
    steps: Value,
    created_by: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Row> for Command {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            device: row.device,
            device_key: row.device_key,
            name: row.name,
            params: row.params,
            // A constraint holds it.
            state: State::named(&row.state).unwrap_or(State::Queued),
            deadline: row.deadline,
            progress: row.progress,
            result: row.result,
            error: row.error,
            steps: row.steps,
            created_by: row.created_by,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// Orders a command. To be called in a transaction, in the name of `by`.
pub async fn create(
    db: &mut PgConnection,
    (device, id): (DeviceKey, &DeviceId),
    new: &New,
    by: &str,
    settings: &config::Commands,
    now: DateTime<Utc>,
) -> Result<Command> {
    let params = Value::Object(new.params.clone());
    let bytes = params.to_string().len();
    if bytes > settings.max_params_bytes {
        return Err(Error::Invalid(format!("params: {bytes} bytes: expected at most {}", settings.max_params_bytes)));
    }
    if crate::shadow::has_nul(&params) {
        return Err(Error::Invalid("params: expected text without U+0000".to_owned()));
    }
    // Others who order something of the same device wait, so that the bound holds.
    sqlx::query!("select key from device where key = $1 for no key update", device.0).fetch_optional(&mut *db).await?;
    let open = sqlx::query_scalar!(
        r#"
        select count(*) as "count!" from command
         where device_key = $1 and state in ('queued', 'sent', 'delivered', 'in_progress')
        "#,
        device.0
    );
    let open = open.fetch_one(&mut *db).await?;
    if usize::try_from(open).is_ok_and(|open| open >= settings.max_open) {
        return Err(Error::TooMany { what: "unfinished commands of this device", most: settings.max_open });
    }
    let command = CommandId::new();
    let steps = json!([step(Some(State::Queued), now, &json!({ "by": by }))]);
    sqlx::query!(
        "
        insert into command (id, device_key, name, params, state, deadline, steps, created_by, created_at, updated_at)
        values ($1, $2, $3, $4, 'queued', $5, $6, $7, $8, $8)
        ",
        command as CommandId,
        device.0,
        new.name.as_str(),
        params,
        new.deadline,
        steps,
        by,
        now
    )
    .execute(&mut *db)
    .await?;
    dispatch::note(db, device, Kind::Command).await?;
    Ok(Command {
        id: command,
        device: id.clone(),
        device_key: device,
        name: new.name.as_str().to_owned(),
        params,
        state: State::Queued,
        deadline: new.deadline,
        progress: None,
        result: None,
        error: None,
        steps,
        created_by: by.to_owned(),
        created_at: now,
        updated_at: now,
    })
}

/// The command of that id.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: CommandId) -> Result<Command> {
    let row = sqlx::query_as!(
        Row,
        r#"
        select c.id as "id: CommandId", d.id as "device: DeviceId", c.device_key as "device_key: DeviceKey", c.name, c.params, c.state,
               c.deadline, c.progress, c.result, c.error, c.steps, c.created_by, c.created_at, c.updated_at
          from command c join device d on d.key = c.device_key
         where c.id = $1 and d.tenant_key = $2
        "#,
        id as CommandId,
        tenant.0
    );
    row.fetch_optional(db).await?.map(Command::from).ok_or(Error::NoSuchCommand(id))
}

/// At most `limit` commands of a device, the newest first, beginning behind `before`; with `state`, only those in it.
pub async fn page(
    db: &mut PgConnection,
    device: DeviceKey,
    state: Option<State>,
    before: Option<CommandId>,
    limit: i64,
) -> Result<Vec<Command>> {
    let rows = sqlx::query_as!(
        Row,
        r#"
        select c.id as "id: CommandId", d.id as "device: DeviceId", c.device_key as "device_key: DeviceKey", c.name, c.params, c.state,
               c.deadline, c.progress, c.result, c.error, c.steps, c.created_by, c.created_at, c.updated_at
          from command c join device d on d.key = c.device_key
         where c.device_key = $1 and ($2::uuid is null or c.id < $2) and ($3::text is null or c.state = $3)
         order by c.id desc
         limit $4
        "#,
        device.0,
        before as Option<CommandId>,
        state.map(State::name),
        limit.clamp(1, MAX_PAGE + 1)
    );
    Ok(rows.fetch_all(db).await?.into_iter().map(Command::from).collect())
}

/// Takes a command back: as it was, and as it is. A device that has it already may do it all the same. To be called in a transaction.
pub async fn cancel(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: CommandId,
    by: &str,
    now: DateTime<Utc>,
) -> Result<(Command, Command)> {
    let before = find(db, tenant, id).await?;
    let cancelled = sqlx::query!(
        "
        update command set state = 'cancelled', updated_at = $2, steps = steps || $3::jsonb
         where id = $1 and state in ('queued', 'sent', 'delivered', 'in_progress')
        ",
        id as CommandId,
        now,
        json!([step(Some(State::Cancelled), now, &json!({ "by": by }))])
    );
    if cancelled.execute(&mut *db).await?.rows_affected() == 0 {
        return Err(Error::CommandFinished(id));
    }
    Ok((before, find(db, tenant, id).await?))
}
