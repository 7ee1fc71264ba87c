//! People: passwords and logging in.
