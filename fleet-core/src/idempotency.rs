//! Answers kept for a day, so that a creating POST sent twice creates once.
