//! Memories that are read as they were before the present segment of tokens, and written once at its end.
//!
//! - [`TttLinear`]: a linear model trained on each mini-batch by one step of gradient descent.
//! - [`Infini`]: the compressive memory of Infini-attention.

pub mod infini;
mod registry;
pub mod ttt;

pub use infini::{Infini, InfiniGrads};
pub(crate) use registry::entries;
pub use ttt::{TttGrads, TttInputs, TttLinear};
