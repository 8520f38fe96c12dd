//! Diagonal bands: causal attention and sliding windows.

use super::per_batch::PerBatch;
use super::{Cover, Head, Mask, Pair, non_empty};
use crate::{AttnShape, Result};
use std::ops::Range;

/// How causal rows and windows align when `n_q != n_kv`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Align {
    /// The last query stands at the last key, as in decoding and chunked prefill (the default).
    #[default]
    BottomRight,
    /// The first query stands at the first key.
    TopLeft,
    /// Query `i` stands at key `i + offset`.
    Offset(isize),
}

impl Align {
    /// The position of query 0 on the key axis.
    pub fn offset(self, n_q: usize, n_kv: usize) -> isize {
        match self {
            Self::BottomRight => n_kv as isize - n_q as isize,
            Self::TopLeft => 0,
            Self::Offset(offset) => offset,
        }
    }
}

/// Further than any length. Where a row's bounds lie beyond it they count as this much, so that a row's number can be added
/// without overflow; unlike a saturating sum, that costs nothing in a loop over pairs.
pub(super) const FAR: isize = isize::MAX / 8;

/// A diagonal band: query `i` stands at `p = i + offset` and sees `p - left <= j <= p + right`, both ends
/// included; `None` is unbounded. Causal attention is `right = Some(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// Position of query 0 on the key axis.
    pub offset: isize,
    /// Keys seen before the query's position.
    pub left: Option<usize>,
    /// Keys seen after the query's position.
    pub right: Option<usize>,
}

impl Band {
    /// Keys up to the query's own position.
    pub fn causal(shape: &AttnShape, align: Align) -> Self {
        Self { offset: align.offset(shape.n_q, shape.n_kv), left: None, right: Some(0) }
    }

    /// First key that query 0 may see.
    #[inline(always)]
    fn first_of_0(&self) -> Option<isize> {
        self.left.map(|left| self.offset.saturating_sub_unsigned(left).clamp(-FAR, FAR))
    }

    /// Last key that query 0 may see.
    #[inline(always)]
    fn last_of_0(&self) -> Option<isize> {
        self.right.map(|right| self.offset.saturating_add_unsigned(right).clamp(-FAR, FAR))
    }

    /// First key that query `i` may see; may lie before the start of the key axis.
    #[inline(always)]
    fn first(&self, i: usize) -> isize {
        self.first_of_0().map_or(isize::MIN, |first| first + i as isize)
    }

    /// One past the last key that query `i` may see; may lie beyond the end.
    #[inline(always)]
    fn end(&self, i: usize) -> isize {
        self.last_of_0().map_or(isize::MAX, |last| last + i as isize + 1)
    }
}

impl Mask for Band {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let j = p.j as isize;
        self.first(p.i) <= j && j < self.end(p.i)
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let clamp = |x: isize| x.clamp(0, n_kv as isize) as usize;
        non_empty(clamp(self.first(rows.start))..clamp(self.end(rows.end - 1)))
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (first_row, last_row) = (rows.start, rows.end - 1);
        let (first_key, last_key) = (keys.start as isize, keys.end as isize - 1);
        if last_key < self.first(first_row) || first_key >= self.end(last_row) {
            Cover::Empty
        } else if first_key >= self.first(last_row) && last_key < self.end(first_row) {
            Cover::Full
        } else {
            Cover::Partial
        }
    }

    /// The rows that see a key are consecutive: two fills instead of a question a row.
    #[inline(always)]
    fn hide(&self, _: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        // Row i sees j iff j - last_of_0 <= i <= j - first_of_0.
        let row = |i: isize| (i - rows.start as isize).clamp(0, rows.len() as isize) as usize;
        let first = self.last_of_0().map_or(0, |last| row(j as isize - last));
        let end = self.first_of_0().map_or(rows.len(), |first| row(j as isize - first + 1));
        scores[..first].fill(f32::NEG_INFINITY);
        scores[end..rows.len()].fill(f32::NEG_INFINITY);
    }

    fn is_shared_by(&self, _: usize, _: Range<usize>) -> bool {
        true
    }
}

/// A [`Band`] whose offset differs by batch entry: caches that are filled to different lengths, as in ONNX Attention with
/// `nonpad_kv_seqlen` (offset `len - n_q`).
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{BandPerBatch, Head, Mask};
///
/// let shape = AttnShape { batch: 2, n_q: 1, n_kv: 6, ..AttnShape::square(1, 1, 8) };
/// // One new token each; the first cache holds 4 keys, the second 6.
/// let causal = BandPerBatch::new(vec![3, 5], None, Some(0), &shape)?;
/// assert_eq!(causal.spans(Head { batch: 0, head: 0 }, 0..1, 6), [0..4]);
/// assert_eq!(causal.spans(Head { batch: 1, head: 0 }, 0..1, 6), [0..6]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BandPerBatch {
    offsets: PerBatch<isize>,
    left: Option<usize>,
    right: Option<usize>,
}

impl BandPerBatch {
    /// `offsets`: position of query 0 on the key axis, one a batch entry or one for all; `left` and `right` as in [`Band`].
    ///
    /// # Errors
    /// [`crate::AttnError::Shape`] for another number of offsets.
    pub fn new(
        offsets: Vec<isize>,
        left: Option<usize>,
        right: Option<usize>,
        shape: &AttnShape,
    ) -> Result<Self> {
        Ok(Self { offsets: PerBatch::new("offsets", offsets, shape)?, left, right })
    }

    #[inline(always)]
    fn band(&self, batch: usize) -> Band {
        Band { offset: self.offsets.of(batch), left: self.left, right: self.right }
    }
}

impl Mask for BandPerBatch {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.offsets.check("offsets", shape)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        self.band(p.batch).sees(p)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        self.band(head.batch).spans(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.band(head.batch).cover(head, rows, keys)
    }

    #[inline(always)]
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        self.band(head.batch).hide(head, rows, j, scores);
    }

    fn is_shared_by(&self, _: usize, _: Range<usize>) -> bool {
        true
    }
}
