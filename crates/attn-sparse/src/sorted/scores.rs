//! Rows times a matrix: what hashing and routing spend their time on.

use super::rows::{BLOCK, gather};
use attn_core::TensorView;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};
use rayon::prelude::*;

/// `C [m, n] = A [m, k] B [k, n]`, all row-major, or with `A` stored as `[k, m]`.
pub(super) struct Product<'a> {
    pub(super) sizes: [usize; 3],
    pub(super) a: &'a [f32],
    pub(super) a_transposed: bool,
    pub(super) b: &'a [f32],
    pub(super) c: &'a mut [f32],
    pub(super) start: Start,
}

impl<'a> Product<'a> {
    /// `C = A B`, row-major.
    pub(super) fn new(sizes: [usize; 3], a: &'a [f32], b: &'a [f32], c: &'a mut [f32]) -> Self {
        Self { sizes, a, a_transposed: false, b, c, start: Start::Zero }
    }
}

impl SimdOp for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let [m, n, k] = self.sizes;
        let (row_stride, col_stride) = if self.a_transposed { (1, m) } else { (k, 1) };
        let a = Lhs { data: self.a, row_stride, col_stride };
        let (b, c) = (Rhs { data: self.b, stride: n }, TileMut { data: self.c, stride: n });
        product(simd, self.sizes, a, b, c, self.start);
    }
}

/// All rows of a head as f32, `[n, width]`.
pub(super) fn head_rows(from: &TensorView<'_>, at: [usize; 2]) -> Vec<f32> {
    let [_, _, n, width] = from.shape();
    let mut rows = vec![0.0; n * width];
    gather(from, at, &mut rows, Some);
    rows
}

/// Calls `read(row, scores, numbers)` with the scores `x_row . columns` of every row of a head; `out [n, per_row]` is handed
/// out row by row.
pub(super) fn for_each_row<T: Send>(
    from: &TensorView<'_>,
    at: [usize; 2],
    columns: &[f32],
    out: &mut [T],
    per_row: usize,
    read: impl Fn(&[f32], &mut [T]) + Sync,
) {
    let width = from.shape()[3];
    let n_columns = columns.len() / width;
    if n_columns == 0 || per_row == 0 {
        return;
    }
    let (rows, isa) = (head_rows(from, at), Isa::current());
    let blocks = out.par_chunks_mut(BLOCK * per_row).zip(rows.par_chunks(BLOCK * width));
    blocks.for_each_init(Vec::new, |scores, (out, rows)| {
        let n_rows = rows.len() / width;
        scores.resize(n_rows * n_columns, 0.0);
        isa.run(Product::new([n_rows, n_columns, width], rows, columns, scores));
        let each = scores.chunks_exact(n_columns).zip(out.chunks_exact_mut(per_row));
        each.for_each(|(scores, out)| read(scores, out));
    });
}
