//! Rows that see the rows of their own kind: packed documents, spans of image tokens.

use super::segments::{self, Ids};
use super::{Cover, Head, Mask, Pair};
use crate::{AttnShape, Result};
use std::ops::Range;

/// A query sees the keys of its own document: `id_q[i] == id_kv[j]`.
///
/// Ids may come in any order; where they come in runs (packed sequences), tiles between documents are never visited
/// and tiles inside one pay nothing. Combine with [`super::Band`] for causal text.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Documents, Head, Mask};
///
/// let shape = AttnShape::square(1, 5, 16);
/// let ids = [0, 0, 0, 1, 1];
/// let mask = Documents::new(&ids, &ids, &shape)?;
/// assert_eq!(mask.spans(Head { batch: 0, head: 0 }, 3..5, 5), [3..5]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    q: Ids,
    kv: Ids,
}

impl Documents {
    /// Ids of the query rows, `[n_q]` or `[batch, n_q]`, and of the key rows, `[n_kv]` or `[batch, n_kv]`.
    ///
    /// # Errors
    /// [`crate::AttnError::Shape`] for another number of ids.
    pub fn new(ids_q: &[i32], ids_kv: &[i32], shape: &AttnShape) -> Result<Self> {
        let q = Ids::new("documents_q", "n_q", ids_q, shape.n_q, shape, |_| true)?;
        let kv = Ids::new("documents_kv", "n_kv", ids_kv, shape.n_kv, shape, |_| true)?;
        Ok(Self { q, kv })
    }
}

impl Mask for Documents {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.q.check("documents_q", "n_q", shape.n_q, shape.batch)?;
        self.kv.check("documents_kv", "n_kv", shape.n_kv, shape.batch)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        self.q.at(p.batch, p.i) == self.kv.at(p.batch, p.j)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        segments::spans(&self.q, &self.kv, head.batch, &rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        segments::cover(&self.q, &self.kv, head.batch, &rows, &keys)
    }
}

/// As [`Documents`], but a negative id belongs to no span and sees nothing: bidirectional spans inside causal text,
/// `Or(causal, spans)`, as decoders of text and images use them.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Align, Band, Head, Mask, Or, Spans};
///
/// let shape = AttnShape::square(1, 6, 16);
/// let image = [-1, 7, 7, 7, -1, -1]; // one image of three tokens
/// let mask = Or(Band::causal(&shape, Align::BottomRight), Spans::new(&image, &image, &shape)?);
/// let seen = |i| (0..6).filter(|&j| mask.sees(Head { batch: 0, head: 0 }.pair(i, j))).count();
/// assert_eq!([0, 1, 2, 3, 4, 5].map(seen), [1, 4, 4, 4, 5, 6]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spans {
    q: Ids,
    kv: Ids,
}

impl Spans {
    /// Span ids of the query rows, `[n_q]` or `[batch, n_q]`, and of the key rows, `[n_kv]` or `[batch, n_kv]`.
    ///
    /// # Errors
    /// [`crate::AttnError::Shape`] for another number of ids.
    pub fn new(ids_q: &[i32], ids_kv: &[i32], shape: &AttnShape) -> Result<Self> {
        let q = Ids::new("spans_q", "n_q", ids_q, shape.n_q, shape, |id| id >= 0)?;
        let kv = Ids::new("spans_kv", "n_kv", ids_kv, shape.n_kv, shape, |id| id >= 0)?;
        Ok(Self { q, kv })
    }
}

impl Mask for Spans {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.q.check("spans_q", "n_q", shape.n_q, shape.batch)?;
        self.kv.check("spans_kv", "n_kv", shape.n_kv, shape.batch)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let id = self.q.at(p.batch, p.i);
        id >= 0 && id == self.kv.at(p.batch, p.j)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        segments::spans(&self.q, &self.kv, head.batch, &rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        segments::cover(&self.q, &self.kv, head.batch, &rows, &keys)
    }
}
