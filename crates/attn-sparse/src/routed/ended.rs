//! Who sees entries that stand for stretches of keys: entry `c` for keys `c stride .. c stride + len`.

use attn_core::AttnShape;
use attn_core::mask::{Cover, Head, Mask, Pair};
use std::ops::Range;

/// A query sees the entries that end at its position or before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    /// Keys of an entry.
    pub(super) len: usize,
    /// Keys from one entry's start to the next one's.
    pub(super) stride: usize,
    /// Position of query 0.
    pub(super) offset: isize,
}

/// Entries that end within the first `n` keys.
pub(super) fn n_ended(n: usize, len: usize, stride: usize) -> usize {
    if n < len { 0 } else { (n - len) / stride + 1 }
}

impl Ended {
    /// Queries of which the last stands at the last key.
    pub(super) fn of(len: usize, stride: usize, s: &AttnShape) -> Self {
        Self { len, stride, offset: s.n_kv as isize - s.n_q as isize }
    }

    /// Entries that row `i` sees: the first so many.
    pub(super) fn visible(&self, i: usize) -> usize {
        n_ended((self.offset + i as isize + 1).max(0) as usize, self.len, self.stride)
    }
}

impl Mask for Ended {
    fn sees(&self, pair: Pair) -> bool {
        pair.j < self.visible(pair.i)
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let end = if rows.is_empty() { 0 } else { self.visible(rows.end - 1).min(n_kv) };
        if end == 0 { Vec::new() } else { std::iter::once(0..end).collect() }
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.start >= self.visible(rows.end - 1) {
            Cover::Empty
        } else if keys.end <= self.visible(rows.start) {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}
