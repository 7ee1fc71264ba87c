//! A device: enrol, find, list, change, delete.
