//! Prefixes of the key axis.

use super::per_batch::PerBatch;
use super::{Cover, Head, Mask, Pair, non_empty};
use crate::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Keys `j < len` are seen by everybody: attention sinks in front, or padding at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeysBelow(pub usize);

impl Mask for KeysBelow {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        p.j < self.0
    }

    fn spans(&self, _: Head, _: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        non_empty(0..self.0.min(n_kv))
    }

    fn cover(&self, _: Head, _: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.end <= self.0 {
            Cover::Full
        } else if keys.start >= self.0 {
            Cover::Empty
        } else {
            Cover::Partial
        }
    }

    fn sees_spans(&self, _: Head, _: Range<usize>) -> bool {
        true
    }

    fn is_shared_by(&self, _: usize, _: Range<usize>) -> bool {
        true
    }
}

/// Keys `j < len` of each batch entry are seen: padding at the end of sequences of different lengths.
///
/// Rows past a sequence's own length are computed like others.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Head, KeyLengths, Mask};
///
/// let shape = AttnShape { batch: 2, ..AttnShape::square(1, 5, 8) };
/// let padding = KeyLengths::new(vec![5, 3], &shape)?;
/// assert!(!padding.sees(Head { batch: 1, head: 0 }.pair(0, 3)));
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyLengths(PerBatch<usize>);

impl KeyLengths {
    /// `lens`: one a batch entry or one for all, each at most `n_kv`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for another number of lengths; [`AttnError::Value`] for one beyond `n_kv`.
    pub fn new(lens: Vec<usize>, shape: &AttnShape) -> Result<Self> {
        if let Some((batch, len)) = lens.iter().enumerate().find(|(_, len)| **len > shape.n_kv) {
            let expected = format!("at most n_kv = {}", shape.n_kv);
            return Err(AttnError::value(format!("key_lengths[{batch}]"), len, expected));
        }
        Ok(Self(PerBatch::new("key_lengths", lens, shape)?))
    }
}

impl Mask for KeyLengths {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.0.check("key_lengths", shape)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        p.j < self.0.of(p.batch)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        KeysBelow(self.0.of(head.batch)).spans(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        KeysBelow(self.0.of(head.batch)).cover(head, rows, keys)
    }

    fn is_shared_by(&self, _: usize, _: Range<usize>) -> bool {
        true
    }
}
