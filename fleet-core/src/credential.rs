//! A device's tokens: issue, rotate with overlap, revoke, verify.
