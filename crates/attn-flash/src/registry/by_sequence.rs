//! Masks and score mods that differ by sequence: offsets follow from each sequence's own lengths.

use crate::engine::Problem;
use attn_core::mask::{Align, Cover, Head, Mask, Pair};
use attn_core::score::{BiasIndex, ScoreMod};
use attn_core::{AttnShape, Result};
use std::ops::Range;

/// One for each sequence; masks and score mods see the number of a sequence as `batch`.
#[derive(Debug, Clone)]
pub(super) struct BySequence<T>(Vec<T>);

impl<T> BySequence<T> {
    /// `make` gets each sequence's sizes (with `batch` the number of sequences) and the position of its query 0 on the key
    /// axis.
    ///
    /// # Errors
    /// Those of `make`.
    pub(super) fn new(
        problem: &Problem<'_>,
        align: Align,
        make: impl Fn(&AttnShape, isize) -> Result<T>,
    ) -> Result<Self> {
        let sequences = 0..problem.n_sequences();
        let all = sequences.map(|s| {
            let (n_q, n_kv) = (problem.q_range(s).len(), problem.kv_range(s).len());
            let shape = AttnShape { batch: problem.n_sequences(), n_q, n_kv, ..problem.shape() };
            make(&shape, align.offset(n_q, n_kv))
        });
        Ok(Self(all.collect::<Result<_>>()?))
    }
}

impl<M: Mask> Mask for BySequence<M> {
    fn sees(&self, pair: Pair) -> bool {
        self.0[pair.batch].sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        self.0[head.batch].spans(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.0[head.batch].cover(head, rows, keys)
    }
}

impl<C: ScoreMod> ScoreMod for BySequence<C> {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.0[at.batch].apply(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.0[at.batch].apply_f64(score, at)
    }

    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.0[at.batch].derivative(score, at)
    }

    fn has_derivative(&self) -> bool {
        self.0.iter().all(ScoreMod::has_derivative)
    }
}

impl<C: BiasIndex> BiasIndex for BySequence<C> {
    fn len(&self) -> usize {
        self.0.first().map_or(0, BiasIndex::len)
    }

    fn index(&self, at: Pair) -> usize {
        self.0[at.batch].index(at)
    }
}
