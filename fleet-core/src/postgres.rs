//! The embedded PostgreSQL: a private cluster in the data directory, started, healed and stopped without hands.
