//! Proptest strategies, oracle comparison, golden files, gradient checks and the conformance suite for attention variants.
//!
//! - [`compare`]: whether numbers agree, and where they do not; [`tolerance`]: how much error is allowed.
//! - [`golden`]: cases computed by other people's code, from files.

pub mod compare;
pub mod golden;
pub mod tolerance;
