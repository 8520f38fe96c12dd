//! Products of the backward pass.

use crate::matrix_state::scores::BLOCK;
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product, transpose};
use attn_core::view::Rows;

/// `out [m, n] (+)= a [m, k] b [k, n]`, row-major.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    simd: S,
    [m, n, k]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    start: Start,
) {
    product(
        simd,
        [m, n, k],
        Lhs { data: a, row_stride: k, col_stride: 1 },
        Rhs { data: b, stride: n },
        TileMut { data: out, stride: n },
        start,
    );
}

/// `out [m, n] += a^T b` with `a [k, m]`, `b [k, n]`.
#[inline(always)]
pub(super) fn multiply_turned<S: Simd>(
    simd: S,
    [m, n, k]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
) {
    product(
        simd,
        [m, n, k],
        Lhs { data: a, row_stride: 1, col_stride: m },
        Rhs { data: b, stride: n },
        TileMut { data: out, stride: n },
        Start::Keep,
    );
}

/// A lower triangle `[rows, writes]`, `stride` apart: what stands in row `i` from `seen(i)` on is zero, or beyond the last
/// vector that its block of rows sees and never read. `seen` does not fall.
pub(super) struct Lower<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) seen: &'a dyn Fn(usize) -> usize,
}

impl Lower<'_> {
    /// `out [rows, width] += self values` with `values [writes, width]`.
    #[inline(always)]
    pub(super) fn multiply<S: Simd>(&self, simd: S, values: &[f32], width: usize, out: &mut [f32]) {
        for first in (0..self.rows).step_by(BLOCK) {
            let rows = BLOCK.min(self.rows - first);
            product(
                simd,
                [rows, width, (self.seen)(first + rows - 1)],
                Lhs { data: &self.data[first * self.stride..], row_stride: self.stride, col_stride: 1 },
                Rhs { data: values, stride: width },
                TileMut { data: &mut out[first * width..], stride: width },
                Start::Keep,
            );
        }
    }

    /// `out [writes, width] += self^T x` with `x [rows, width]`.
    #[inline(always)]
    pub(super) fn multiply_turned<S: Simd>(
        &self,
        simd: S,
        writes: usize,
        x: &[f32],
        width: usize,
        out: &mut [f32],
    ) {
        let mut from = 0;
        for first in (0..writes).step_by(BLOCK) {
            while from < self.rows && (self.seen)(from) <= first {
                from += 1;
            }
            if from == self.rows {
                return;
            }
            product(
                simd,
                [BLOCK.min(writes - first), width, self.rows - from],
                Lhs {
                    data: &self.data[from * self.stride + first..],
                    row_stride: 1,
                    col_stride: self.stride,
                },
                Rhs { data: &x[from * width..], stride: width },
                TileMut { data: &mut out[first * width..], stride: width },
                Start::Keep,
            );
        }
    }
}

/// `out [rows, writes]`, `stride` apart, `= left values^T`, zero from `seen` on as [`Lower`] says it.
#[inline(always)]
pub(super) fn score_gradients<S: Simd>(
    simd: S,
    left: &[f32],
    values: &[f32],
    width: usize,
    stride: usize,
    seen: &dyn Fn(usize) -> usize,
    [turned, out]: [&mut Vec<f32>; 2],
) {
    let (rows, writes) = (left.len() / width, values.len() / width);
    turned.resize(width * stride, 0.0);
    transpose(simd, Rows::new(values, writes, width, width), 1.0, turned, stride);
    out.resize(rows * stride, 0.0);
    for first in (0..rows).step_by(BLOCK) {
        let these = first..(first + BLOCK).min(rows);
        let columns = seen(these.end - 1).next_multiple_of(MAX_LANES).min(stride);
        product(
            simd,
            [these.len(), columns, width],
            Lhs { data: &left[first * width..], row_stride: width, col_stride: 1 },
            Rhs { data: turned, stride },
            TileMut { data: &mut out[first * stride..], stride },
            Start::Zero,
        );
        these.for_each(|i| out[i * stride..][seen(i)..columns].fill(0.0));
    }
}

/// The matrix `[rows, width]` transposed, densely.
#[inline(always)]
pub(in crate::matrix_state) fn turn<'a, S: Simd>(
    simd: S,
    matrix: &[f32],
    rows: usize,
    width: usize,
    out: &'a mut Vec<f32>,
) -> &'a [f32] {
    out.resize(rows * width, 0.0);
    transpose(simd, Rows::new(matrix, rows, width, width), 1.0, out, rows);
    out
}
