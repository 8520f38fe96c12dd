//! Hierarchical attention: coarsen, attend per level, merge.
//!
//! Far keys are seen through summaries, the farther the coarser, so that every pair of positions counts and the time
//! grows linearly. Each level is a call of the softmax engine of attn-flash.
//!
//! - [`HTransformer`]: H-Transformer-1D, blocks of doubling resolution on both sides of the query (or before it).
//! - `coarsen`, `upsample`: the two operators all level schemes share.

mod coarsen;
mod h_transformer;
mod registry;
mod upsample;

pub use h_transformer::HTransformer;
pub use registry::registry;
