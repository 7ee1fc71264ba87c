//! Partitions made ahead of time, old days dropped.
