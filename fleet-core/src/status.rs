//! The state of a device: online, sleeping, offline or lost, since when and why.
