//! Attention with linear biases.

use super::distance::Distance;
use super::{ScoreMod, ScoreTile};
use crate::mask::{Head, Pair, PerBatch, check_fits};
use crate::{AttnError, AttnShape, Result};

/// Attention with linear biases: `s - slope_h * |i + offset - j|`, nearer keys first on both sides.
///
/// Source: Press, Smith, Lewis, 2021.
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    slopes: Vec<f32>,
    /// `n_heads_q`, or 0 if all batch entries share the slopes.
    batch_stride: usize,
    distances: PerBatch<Distance>,
}

impl Alibi {
    /// `slopes [n_heads_q]` or `[batch, n_heads_q]`; `offset` is the position of query 0 on the key axis.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for another number of slopes; [`AttnError::Value`] for distances beyond 2^29.
    pub fn new(slopes: Vec<f32>, shape: &AttnShape, offset: isize) -> Result<Self> {
        Self::with_offsets(slopes, shape, &[offset])
    }

    /// [`Alibi::new`] with the position of query 0 for each batch entry, or one for all: packed sequences and caches of
    /// different lengths. `shape` then has the longest of both lengths.
    ///
    /// ```
    /// use attn_core::AttnShape;
    /// use attn_core::mask::Pair;
    /// use attn_core::score::{Alibi, ScoreMod};
    ///
    /// // One new token each; the first sequence has 4 keys, the second 6: the last query stands at the last key.
    /// let shape = AttnShape { batch: 2, n_q: 1, n_kv: 6, ..AttnShape::square(1, 1, 8) };
    /// let alibi = Alibi::with_offsets(vec![0.5], &shape, &[3, 5])?;
    /// let at = |batch, j| alibi.apply(0.0, Pair { batch, head: 0, i: 0, j });
    /// assert_eq!([at(0, 3), at(0, 0), at(1, 5), at(1, 0)], [0.0, -1.5, 0.0, -2.5]);
    /// # Ok::<(), attn_core::AttnError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Alibi::new`]; [`AttnError::Shape`] for another number of offsets.
    pub fn with_offsets(slopes: Vec<f32>, shape: &AttnShape, offsets: &[isize]) -> Result<Self> {
        let heads = shape.n_heads_q;
        let shared = slopes.len() == heads;
        if !shared && Some(slopes.len()) != heads.checked_mul(shape.batch) {
            let expected = format!("{heads}, or {heads} for each of {} batch entries", shape.batch);
            return Err(AttnError::shape("alibi_slopes", "n_heads_q", slopes.len(), expected));
        }
        let distances = offsets.iter().map(|offset| Distance::new(shape, *offset)).collect::<Result<_>>()?;
        let batch_stride = if shared { 0 } else { heads };
        Ok(Self { slopes, batch_stride, distances: PerBatch::new("offsets", distances, shape)? })
    }

    /// The paper's slopes: a geometric sequence for powers of two, else that of the power below followed by
    /// every other slope of the power above.
    pub fn default_slopes(n_heads: usize) -> Vec<f32> {
        let geometric = |n: usize| (1..=n).map(move |h| (-8.0 * h as f32 / n as f32).exp2());
        if n_heads == 0 {
            return Vec::new();
        }
        let below = 1 << n_heads.ilog2();
        geometric(below).chain(geometric(2 * below).step_by(2)).take(n_heads).collect()
    }

    #[inline(always)]
    fn line(&self, Head { batch, head }: Head) -> Line {
        Line { slope: self.slopes[batch * self.batch_stride + head], distance: self.distances.of(batch) }
    }

    #[inline(always)]
    fn line_of(&self, at: Pair) -> Line {
        self.line(Head { batch: at.batch, head: at.head })
    }
}

/// The biases of one head.
#[derive(Clone, Copy)]
struct Line {
    slope: f32,
    distance: Distance,
}

impl Line {
    #[inline(always)]
    fn apply(self, score: f32, at: Pair) -> f32 {
        score - self.slope * self.distance.of(at).abs() as f32
    }
}

impl ScoreMod for Alibi {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.distances.check("offsets", shape)?;
        check_fits("alibi_slopes", self.slopes.len(), &[self.batch_stride, 1, 0, 0], shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.line_of(at).apply(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        let Line { slope, distance } = self.line_of(at);
        score - f64::from(slope) * f64::from(distance.of(at).abs())
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }

    /// Slope and offset are read once for the tile.
    #[inline(always)]
    fn apply_tile(&self, tile: ScoreTile<'_>) {
        let ScoreTile { head, rows, keys, scores, stride } = tile;
        let line = self.line(head);
        for (j, row) in keys.zip(scores.chunks_mut(stride)) {
            if let (Ok(lanes), 32) = (<&mut [f32; 32]>::try_from(&mut *row), rows.len()) {
                // On a copy and of known length: only so does the compiler use vectors.
                let mut new = *lanes;
                for (lane, score) in new.iter_mut().enumerate() {
                    *score = line.apply(*score, head.pair(rows.start + lane, j));
                }
                *lanes = new;
            } else {
                for (score, i) in row.iter_mut().zip(rows.clone()) {
                    *score = line.apply(*score, head.pair(i, j));
                }
            }
        }
    }
}
