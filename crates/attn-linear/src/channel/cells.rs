//! The two passes over tokens: products of channels, and weights applied to channels.

use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product, transpose};
use attn_core::view::Rows;

fn pad(width: usize) -> usize {
    width.next_multiple_of(MAX_LANES)
}

/// Sums over tokens of `q k^T`, `q^2` and `k^2`; reads `q, k`, and has no output of its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gram {
    pub(super) width: usize,
}

impl Cell for Gram {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width; 2]
    }

    fn out_width(&self) -> usize {
        1
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.width, self.width], [1, self.width], [1, self.width]]
    }

    fn scratch(&self, _: usize) -> usize {
        self.width * pad(self.width)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        _: PanelMut<'_>,
        _: &mut [f32],
    ) {
        let (width, [q, k]) = (self.width, [piece.inputs[0], piece.inputs[1]]);
        product(
            simd,
            [width, width, piece.len],
            Lhs { data: q.data, row_stride: 1, col_stride: q.stride },
            Rhs { data: k.data, stride: k.stride },
            TileMut { data: &mut *state[0], stride: pad(width) },
            Start::Keep,
        );
        for t in 0..piece.len {
            state[1].iter_mut().zip(q.row(t)).for_each(|(sum, q)| *sum += q * q);
            state[2].iter_mut().zip(k.row(t)).for_each(|(sum, k)| *sum += k * k);
        }
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        _: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        let (len, width) = (piece.len, self.width);
        let ([by, by_qq, by_kk], [dq, dk]) = (grads.state, grads.inputs) else { return };
        transpose(simd, Rows::new(by, width, width, pad(width)), 1.0, scratch, pad(width));
        let (q, k) = (piece.inputs[0], piece.inputs[1]);
        for (x, matrix, to) in [(k, &*scratch, &mut *dq), (q, &**by, &mut *dk)] {
            product(
                simd,
                [len, width, width],
                Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
                Rhs { data: matrix, stride: pad(width) },
                TileMut { data: &mut *to.data, stride: to.stride },
                Start::Zero,
            );
        }
        for t in 0..len {
            for (x, by, to) in [(q, &**by_qq, &mut *dq), (k, &**by_kk, &mut *dk)] {
                let rows = to.row(t).iter_mut().zip(x.row(t)).zip(by);
                rows.take(width).for_each(|((dx, x), by)| *dx += 2.0 * x * by);
            }
        }
    }
}

/// `o_t = v_t M`; the state is `M` and stays as it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Apply {
    pub(super) width: usize,
}

impl Cell for Apply {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width]
    }

    fn out_width(&self) -> usize {
        self.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.width, self.width]]
    }

    fn scratch(&self, _: usize) -> usize {
        self.width * pad(self.width)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        _: &mut [f32],
    ) {
        let v = piece.inputs[0];
        product(
            simd,
            [piece.len, self.width, self.width],
            Lhs { data: v.data, row_stride: v.stride, col_stride: 1 },
            Rhs { data: state[0], stride: pad(self.width) },
            TileMut { data: out.data, stride: out.stride },
            Start::Zero,
        );
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        let (len, width, v) = (piece.len, self.width, piece.inputs[0]);
        transpose(simd, Rows::new(state[0], width, width, pad(width)), 1.0, scratch, pad(width));
        let out = grads.out;
        product(
            simd,
            [len, width, width],
            Lhs { data: out.data, row_stride: out.stride, col_stride: 1 },
            Rhs { data: scratch, stride: pad(width) },
            TileMut { data: &mut *grads.inputs[0].data, stride: pad(width) },
            Start::Zero,
        );
        product(
            simd,
            [width, width, len],
            Lhs { data: v.data, row_stride: 1, col_stride: v.stride },
            Rhs { data: out.data, stride: out.stride },
            TileMut { data: &mut *grads.state[0], stride: pad(width) },
            Start::Keep,
        );
    }
}
