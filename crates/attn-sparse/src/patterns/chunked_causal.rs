//! Chunked causal attention: `A(i) = { j <= p : floor(j / chunk_len) = floor(p / chunk_len) }` with
//! `p = i + n_kv - n_q`.
//!
//! Not a sliding window: the first token of a chunk sees only itself. A chunk that covers everything is dense causal
//! attention.
//!
//! Source: the local layers of Llama 4 (Meta, 2025).

use crate::{Pattern, heads};
use attn_core::mask::{Align, And, Band, Cover, Head, Mask, Pair};
use attn_core::{AttnShape, Result};
use std::ops::Range;

/// Keys of the query's own chunk, up to the query. Time `O(n_q * chunk_len)`.
///
/// A stream keeps every position: which keys share a chunk depends on where they stand in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkedCausal {
    /// Positions of a chunk; at least 1.
    pub chunk_len: usize,
}

/// Pairs of one chunk; query `i` stands at `i + offset`, which is not negative where a key could be seen.
#[derive(Debug, Clone, Copy)]
pub struct SameChunk {
    chunk_len: usize,
    offset: isize,
}

impl SameChunk {
    /// Chunks of `chunk_len`, at least 1, for queries that stand at `i + offset`.
    pub(crate) fn new(chunk_len: usize, offset: isize) -> Self {
        Self { chunk_len: chunk_len.max(1), offset }
    }

    fn chunk(&self, i: usize) -> Option<usize> {
        i.checked_add_signed(self.offset).map(|p| p / self.chunk_len)
    }

    /// The keys of query `i`'s chunk; none for a query before the first key.
    fn keys(&self, i: usize) -> Range<usize> {
        self.chunk(i).map_or(0..0, |c| c * self.chunk_len..(c + 1) * self.chunk_len)
    }
}

impl Mask for SameChunk {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.chunk(pair.i) == Some(pair.j / self.chunk_len)
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let (first, last) = (self.keys(rows.start), self.keys(rows.end.saturating_sub(1)));
        let span = first.start.min(n_kv)..last.end.min(n_kv);
        if span.is_empty() { Vec::new() } else { vec![span] }
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (first, last) = (self.keys(rows.start), self.keys(rows.end - 1));
        if keys.end <= first.start || keys.start >= last.end {
            Cover::Empty
        } else if first == last && first.start <= keys.start && keys.end <= first.end {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}

impl Pattern for ChunkedCausal {
    type Mask = And<Band, SameChunk>;

    const NAME: &'static str = "chunked-causal";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let causal = Band::causal(shape, Align::BottomRight);
        Ok(And(causal, SameChunk::new(self.chunk_len, causal.offset)))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        // A query at position p sees p mod chunk_len + 1 keys: sum over the positions before x.
        let c = self.chunk_len.max(1) as u64;
        let before = |x: u64| x / c * (c * (c + 1) / 2) + (x % c) * (x % c + 1) / 2;
        heads(shape) * (before(shape.n_kv as u64) - before(shape.n_kv.saturating_sub(shape.n_q) as u64))
    }

    fn is_causal(&self) -> bool {
        true
    }
}
