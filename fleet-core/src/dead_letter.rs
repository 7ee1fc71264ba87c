//! Payloads that could not be read: acknowledged, so kept, with the reason.
