//! The newest value of each metric, and the gaps in sequence numbers: in memory, flushed once a second.
