//! Local attention in buckets of `w` positions: with `p = i + n_kv - n_q`,
//!
//! ```text
//! A(i) = { j : floor(p / w) - back <= floor(j / w) <= floor(p / w) + forward }        causal: and j <= p
//! ```
//!
//! Unlike a sliding window, the reach varies with the place in the bucket, from `back * w + 1` to `(back + 1) * w`.
//!
//! Source: the local attention of Roy et al. 2021 (Routing Transformer) and of several libraries.

use crate::{Pattern, heads};
use attn_core::mask::{Align, And, Band, Cover, Head, Mask, Pair};
use attn_core::{AttnShape, Result};
use std::ops::Range;

/// The query's own bucket and its neighbours. Time `O(n_q * (back + 1 + forward) * bucket)`.
///
/// A stream keeps every position: which keys share a bucket depends on where they stand in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalBuckets {
    /// Positions of a bucket; 0 counts as 1.
    pub bucket: usize,
    /// Buckets seen before the query's own.
    pub back: usize,
    /// Buckets seen behind it.
    pub forward: usize,
    /// No key after the query's position.
    pub causal: bool,
}

/// The pairs of neighbouring buckets; query `i` stands at `i + offset`.
#[derive(Debug, Clone, Copy)]
pub struct Buckets {
    bucket: usize,
    back: usize,
    forward: usize,
    offset: isize,
}

impl Buckets {
    /// The keys of query `i`, of which there may be fewer.
    fn keys(&self, i: usize) -> Range<usize> {
        let own = (i as isize + self.offset).div_euclid(self.bucket as isize);
        let first = own.saturating_sub_unsigned(self.back).max(0) as usize;
        let end = own.saturating_add_unsigned(self.forward).saturating_add(1).max(0) as usize;
        first.saturating_mul(self.bucket)..end.saturating_mul(self.bucket)
    }
}

impl Mask for Buckets {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.keys(pair.i).contains(&pair.j)
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let (first, last) = (self.keys(rows.start), self.keys(rows.end - 1));
        let span = first.start.min(n_kv)..last.end.min(n_kv);
        if span.is_empty() { Vec::new() } else { vec![span] }
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (first, last) = (self.keys(rows.start), self.keys(rows.end - 1));
        if keys.end <= first.start || keys.start >= last.end {
            Cover::Empty
        } else if last.start <= keys.start && keys.end <= first.end {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}

impl LocalBuckets {
    fn buckets(&self, shape: &AttnShape) -> Buckets {
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        Buckets { bucket: self.bucket.max(1), back: self.back, forward: self.forward, offset }
    }
}

impl Pattern for LocalBuckets {
    type Mask = And<Band, Buckets>;

    const NAME: &'static str = "local-buckets";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let band = Band { right: self.causal.then_some(0), ..Band::causal(shape, Align::BottomRight) };
        Ok(And(band, self.buckets(shape)))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let buckets = self.buckets(shape);
        let (mut i, mut pairs) = (0, 0u64);
        while i < shape.n_q {
            // Queries up to the end of a bucket see from the same first key on.
            let position = i as isize + buckets.offset;
            let rest = buckets.bucket - position.rem_euclid(buckets.bucket as isize) as usize;
            let rows = rest.min(shape.n_q - i);
            let keys = buckets.keys(i);
            let (first, end) = (keys.start.min(shape.n_kv) as u64, keys.end.min(shape.n_kv) as u64);
            let rows_u64 = rows as u64;
            pairs += match (self.causal, usize::try_from(position)) {
                (false, _) => rows_u64 * end.saturating_sub(first),
                (true, Err(_)) => 0,
                // Positions p to p + rows - 1 see p - first + 1 keys and so on.
                (true, Ok(p)) => rows_u64 * (p as u64 + 1 - first) + rows_u64 * (rows_u64 - 1) / 2,
            };
            i += rows;
        }
        heads(shape) * pairs
    }

    fn is_causal(&self) -> bool {
        self.causal
    }
}
