//! The variants of the matrix-state engine ([`crate::matrix_state`]): each a front end, a row of its table, a back end.

mod delta;
mod front;
mod gla;
mod mamba2;
mod simple_gla;

pub use delta::{DeltaNet, DeltaRule, Gate, GatedDeltaNet, Kda};
pub use gla::Gla;
pub use mamba2::Mamba2;
pub use simple_gla::SimpleGla;

use crate::matrix_state::{StateAttention, StateVariant};
use attn_core::Family;
use attn_core::registry::Entry;

/// The registry entry of a variant.
fn entry<V: StateVariant>() -> Entry {
    Entry {
        name: V::NAME,
        family: Family::Linear,
        summary: V::SUMMARY,
        options: V::OPTIONS,
        constructor: |options| Ok(Box::new(StateAttention::new(V::from_options(options)?))),
        runner: |_, options, tensors| StateAttention::new(V::from_options(options)?).run(tensors),
    }
}

/// The variants of this module.
pub(crate) fn entries() -> Vec<Entry> {
    vec![
        entry::<Gla>(),
        entry::<SimpleGla>(),
        entry::<DeltaNet>(),
        entry::<GatedDeltaNet>(),
        entry::<Kda>(),
        entry::<Mamba2>(),
    ]
}
