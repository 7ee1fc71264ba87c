//! Access tokens: signed here, verified at both doors.
