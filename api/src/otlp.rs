//! Logs as OpenTelemetry sends them over HTTP (OTLP 1.x): requests read, answers written, in Protobuf and JSON.
//!
//! Holds: an answer is in the encoding of its request, a refusal too (`google.rpc.Status`); no body takes more memory than its bounds
//! say, compressed or not, and neither does what is read of it ([`size`]). [`record`] says what of a record becomes which part of a line.
//! Ignorant of: who may send, and where lines are kept.

use std::io::Read;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flate2::read::MultiGzDecoder;
use fleet_core::clock::Clock;
use fleet_core::config::{self, Config};
use fleet_core::log::intake::{self, Intake};
use fleet_core::log::{OTLP_WRITER, Rate};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use prometheus::{IntCounter, Registry};
use prost::Message;
use serde_json::json;
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::problem::Problem;

pub(crate) mod record;
pub(crate) mod size;
#[cfg(test)]
mod tests;

/// Where it is sent to.
pub(crate) const PATH: &str = "/v1/logs";

/// The parts of a request in Protobuf may take so many times its largest body in memory: as much as the smallest that say something do.
const GROWTH_OF_PROTOBUF: usize = 8;
/// The same for JSON, where it is told less exactly.
const GROWTH_OF_JSON: usize = 16;

/// What takes the requests.
pub(crate) struct Receiver {
    pub(crate) settings: config::Otlp,
    /// Requests that may be received and read at once.
    pub(crate) reading: Semaphore,
    pub(crate) intake: Intake,
    /// Records of devices that the caller may not write for.
    pub(crate) unknown: IntCounter,
}

impl Receiver {
    pub(crate) fn start(db: &PgPool, clock: &Clock, config: &Config, registry: &Registry) -> prometheus::Result<Self> {
        let metrics = intake::Metrics::register("muster_otlp", registry)?;
        let unknown = IntCounter::new(
            "muster_otlp_records_unknown_total",
            "Log records that name no device that the caller may write for",
        )?;
        registry.register(Box::new(unknown.clone()))?;
        let bounds = intake::Bounds {
            queue_bytes: config.otlp.queue_bytes,
            batch_lines: config.otlp.batch_lines,
            max_ahead_ms: config.ingest.max_ahead_ms,
            suppressed_every: Duration::from_secs(config.ingest.log_suppressed_s),
        };
        let rate = Rate::of(&config.ingest);
        // The task ends with the last clone of the way in: when the server has answered its last request.
        let (intake, _) = Intake::start(OTLP_WRITER, db.clone(), clock.clone(), bounds, rate, metrics);
        let reading = Semaphore::new(config.otlp.max_reading);
        Ok(Self { settings: config.otlp.clone(), reading, intake, unknown })
    }
}

/// How a request is written, and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Protobuf,
    Json,
}

impl Encoding {
    /// Both, by their media types.
    pub(crate) const ALL: [(&'static str, Self); 2] =
        [("application/x-protobuf", Self::Protobuf), ("application/json", Self::Json)];

    /// That of a request; `None` when it is neither.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let given = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
        let essence = given.split(';').next()?.trim();
        Self::ALL.into_iter().find(|(kind, _)| essence.eq_ignore_ascii_case(kind)).map(|(_, encoding)| encoding)
    }

    /// Its media type.
    pub(crate) fn media_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Protobuf => "application/x-protobuf",
            Self::Json => "application/json",
        })
    }

    /// Reads a request that has at most `most` bytes, unless its parts would take many times as much.
    pub(crate) fn read(self, body: &[u8], most: usize) -> Result<ExportLogsServiceRequest, Problem> {
        let fits = match self {
            Self::Protobuf => size::of_protobuf(body, most.saturating_mul(GROWTH_OF_PROTOBUF)).map_err(unreadable)?,
            Self::Json => size::of_json(body, most.saturating_mul(GROWTH_OF_JSON)),
        };
        fits.ok_or_else(|| Problem::new(413, "body-too-large", "the body has too many parts: send less at once"))?;
        match self {
            Self::Protobuf => ExportLogsServiceRequest::decode(body).map_err(unreadable),
            Self::Json => serde_json::from_slice(body).map_err(unreadable),
        }
    }

    /// The answer to a request of which all but `rejected` records are stored.
    pub(crate) fn answer(self, rejected: u64, why: &str) -> Response {
        let rejected = i64::try_from(rejected).unwrap_or(i64::MAX);
        let body = match self {
            Self::Protobuf => {
                let partial =
                    ExportLogsPartialSuccess { rejected_log_records: rejected, error_message: why.to_owned() };
                ExportLogsServiceResponse { partial_success: (rejected > 0).then_some(partial) }.encode_to_vec()
            }
            // 64-bit integers are texts in the JSON of Protobuf.
            Self::Json if rejected > 0 => {
                json!({ "partialSuccess": { "rejectedLogRecords": rejected.to_string(), "errorMessage": why } })
                    .to_string()
                    .into_bytes()
            }
            Self::Json => b"{}".to_vec(),
        };
        ([(header::CONTENT_TYPE, self.media_type())], body).into_response()
    }

    /// A refusal as `google.rpc.Status`.
    pub(crate) fn status(self, status: StatusCode, message: &str) -> Vec<u8> {
        let status = Status { code: code(status), message: message.to_owned() };
        match self {
            Self::Protobuf => status.encode_to_vec(),
            Self::Json => json!({ "code": status.code, "message": status.message }).to_string().into_bytes(),
        }
    }
}

fn unreadable(error: impl std::fmt::Display) -> Problem {
    Problem::new(400, "invalid", format!("expected an ExportLogsServiceRequest: {error}"))
}

/// In which encoding a request wants its answer, when it is one of this protocol.
pub(crate) fn spoken<T>(request: &Request<T>) -> Option<Encoding> {
    (request.uri().path() == PATH).then(|| Encoding::of(request.headers()).unwrap_or(Encoding::Json))
}

/// `google.rpc.Status`, without its details.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Status {
    /// One of `google.rpc.Code`.
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

/// What `google.rpc.Code` calls an HTTP status.
fn code(status: StatusCode) -> i32 {
    match status.as_u16() {
        401 => 16,
        403 => 7,
        404 => 5,
        413 | 429 => 8,
        503 => 14,
        400..=499 => 3,
        _ => 13,
    }
}

/// The body of a request, when it is not compressed or by gzip, and has at most so many bytes.
pub(crate) fn inflated(headers: &HeaderMap, body: Bytes, most: usize) -> Result<Bytes, Problem> {
    let encoding = headers.get(header::CONTENT_ENCODING).map_or("identity", |value| value.to_str().unwrap_or_default());
    match encoding.trim().to_ascii_lowercase().as_str() {
        "identity" | "" => Ok(body),
        "gzip" => {
            let mut inflated = Vec::new();
            let most_and_one = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
            let read = MultiGzDecoder::new(&*body).take(most_and_one).read_to_end(&mut inflated);
            read.map_err(|error| Problem::new(400, "invalid", format!("the body is not gzip: {error}")))?;
            if inflated.len() > most {
                let detail = format!("the body is too large: expected at most {most} bytes when it is not compressed");
                return Err(Problem::new(413, "body-too-large", detail));
            }
            Ok(inflated.into())
        }
        _ => Err(Problem::new(415, "unsupported-media-type", "expected Content-Encoding: gzip, or none")),
    }
}
