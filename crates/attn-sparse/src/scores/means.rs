//! Means of blocks of rows, and how alike the rows of a block are.
//!
//! ```text
//! mean_b = 1/c sum_{i in b} x_i        similarity_b = 1/c^2 sum_{i, j in b} cos(x_i, x_j) = |1/c sum_{i in b} x_i / |x_i||^2
//! ```
//!
//! with `c` the rows of the block; the last one may have fewer. A row of zeros has cosine 0 with all.

use super::HeadRows;
use attn_core::TensorView;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};

/// Means of all blocks of all heads.
#[derive(Debug)]
pub(crate) struct BlockMeans {
    /// `[batch * heads, blocks, width]`.
    means: Vec<f32>,
    /// `[batch * heads, blocks]`.
    similarity: Vec<f32>,
    n_blocks: usize,
    width: usize,
}

impl BlockMeans {
    /// Means over `block` rows of `tensor [batch, heads, n, width]`. Time and memory `O(n)` and `O(n / block)`.
    pub(crate) fn of(isa: Isa, tensor: &TensorView<'_>, block: usize) -> Self {
        let [batch, heads, n, width] = tensor.shape();
        let n_blocks = n.div_ceil(block);
        let mut means = vec![0.0; batch * heads * n_blocks * width];
        let mut similarity = vec![0.0; batch * heads * n_blocks];
        let outputs = means.chunks_exact_mut(width.max(1)).zip(&mut similarity);
        for_each_task(
            outputs.enumerate(),
            || vec![0.0; width],
            |row, (at, (mean, similarity))| {
                let (list, first) = (at / n_blocks, at % n_blocks * block);
                let rows = HeadRows::of(tensor, list / heads, list % heads);
                let end = (first + block).min(n);
                *similarity = isa.run(Block { rows, range: first..end, row, mean });
            },
        );
        Self { means, similarity, n_blocks, width }
    }

    /// The means of a head, `[blocks, width]`.
    pub(crate) fn head(&self, list: usize) -> &[f32] {
        &self.means[list * self.n_blocks * self.width..][..self.n_blocks * self.width]
    }

    /// The similarity of each block of a head, at most 1.
    pub(crate) fn similarity(&self, list: usize) -> &[f32] {
        &self.similarity[list * self.n_blocks..][..self.n_blocks]
    }

    pub(crate) fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }
}

/// One block.
struct Block<'a, 'o> {
    rows: HeadRows<'a>,
    range: std::ops::Range<usize>,
    /// `[width]`, scratch.
    row: &'o mut [f32],
    mean: &'o mut [f32],
}

impl SimdOp for Block<'_, '_> {
    /// The similarity.
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let Self { rows, range, row, mean } = self;
        let count = range.len();
        let mut units = vec![0.0f32; row.len()];
        mean.fill(0.0);
        for i in range {
            rows.read(simd, i..i + 1, row);
            let mut squares = [0.0f32; 16];
            for (c, x) in row.iter().enumerate() {
                squares[c % 16] += x * x;
            }
            let norm = squares.iter().sum::<f32>().sqrt();
            let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            for ((mean, unit), x) in mean.iter_mut().zip(&mut units).zip(row.iter()) {
                *mean += x;
                *unit += inverse * x;
            }
        }
        let share = 1.0 / count as f32;
        mean.iter_mut().for_each(|mean| *mean *= share);
        let sum = units.iter().map(|unit| f64::from(*unit) * f64::from(*unit)).sum::<f64>();
        // A rounding must not make a block more than alike; NaN stays.
        let similarity = (sum / (count * count) as f64) as f32;
        if similarity > 1.0 { 1.0 } else { similarity }
    }
}
