//! Products of panels.

use crate::scan::cell::{Panel, PanelMut};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product, transpose};
use attn_core::view::Rows;

pub(crate) fn pad(width: usize) -> usize {
    width.next_multiple_of(MAX_LANES)
}

/// `C (+)= X B`, `X [len, k]`, `B [k, n]` in rows of `pad(n)`, `C [len, n]`.
#[inline(always)]
pub(crate) fn rows<S: Simd>(
    simd: S,
    [len, n, k]: [usize; 3],
    x: Panel<'_>,
    b: &[f32],
    c: &mut PanelMut<'_>,
    start: Start,
) {
    product(
        simd,
        [len, n, k],
        Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
        Rhs { data: b, stride: pad(n) },
        TileMut { data: &mut *c.data, stride: c.stride },
        start,
    );
}

/// `C (+)= X^T Y` over `len` rows, `C [m, n]` in rows of `stride`.
#[inline(always)]
pub(crate) fn outer<S: Simd>(
    simd: S,
    [m, n, len]: [usize; 3],
    (x, y): (Panel<'_>, Panel<'_>),
    (c, stride): (&mut [f32], usize),
    start: Start,
) {
    product(
        simd,
        [m, n, len],
        Lhs { data: x.data, row_stride: 1, col_stride: x.stride },
        Rhs { data: y.data, stride: y.stride },
        TileMut { data: c, stride },
        start,
    );
}

/// The transpose of `x [len, width]`, in rows of `pad(len)`.
#[inline(always)]
pub(crate) fn turned<'a, S: Simd>(
    simd: S,
    (data, len, width): (&[f32], usize, usize),
    out: &'a mut [f32],
) -> &'a [f32] {
    transpose(simd, Rows::new(data, len, width, pad(width)), 1.0, out, pad(len));
    out
}
