//! Additive biases, and where their gradients belong.

use super::{ScoreMod, ScoreTile};
use crate::mask::{Pair, broadcast_strides, check_fits};
use crate::{AttnShape, Result};

/// A score mod that adds to each score one element of a parameter tensor.
///
/// The gradient of that tensor is a sum over the pairs that read each element: `grad[index(pair)] += ds(pair)`, where `ds` is
/// the gradient of the score after the bias was added.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::Pair;
/// use attn_core::score::{Bias, BiasIndex};
///
/// let shape = AttnShape::square(2, 3, 8);
/// let per_head = Bias::new(&[0.5, -0.5], &[2, 1, 1], &shape)?; // broadcast over queries and keys
/// let mut grad = vec![0.0; per_head.len()];
/// for (i, j) in [(0, 0), (2, 1)] {
///     grad[per_head.index(Pair { batch: 0, head: 1, i, j })] += 1.0;
/// }
/// assert_eq!(grad, [0.0, 2.0]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
pub trait BiasIndex: Sync {
    /// Elements of the parameter tensor, row-major as it was given.
    fn len(&self) -> usize;

    /// True if there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element that this pair's score reads; below [`BiasIndex::len`] for pairs inside the problem.
    fn index(&self, at: Pair) -> usize;
}

impl<T: BiasIndex + ?Sized> BiasIndex for &T {
    fn len(&self) -> usize {
        (**self).len()
    }

    #[inline(always)]
    fn index(&self, at: Pair) -> usize {
        (**self).index(at)
    }
}

/// Adds a dense tensor, broadcast over the axes on which it has length 1.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    bias: &'a [f32],
    strides: [usize; 4],
}

impl<'a> Bias<'a> {
    /// `bias`, row-major, of `bias_shape` with 1 to 4 axes, right-aligned to `(batch, n_heads_q, n_q, n_kv)`.
    ///
    /// # Errors
    /// [`crate::AttnError`] if it does not broadcast to the problem.
    pub fn new(bias: &'a [f32], bias_shape: &[usize], shape: &AttnShape) -> Result<Self> {
        Ok(Self { bias, strides: broadcast_strides("bias", bias.len(), bias_shape, shape)? })
    }

    #[inline(always)]
    fn at(&self, at: Pair) -> f32 {
        self.bias[self.index(at)]
    }
}

impl BiasIndex for Bias<'_> {
    fn len(&self) -> usize {
        self.bias.len()
    }

    #[inline(always)]
    fn index(&self, at: Pair) -> usize {
        let s = &self.strides;
        at.batch * s[0] + at.head * s[1] + at.i * s[2] + at.j * s[3]
    }
}

impl ScoreMod for Bias<'_> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        check_fits("bias", self.bias.len(), &self.strides, shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.at(at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.at(at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }

    /// Rows of the bias lie along the keys, lanes along the rows: read in small squares, so that a cache line is used whole.
    #[inline(always)]
    fn apply_tile(&self, tile: ScoreTile<'_>) {
        const SIDE: usize = 16;
        let ScoreTile { head, rows, keys, scores, stride } = tile;
        let [_, _, step_i, step_j] = self.strides;
        for first_j in keys.clone().step_by(SIDE) {
            for first_i in rows.clone().step_by(SIDE) {
                let (n_i, n_j) = (SIDE.min(rows.end - first_i), SIDE.min(keys.end - first_j));
                let from = &self.bias[self.index(head.pair(first_i, first_j))..];
                let mut square = [[0.0; SIDE]; SIDE];
                for i in 0..n_i {
                    let row = &from[i * step_i..];
                    (0..n_j).for_each(|j| square[j][i] = row[j * step_j]);
                }
                for (j, column) in square[..n_j].iter().enumerate() {
                    let at = (first_j - keys.start + j) * stride + first_i - rows.start;
                    scores[at..at + n_i].iter_mut().zip(column).for_each(|(s, b)| *s += b);
                }
            }
        }
    }
}
