//! Block masks from a user's predicate, and block masks as deciders.

use super::{BlockMask, BlockSizes, Builder};
use crate::pairs::{Alike, count_pairs};
use crate::{Decider, Decision, Promises, Work};
use attn_core::mask::{Mask, Pair, Predicate};
use attn_core::{AttnShape, Causality, Growth, Qkv, Result};
use std::sync::Arc;

impl BlockMask {
    /// The blocks in which `sees` is true for some pair; every pair is asked once here, and those of partial blocks again in
    /// each call. Time `O(batch * n_heads_q * n_q * n_kv)`: for masks that follow from the shape, a
    /// [`Pattern`](crate::Pattern) is cheaper.
    ///
    /// ```
    /// use attn_core::AttnShape;
    /// use attn_sparse::{BlockMask, BlockSizes, SparseAttention};
    ///
    /// // Causal, and every 16th key for all: the predicate is compiled to lists of blocks, which are then attended.
    /// let shape = AttnShape::square(1, 256, 32);
    /// let mask = BlockMask::from_predicate(&shape, BlockSizes::square(64), |p| p.j <= p.i || p.j % 16 == 0)?;
    /// assert_eq!((mask.n_blocks(), mask.sizes().q), (16, 64));
    /// let attention = SparseAttention::new(mask);
    /// # let _ = attention;
    /// # Ok::<(), attn_core::AttnError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Builder::from_inside`].
    pub fn from_predicate(
        shape: &AttnShape,
        sizes: BlockSizes,
        sees: impl Fn(Pair) -> bool + Send + Sync + 'static,
    ) -> Result<Self> {
        let inside = Arc::new(Predicate(sees));
        Builder::new(shape, sizes).per_batch().per_head(shape.n_heads_q.max(1)).inside(inside).from_inside()
    }
}

/// The same pairs in every call, for problems of the shape it was made for.
impl Decider for BlockMask {
    const NAME: &'static str = "block-mask";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.check(&x.shape())?;
        Ok(self.clone().into())
    }

    /// Nothing is known of what it leaves out.
    fn promises(&self) -> Promises {
        Promises {
            causality: Causality::Bidirectional,
            key_order_free: false,
            cross_lengths: true,
            time: Growth::Quadratic,
            memory: Growth::Quadratic,
            kept: None,
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let alike = Alike { batch: self.batch() == 1, heads: self.heads() == 1 };
        let lists = self.n_blocks() * (size_of::<u32>() + size_of::<bool>());
        let pairs = if self.check(shape).is_ok() { count_pairs(self, shape, alike) } else { 0 };
        Work { pairs, decision_bytes: lists as u64, ..Work::default() }
    }
}
