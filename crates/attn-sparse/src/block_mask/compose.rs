//! Block masks of block masks: what both see, what either sees.
//!
//! Masks of different block sizes meet in blocks of the greatest common divisor of their sizes, so that each of these lies in
//! one block of each mask. A pair of a partial block is asked of both.

use super::{BlockMask, BlockSizes, Builder};
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Result};
use std::ops::Range;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    And,
    Or,
}

/// Decides the pairs of partial blocks.
struct Joined {
    a: BlockMask,
    b: BlockMask,
    op: Op,
}

impl Mask for Joined {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.a.check(shape)?;
        self.b.check(shape)
    }

    fn sees(&self, pair: Pair) -> bool {
        match self.op {
            Op::And => self.a.sees(pair) && self.b.sees(pair),
            Op::Or => self.a.sees(pair) || self.b.sees(pair),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let covers = (self.a.cover(head, rows.clone(), keys.clone()), self.b.cover(head, rows, keys));
        // What decides alone, and what leaves the decision to the other.
        let (decides, leaves) = match self.op {
            Op::And => (Cover::Empty, Cover::Full),
            Op::Or => (Cover::Full, Cover::Empty),
        };
        match covers {
            (a, b) if a == decides || b == decides => decides,
            (a, b) if a == leaves => b,
            (a, b) if b == leaves => a,
            _ => Cover::Partial,
        }
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        self.a.is_shared_by(batch, heads.clone()) && self.b.is_shared_by(batch, heads)
    }
}

impl BlockMask {
    /// The pairs that both masks see.
    ///
    /// Cost: the blocks of the common sizes that both list; those that are partial are asked pair by pair. Block sizes that do
    /// not divide each other make small blocks.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for masks of different problems.
    pub fn and(&self, other: &Self) -> Result<Self> {
        self.join(other, Op::And)
    }

    /// The pairs that either mask sees; cost and errors as [`BlockMask::and`].
    ///
    /// # Errors
    /// As [`BlockMask::and`].
    pub fn or(&self, other: &Self) -> Result<Self> {
        self.join(other, Op::Or)
    }

    fn join(&self, other: &Self, op: Op) -> Result<Self> {
        let (a, b) = (&self.shape, &other.shape);
        let axes = [
            ("batch", a.batch, b.batch),
            ("n_heads_q", a.n_heads_q, b.n_heads_q),
            ("n_q", a.n_q, b.n_q),
            ("n_kv", a.n_kv, b.n_kv),
        ];
        if let Some((axis, expected, found)) = axes.into_iter().find(|(_, a, b)| a != b) {
            return Err(AttnError::shape(
                "other block mask",
                axis,
                found,
                format!("{expected}, as in the first"),
            ));
        }
        let sizes = BlockSizes {
            q: divisor(self.sizes.q, other.sizes.q),
            kv: divisor(self.sizes.kv, other.sizes.kv),
        };
        let heads = self.heads / divisor(self.heads, other.heads) * other.heads;
        let group = self.shape.n_heads_q / heads.max(1);
        let joined = Joined { a: self.clone(), b: other.clone(), op };
        let mut builder = Builder::new(&self.shape, sizes).per_head(heads).inside(Arc::new(joined));
        if self.batch.max(other.batch) > 1 {
            builder = builder.per_batch();
        }
        let mut mask = builder.from_rows(|batch, list, row| {
            let head = Head { batch, head: list * group };
            let [a, b] = [self, other].map(|mask| mask.refined(head, row, sizes));
            match op {
                Op::Or => [a, b].concat(),
                Op::And => {
                    let mut b = b.into_iter().peekable();
                    let meets = |block: &usize| {
                        while b.next_if(|other| other < block).is_some() {}
                        b.peek() == Some(block)
                    };
                    a.into_iter().filter(meets).collect()
                }
            }
        })?;
        if !mask.partial.contains(&true) {
            mask.inside = None;
        }
        Ok(mask)
    }

    /// The listed blocks of a row, cut into blocks of `sizes`, which divide those of the mask.
    fn refined(&self, head: Head, row: usize, sizes: BlockSizes) -> Vec<usize> {
        let n_cols = self.shape.n_kv.div_ceil(sizes.kv);
        let parts = self.sizes.kv / sizes.kv;
        let blocks = self.row(head, row * sizes.q / self.sizes.q);
        blocks.flat_map(|(block, _)| block * parts..n_cols.min((block + 1) * parts)).collect()
    }
}

/// The greatest common divisor of two positive numbers.
fn divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { divisor(b, a % b) }
}
