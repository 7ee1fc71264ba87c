//! Databases for tests: one private PostgreSQL a run, a template database, a clone a test.
