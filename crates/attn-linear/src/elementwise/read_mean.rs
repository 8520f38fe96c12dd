//! Queries that gate a row which is the same for all of them.

use super::front::panels;
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::math::sigmoid;
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::MAX_LANES;

/// `o_i = sigmoid(q_i) o m`; the state is `m` and stays as it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadMean {
    pub(crate) width: usize,
}

impl Cell for ReadMean {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width]
    }

    fn out_width(&self) -> usize {
        self.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[1, self.width]]
    }

    fn scratch(&self, _: usize) -> usize {
        self.width.next_multiple_of(MAX_LANES)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        mut out: PanelMut<'_>,
        _: &mut [f32],
    ) {
        for t in 0..piece.len {
            let (q, out) = (piece.inputs[0].row(t), out.row(t));
            for c in (0..out.len()).step_by(S::f32s::LEN) {
                let load = |row: &[f32]| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
                (sigmoid(simd, load(q)) * load(state[0])).store_slice(&mut out[c..c + S::f32s::LEN]);
            }
        }
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
        let [mut sums] = panels(scratch, 1, self.width.next_multiple_of(MAX_LANES));
        let sums = sums.row(0);
        sums.fill(0.0);
        for t in 0..piece.len {
            let (q, dout, dq) = (piece.inputs[0].row(t), grads.out.row(t), grads.inputs[0].row(t));
            for c in (0..sums.len()).step_by(S::f32s::LEN) {
                let load = |row: &[f32]| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
                let s = sigmoid(simd, load(q));
                let by = load(dout) * s;
                by.mul_add(S::f32s::splat(simd, 1.0), load(sums)).store_slice(&mut sums[c..c + S::f32s::LEN]);
                let other = S::f32s::splat(simd, 1.0) - s;
                (by * load(state[0]) * other).store_slice(&mut dq[c..c + S::f32s::LEN]);
            }
        }
        grads.state[0].iter_mut().zip(sums).for_each(|(grad, sum)| *grad += *sum);
    }
}
