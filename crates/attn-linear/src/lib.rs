//! Linear and recurrent attention on few engines.
//!
//! - [`Linear`], [`LinearElu`]: kernelised attention, plain and normalised.
//! - [`RetNet`]: a state that fades at a constant rate a head.
//! - [`Variant`], [`LinearAttention`]: what a variant decides, and what it becomes with that.
//! - [`engine`]: the matrix-state recurrence they are options of: chunked, recurrent, and by definition.
//! - [`feature_map`]: what queries and keys become first.
//!
//! Time is linear in the length; what is remembered of the past has a fixed size.

pub mod engine;
pub mod feature_map;
mod kernelised;
mod linear;
mod linear_elu;
mod registry;
mod retnet;
mod variant;

pub use linear::Linear;
pub use linear_elu::LinearElu;
pub use registry::registry;
pub use retnet::{Gammas, RetNet};
pub use variant::{LinearAttention, Variant};

/// Tokens the chunked form handles at once, unless told otherwise.
pub const CHUNK_LEN: usize = 64;
