//! What search promises.
