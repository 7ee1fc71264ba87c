//! Connecting to PostgreSQL, embedded or given, and bringing its schema up to date.
