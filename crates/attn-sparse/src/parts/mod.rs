//! Patterns whose pairs lie together once rows are sorted: attended part by part, each in an order of its own.
//!
//! A tile of 32 queries costs the union of the keys they see. Neighbours in a strided or dilated pattern see disjoint keys, so
//! that in the order of the sequence nearly all of a tile would be hidden; sorted by residue class, the same pairs are a band.
//! A pattern names its [`Part`]s: sets of pairs that do not overlap, each with an order of the queries, one of the keys, and
//! the mask in these orders. Rows are gathered, attended, and put back; rows of several parts are merged through the
//! log-sum-exp:
//!
//! ```text
//! lse_i = ln sum_p e^(lse_p,i)        out_i = sum_p e^(lse_p,i - lse_i) out_p,i
//! ```
//!
//! Backward, each part runs with the merged log-sum-exps and outputs and gives its share of the gradients.
//!
//! Memory: f32 copies of the gathered rows and of the part's results, `O(n (head_dim + head_dim_v))`.

mod attention;
mod backward;
mod classes;
mod forward;
mod order;

use crate::block_mask::SharedMask;
use crate::decider::Pattern;
pub use attention::PartedAttention;
use attn_core::{AttnShape, Result};
pub(crate) use backward::backward;
pub(crate) use classes::{Classes, Heads, OfHeads};
pub(crate) use forward::forward;
pub use order::Order;
use std::fmt;

/// Pairs that are attended in an order of their own.
#[derive(Clone)]
pub struct Part {
    /// Which query rows take part, in which order.
    pub queries: Order,
    /// Which keys, in which order.
    pub keys: Order,
    /// Who sees whom; rows and keys are counted in these orders.
    pub mask: SharedMask,
    /// Which of several projections of the inputs it reads; 0 where there is one.
    pub source: usize,
}

impl Part {
    /// Pairs in the order of the sequence.
    pub fn natural(mask: SharedMask) -> Self {
        Self { queries: Order::natural(), keys: Order::natural(), mask, source: 0 }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Part").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A pattern in parts.
pub trait Parted: Pattern {
    /// Parts without a common pair whose union is [`Pattern::mask`]; none where the order of the sequence is as good.
    ///
    /// # Errors
    /// As [`Pattern::mask`].
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>>;
}
