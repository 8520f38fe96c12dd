//! Weights within a piece.

use crate::scan::cell::{Panel, PanelMut};
use crate::scan::gemm::pad;
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, product, transpose};
use attn_core::view::Rows;

/// Sizes of a piece.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    pub(super) len: usize,
    pub(super) features: usize,
    pub(super) columns: usize,
    pub(super) value_dim: usize,
}

impl Chunk {
    /// `p_i . r_j`, `[len, len]`, zero above the diagonal.
    #[inline(always)]
    pub(super) fn weights<S: Simd>(
        &self,
        simd: S,
        (p, r): (Panel<'_>, Panel<'_>),
        turned: &mut [f32],
        out: &mut PanelMut<'_>,
    ) {
        let Self { len, features, .. } = *self;
        transpose(simd, Rows::new(r.data, len, features, r.stride), 1.0, turned, pad(len));
        product(
            simd,
            [len, len, features],
            Lhs { data: p.data, row_stride: p.stride, col_stride: 1 },
            Rhs { data: turned, stride: pad(len) },
            TileMut { data: &mut *out.data, stride: out.stride },
            Start::Zero,
        );
        (0..len).for_each(|t| out.row(t)[t + 1..].fill(0.0));
    }

    /// `N' += A V'`.
    #[inline(always)]
    pub(super) fn mix<S: Simd>(&self, simd: S, (a, v): (Panel<'_>, Panel<'_>), out: &mut PanelMut<'_>) {
        let len = self.len;
        // A weight of 0 times a value of NaN or infinity would leak what an earlier row must not see.
        let finite = (0..len).all(|t| all_finite(&v.row(t)[..self.value_dim]));
        let step = if finite { len } else { 1 };
        for first in (0..len).step_by(step) {
            let keys = if finite { len } else { first + 1 };
            product(
                simd,
                [step, self.columns, keys],
                Lhs { data: &a.data[first * a.stride..], row_stride: a.stride, col_stride: 1 },
                Rhs { data: v.data, stride: v.stride },
                TileMut { data: &mut out.data[first * out.stride..], stride: out.stride },
                Start::Keep,
            );
        }
    }
}
