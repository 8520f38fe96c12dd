//! Who sees whom, and which tiles are empty, partial or full.
//!
//! A mask answers three questions about query row `i` and key row `j` (indices in the given tensors):
//! [`Mask::sees`] defines it, pair by pair; [`Mask::spans`] bounds the keys that a block of queries can see, so
//! that an engine never visits the rest; [`Mask::cover`] tells tiles that are seen completely, which pay
//! nothing. The last two are optimisations and must agree with the first: `attn-testkit` checks it.
//!
//! | mask | query `i` at position `p = i + offset` sees key `j` iff |
//! |---|---|
//! | [`SeeAll`] | always |
//! | [`Band`], [`BandPerBatch`] | `p - left <= j <= p + right` (causal, sliding window), one offset or one a batch entry |
//! | [`PrefixLm`] | `j <= p` or `j < prefix` |
//! | [`KeysBelow`], [`KeyLengths`] | `j < len`, one length or one a batch entry |
//! | [`Documents`], [`Spans`] | both carry the same id (not negative, for spans) |
//! | [`DenseMask`] | a boolean tensor says so |
//! | [`Predicate`] | the user's closure says so |
//!
//! Masks compose: [`And`], [`Or`], and an `Option` that hides nothing when it is `None`.

mod band;
mod broadcast;
mod compose;
mod dense;
mod documents;
mod keys;
mod per_batch;
mod prefix_lm;
mod segments;
#[cfg(test)]
mod tests;

pub use band::{Align, Band, BandPerBatch};
pub(crate) use broadcast::{broadcast_strides, check_fits};
pub use compose::{And, Or};
pub use dense::DenseMask;
pub use documents::{Documents, Spans};
pub use keys::{KeyLengths, KeysBelow};
pub(crate) use per_batch::PerBatch;
pub use prefix_lm::PrefixLm;

use crate::{AttnShape, Result};
use std::ops::Range;

/// A query row and a key row of one query head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query row.
    pub i: usize,
    /// Key row.
    pub j: usize,
}

/// Which head a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
}

impl Head {
    /// The pair `(i, j)` of this head.
    #[inline(always)]
    pub fn pair(self, i: usize, j: usize) -> Pair {
        Pair { batch: self.batch, head: self.head, i, j }
    }
}

/// How much of a tile (query rows x key rows) is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cover {
    /// No pair: the tile is skipped.
    Empty,
    /// Some pairs, or not known: each pair is asked.
    Partial,
    /// Every pair: the tile runs without any mask.
    Full,
}

/// Visibility of keys to queries.
pub trait Mask: Sync {
    /// Checks that the mask serves a problem of this shape: engines ask before anything else. A mask without tensors
    /// serves all.
    ///
    /// # Errors
    /// [`crate::AttnError`] naming the tensor that was made for another shape.
    fn check(&self, shape: &AttnShape) -> Result<()> {
        let _ = shape;
        Ok(())
    }

    /// Whether the query sees the key: the definition.
    fn sees(&self, pair: Pair) -> bool;

    /// Sorted, disjoint, non-empty ranges that contain every key any of the query `rows` sees.
    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let _ = (head, rows);
        non_empty(0..n_kv)
    }

    /// What part of `rows` x `keys` is seen; `Partial` is always a correct answer. Both ranges are non-empty.
    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let _ = (head, rows, keys);
        Cover::Partial
    }

    /// Sets the scores of the `rows` that do not see key `j` to -inf; `scores[r]` is that of row `rows.start + r`.
    #[inline(always)]
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        if let Ok(lanes) = <&mut [f32; 32]>::try_from(&mut *scores)
            && rows.len() == 32
        {
            // On a copy and of known length: only so does the compiler use vectors.
            let mut hidden = *lanes;
            for (lane, score) in hidden.iter_mut().enumerate() {
                let seen = self.sees(head.pair(rows.start + lane, j));
                *score = if seen { *score } else { f32::NEG_INFINITY };
            }
            *lanes = hidden;
            return;
        }
        for (i, score) in rows.zip(scores) {
            if !self.sees(head.pair(i, j)) {
                *score = f32::NEG_INFINITY;
            }
        }
    }

    /// [`Mask::hide`] for several keys: the scores of key `j` start at `scores[(j - keys.start) * stride]`.
    #[inline(always)]
    fn hide_tile(
        &self,
        head: Head,
        rows: Range<usize>,
        keys: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        for (at, j) in keys.enumerate() {
            self.hide(head, rows.clone(), j, &mut scores[at * stride..][..rows.len()]);
        }
    }

    /// Whether each of `rows` sees every key of their [`Mask::spans`]: then nobody asks for covers. `false` is always a
    /// correct answer.
    fn sees_spans(&self, head: Head, rows: Range<usize>) -> bool {
        let _ = (head, rows);
        false
    }

    /// Whether all these query heads of a batch entry see the same: then one is asked for all. `false` is always a correct
    /// answer.
    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        let _ = batch;
        heads.len() <= 1
    }
}

impl<M: Mask + ?Sized> Mask for &M {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        (**self).check(shape)
    }

    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        (**self).sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        (**self).spans(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        (**self).cover(head, rows, keys)
    }

    #[inline(always)]
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        (**self).hide(head, rows, j, scores);
    }

    #[inline(always)]
    fn hide_tile(
        &self,
        head: Head,
        rows: Range<usize>,
        keys: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        (**self).hide_tile(head, rows, keys, scores, stride);
    }

    fn sees_spans(&self, head: Head, rows: Range<usize>) -> bool {
        (**self).sees_spans(head, rows)
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        (**self).is_shared_by(batch, heads)
    }
}

/// `None` hides nothing.
impl<M: Mask> Mask for Option<M> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.as_ref().map_or(Ok(()), |mask| mask.check(shape))
    }

    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.as_ref().is_none_or(|mask| mask.sees(pair))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        match self {
            Some(mask) => mask.spans(head, rows, n_kv),
            None => non_empty(0..n_kv),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.as_ref().map_or(Cover::Full, |mask| mask.cover(head, rows, keys))
    }

    #[inline(always)]
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        if let Some(mask) = self {
            mask.hide(head, rows, j, scores);
        }
    }

    fn sees_spans(&self, head: Head, rows: Range<usize>) -> bool {
        self.as_ref().is_none_or(|mask| mask.sees_spans(head, rows))
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        self.as_ref().is_none_or(|mask| mask.is_shared_by(batch, heads))
    }
}

fn non_empty(range: Range<usize>) -> Vec<Range<usize>> {
    if range.is_empty() { Vec::new() } else { vec![range] }
}

/// Sorts ranges and joins those that touch, overlap or lie at most `gap` apart.
fn joined(mut ranges: Vec<Range<usize>>, gap: usize) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|r| r.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for next in ranges {
        match merged.last_mut() {
            Some(last) if next.start <= last.end.saturating_add(gap) => last.end = last.end.max(next.end),
            _ => merged.push(next),
        }
    }
    merged
}

/// Every query sees every key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SeeAll;

impl Mask for SeeAll {
    #[inline(always)]
    fn sees(&self, _: Pair) -> bool {
        true
    }

    fn cover(&self, _: Head, _: Range<usize>, _: Range<usize>) -> Cover {
        Cover::Full
    }

    fn sees_spans(&self, _: Head, _: Range<usize>) -> bool {
        true
    }

    fn is_shared_by(&self, _: usize, _: Range<usize>) -> bool {
        true
    }
}

/// A closure `pair -> visible`, compiled into the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Predicate<F>(pub F);

impl<F: Fn(Pair) -> bool + Sync> Mask for Predicate<F> {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        (self.0)(pair)
    }
}
