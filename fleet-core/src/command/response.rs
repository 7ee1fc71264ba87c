//! What devices say of their commands.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::steps::overtaken;
use super::{MAX_STEPS, State, step};
use crate::error::Result;
use crate::id::{CommandId, DeviceKey};
use crate::shadow::has_nul;

/// Of a response that came too late, no more of result and error than so many bytes is kept as evidence.
const MAX_EVIDENCE_BYTES: usize = 1_024;

/// What a device says of a command: `{"status", "progress", "result", "error"}`.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// How far it has come: one of `in_progress`, `succeeded`, `failed`, `rejected`.
    pub state: State,
    /// How much is done, 0 to 100.
    pub progress: Option<f64>,
    /// What came of it.
    pub result: Option<Value>,
    /// What went wrong.
    pub error: Option<Value>,
}

#[derive(Deserialize)]
struct Written {
    status: String,
    progress: Option<f64>,
    result: Option<Value>,
    error: Option<Value>,
}

impl Response {
    /// Reads a response of at most so many bytes; the error says what was expected.
    pub fn decode(payload: &[u8], most: usize) -> std::result::Result<Self, String> {
        if payload.len() > most {
            return Err(format!("{} bytes: expected at most {most}", payload.len()));
        }
        // Serde would take an array for a struct as well, member by member.
        if !payload.trim_ascii_start().starts_with(b"{") {
            return Err("expected a JSON object".into());
        }
        let Written { status, progress, result, error } =
            serde_json::from_slice(payload).map_err(|error| error.to_string())?;
        let said = [State::InProgress, State::Succeeded, State::Failed, State::Rejected];
        let state = said.into_iter().find(|state| state.name() == status);
        let state = state.ok_or("status: expected in_progress, succeeded, failed or rejected")?;
        if progress.is_some_and(|progress| !(0.0..=100.0).contains(&progress)) {
            return Err("progress: expected 0 to 100".into());
        }
        if result.iter().chain(&error).any(has_nul) {
            return Err("expected text without U+0000".into());
        }
        Ok(Self { state, progress, result, error })
    }

    /// What is kept of one that came too late.
    fn evidence(&self) -> Value {
        let short = |value: &Option<Value>| {
            let value = value.as_ref()?;
            let bytes = value.to_string().len();
            Some(if bytes <= MAX_EVIDENCE_BYTES { value.clone() } else { json!({ "bytes": bytes }) })
        };
        json!({ "late": true, "status": self.state.name(), "result": short(&self.result), "error": short(&self.error) })
    }
}

/// What became of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The command is in this state now.
    Taken(State),
    /// The command was in this final state already: the response is kept as evidence.
    Late(State),
    /// It was said before.
    Repeated,
    /// The device has no such command.
    Unknown,
}

/// Takes what a device says of one of its commands. To be called in a transaction.
pub async fn respond(
    db: &mut PgConnection,
    device: DeviceKey,
    id: CommandId,
    response: &Response,
    now: DateTime<Utc>,
) -> Result<Outcome> {
    let row = sqlx::query!(
        "select state, deadline, progress, result, error from command where id = $1 and device_key = $2 for update",
        id as CommandId,
        device.0
    );
    let Some(row) = row.fetch_optional(&mut *db).await? else { return Ok(Outcome::Unknown) };
    let mut state = State::named(&row.state).unwrap_or(State::Queued);
    if !state.is_final() && row.deadline <= now {
        // Nobody was as fast to see it: the device has it, since it answers.
        state = State::TimedOut;
        write(db, id, state, &overtaken(state, now), None, now).await?;
    }
    if state.is_final() {
        if state == response.state && row.result == response.result && row.error == response.error {
            return Ok(Outcome::Repeated);
        }
        keep_late(db, id, response, now).await?;
        return Ok(Outcome::Late(state));
    }
    let is_news = state != response.state;
    let steps =
        if is_news { json!([step(Some(response.state), now, &json!({ "response": true }))]) } else { json!([]) };
    write(db, id, response.state, &steps, Some(response), now).await?;
    Ok(Outcome::Taken(response.state))
}

async fn write(
    db: &mut PgConnection,
    id: CommandId,
    state: State,
    steps: &Value,
    response: Option<&Response>,
    now: DateTime<Utc>,
) -> Result<()> {
    sqlx::query!(
        "
        update command
           set state = $2, updated_at = $3, steps = steps || $4::jsonb, progress = coalesce($5, progress),
               result = coalesce($6, result), error = coalesce($7, error)
         where id = $1
        ",
        id as CommandId,
        state.name(),
        now,
        steps,
        response.and_then(|response| response.progress),
        response.and_then(|response| response.result.clone()),
        response.and_then(|response| response.error.clone())
    )
    .execute(db)
    .await?;
    Ok(())
}

async fn keep_late(db: &mut PgConnection, id: CommandId, response: &Response, now: DateTime<Utc>) -> Result<()> {
    sqlx::query!(
        "update command set steps = steps || $2::jsonb where id = $1 and jsonb_array_length(steps) < $3",
        id as CommandId,
        json!([step(None, now, &response.evidence())]),
        MAX_STEPS
    )
    .execute(db)
    .await?;
    Ok(())
}
