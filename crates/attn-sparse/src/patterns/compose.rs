//! Patterns made of two: what either sees, what both see.
//!
//! ```
//! use attn_sparse::{ChunkedCausal, SinkWindow, SlidingWindow, SparseAttention, Union};
//!
//! // A window, the first four keys, and the query's own chunk.
//! let pattern = Union(SinkWindow { n_sinks: 4, window: 64 }, ChunkedCausal { chunk_len: 256 });
//! let attention = SparseAttention::new(pattern);
//! # let _ = (attention, SlidingWindow::causal(1));
//! ```

use super::growth::{both_kept, larger};
use crate::Pattern;
use crate::pairs::{Alike, count_pairs};
use attn_core::mask::{And, Or};
use attn_core::{AttnShape, Growth, Result};
use attn_flash::stream::Kept;

/// Counting asks every head and batch entry: either pattern may tell them apart.
const APART: Alike = Alike { batch: false, heads: false };

/// Pairs that either pattern sees, each once. Its [`Pattern::pairs`] are counted, and extrapolated beyond 2^24 pairs a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Union<A, B>(pub A, pub B);

impl<A: Pattern, B: Pattern> Pattern for Union<A, B> {
    type Mask = Or<A::Mask, B::Mask>;

    const NAME: &'static str = "union";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        Ok(Or(self.0.mask(shape)?, self.1.mask(shape)?))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        self.mask(shape).map_or(0, |mask| count_pairs(&mask, shape, APART))
    }

    fn is_causal(&self) -> bool {
        self.0.is_causal() && self.1.is_causal()
    }

    fn kept(&self) -> Option<Kept> {
        both_kept(self.0.kept(), self.1.kept())
    }

    fn cross_lengths(&self) -> bool {
        self.0.cross_lengths() && self.1.cross_lengths()
    }

    fn growth(&self) -> Growth {
        larger(self.0.growth(), self.1.growth())
    }

    fn memory(&self) -> Growth {
        larger(self.0.memory(), self.1.memory())
    }
}

/// Pairs that both patterns see. Its [`Pattern::pairs`] are counted, and extrapolated beyond 2^24 pairs a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intersection<A, B>(pub A, pub B);

impl<A: Pattern, B: Pattern> Pattern for Intersection<A, B> {
    type Mask = And<A::Mask, B::Mask>;

    const NAME: &'static str = "intersection";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        Ok(And(self.0.mask(shape)?, self.1.mask(shape)?))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        self.mask(shape).map_or(0, |mask| count_pairs(&mask, shape, APART))
    }

    fn is_causal(&self) -> bool {
        self.0.is_causal() || self.1.is_causal()
    }

    fn kept(&self) -> Option<Kept> {
        both_kept(self.0.kept(), self.1.kept())
    }

    fn cross_lengths(&self) -> bool {
        self.0.cross_lengths() && self.1.cross_lengths()
    }

    fn growth(&self) -> Growth {
        larger(self.0.growth(), self.1.growth())
    }

    fn memory(&self) -> Growth {
        larger(self.0.memory(), self.1.memory())
    }
}
