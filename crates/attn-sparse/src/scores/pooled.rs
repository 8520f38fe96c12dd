//! Scores between blocks: the mean of a block of queries times the means of all blocks of keys.

use super::{BlockMeans, PANEL};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};

/// The means of the keys of one head, turned: a column a block.
#[derive(Debug)]
pub(crate) struct Turned {
    /// `[width, stride]`.
    data: Vec<f32>,
    stride: usize,
    width: usize,
}

impl Turned {
    pub(crate) fn of(means: &BlockMeans, list: usize) -> Self {
        let (n, width) = (means.n_blocks(), means.width());
        // An odd number of cache lines: rows a power of two apart would share the same few places of the caches.
        let stride = (n.div_ceil(16) | 1) * 16;
        let mut data = vec![0.0; width * stride];
        for (block, mean) in means.head(list).chunks_exact(width.max(1)).enumerate() {
            mean.iter().enumerate().for_each(|(c, x)| data[c * stride + block] = *x);
        }
        Self { data, stride, width }
    }
}

/// `scores = queries keys` for up to [`PANEL`] blocks of queries, `[rows, visible]`.
pub(crate) struct Pooled<'a> {
    /// Means of blocks of queries, `[rows, width]`.
    queries: &'a [f32],
    keys: &'a Turned,
    /// Blocks of keys that are scored, from the first on.
    visible: usize,
    /// `[rows, visible]`.
    scores: &'a mut [f32],
}

impl SimdOp for Pooled<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { queries, keys, visible, scores } = self;
        let rows = queries.len() / keys.width.max(1);
        let a = Lhs { data: queries, row_stride: keys.width, col_stride: 1 };
        let b = Rhs { data: &keys.data, stride: keys.stride };
        let c = TileMut { data: scores, stride: visible };
        product(simd, [rows, visible, keys.width], a, b, c, Start::Zero);
    }
}

/// The kernel for the blocks of queries `queries [rows, width]`, at most [`PANEL`], against the first `visible` blocks of
/// keys; `scores` becomes `[rows, visible]`.
pub(crate) fn pooled_rows<'a>(
    queries: &'a [f32],
    keys: &'a Turned,
    visible: usize,
    scores: &'a mut Vec<f32>,
) -> Pooled<'a> {
    let rows = queries.len() / keys.width.max(1);
    debug_assert!(rows <= PANEL);
    scores.clear();
    scores.resize(rows * visible, 0.0);
    Pooled { queries, keys, visible, scores }
}
