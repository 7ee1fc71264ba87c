//! Telemetry: what devices say about themselves.
