//! Proptest strategies, oracle comparison, golden files, gradient checks and the conformance suite for attention variants.
//!
//! - [`conformance`]: holds a variant to everything it promises, in one line: `conformance::check(&entry)`.
//! - [`compare`]: whether numbers agree, and where they do not; [`tolerance`]: how much error is allowed.
//! - [`inputs`]: seeded problems in every storage order and type, shapes at the edges, proptest strategies.
//! - [`masks`]: whether the shortcuts of a mask agree with its definition.
//! - [`gradient`]: claimed gradients against finite differences.
//! - [`golden`]: cases computed by other people's code, from files.

pub mod compare;
pub mod conformance;
pub mod golden;
pub mod gradient;
pub mod inputs;
pub mod masks;
pub mod tolerance;
