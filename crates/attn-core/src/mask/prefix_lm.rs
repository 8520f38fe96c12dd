//! A prefix that reads itself in both directions, then causal text.

use super::band::FAR;
use super::per_batch::PerBatch;
use super::{Align, Cover, Head, Mask, Pair, non_empty};
use crate::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Query `i` at position `p = i + offset` sees keys `j <= p` and keys `j < prefix`.
///
/// Source: Raffel et al. 2020 (prefix language models); Dong et al. 2019 (UniLM).
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Align, Head, Mask, PrefixLm};
///
/// let shape = AttnShape::square(1, 8, 16);
/// let mask = PrefixLm::new(vec![3], &shape, Align::BottomRight)?;
/// assert_eq!(mask.spans(Head { batch: 0, head: 0 }, 0..1, 8), [0..3]);
/// assert_eq!(mask.spans(Head { batch: 0, head: 0 }, 5..6, 8), [0..6]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixLm {
    prefix: PerBatch<usize>,
    offset: isize,
}

impl PrefixLm {
    /// `prefix`: its length, one a batch entry or one for all, each at most `n_kv`; `align` says where query 0 stands.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for another number of lengths; [`AttnError::Value`] for one beyond `n_kv`.
    pub fn new(prefix: Vec<usize>, shape: &AttnShape, align: Align) -> Result<Self> {
        if let Some((batch, len)) = prefix.iter().enumerate().find(|(_, len)| **len > shape.n_kv) {
            let expected = format!("at most n_kv = {}", shape.n_kv);
            return Err(AttnError::value(format!("prefix[{batch}]"), len, expected));
        }
        let prefix = PerBatch::new("prefix", prefix, shape)?;
        Ok(Self { prefix, offset: align.offset(shape.n_q, shape.n_kv).clamp(-FAR, FAR) })
    }

    /// One past the last key that query `i` sees.
    #[inline(always)]
    fn end(&self, batch: usize, i: usize) -> usize {
        let causal_end = (self.offset + i as isize + 1).max(0) as usize;
        causal_end.max(self.prefix.of(batch))
    }
}

impl Mask for PrefixLm {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.prefix.check("prefix", shape)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        p.j < self.end(p.batch, p.i)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        non_empty(0..self.end(head.batch, rows.end - 1).min(n_kv))
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.end <= self.end(head.batch, rows.start) {
            Cover::Full
        } else if keys.start >= self.end(head.batch, rows.end - 1) {
            Cover::Empty
        } else {
            Cover::Partial
        }
    }
}
