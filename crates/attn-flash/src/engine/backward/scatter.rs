//! What the pairs of rows that stand apart give to their keys.

use attn_core::OutRows;
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdOp};
use std::ops::Range;

/// Some rows of a head and their pairs.
#[derive(Default)]
pub(super) struct Pairs {
    /// `[rows, shares + 1]`: where the pairs of a row with the keys of each share start, and where the last ones end.
    pub(super) bounds: Vec<usize>,
    pub(super) keys: Vec<u32>,
    pub(super) weights: Vec<f32>,
    /// Gradients of the scaled dot products, times the scale.
    pub(super) grads: Vec<f32>,
    /// Gradients of the scores, for the key bias; empty if nobody asks.
    pub(super) sums: Vec<f32>,
    /// `[rows, head_dim]` and `[rows, head_dim_v]`.
    pub(super) q: Vec<f32>,
    pub(super) grad_out: Vec<f32>,
}

impl Pairs {
    pub(super) fn clear(&mut self) {
        self.bounds.clear();
        self.keys.clear();
        self.weights.clear();
        self.grads.clear();
        self.sums.clear();
        self.q.clear();
        self.grad_out.clear();
    }
}

/// Gradients of some keys of a head.
pub(super) struct Share<'a> {
    /// Its place among the shares of the sequence.
    pub(super) place: usize,
    pub(super) keys: Range<usize>,
    pub(super) grad_k: Vec<f32>,
    pub(super) grad_v: Vec<f32>,
    pub(super) sums: Vec<f32>,
    pub(super) out_k: OutRows<'a>,
    pub(super) out_v: OutRows<'a>,
}

/// Adds what the pairs of some rows give to the keys of a share, row by row.
pub(super) struct Scatter<'a, 'b> {
    pub(super) share: &'a mut Share<'b>,
    pub(super) pairs: &'a [Pairs],
    pub(super) n_shares: usize,
    pub(super) widths: [usize; 2],
}

impl SimdOp for Scatter<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { share, pairs, n_shares, widths: [d, d_v] } = self;
        let Share { place, keys, grad_k, grad_v, sums, .. } = share;
        for pairs in pairs {
            for (row, bounds) in pairs.bounds.chunks_exact(n_shares + 1).enumerate() {
                let (first, end) = (bounds[*place], bounds[*place + 1]);
                let (q, grad_out) = (&pairs.q[row * d..][..d], &pairs.grad_out[row * d_v..][..d_v]);
                for pair in first..end {
                    let key = pairs.keys[pair] as usize - keys.start;
                    add_scaled(simd, &mut grad_k[key * d..][..d], pairs.grads[pair], q);
                    add_scaled(simd, &mut grad_v[key * d_v..][..d_v], pairs.weights[pair], grad_out);
                    if let Some(sum) = sums.get_mut(key) {
                        *sum += pairs.sums[pair];
                    }
                }
            }
        }
    }
}

/// `sum += factor * row`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, sum: &mut [f32], factor: f32, row: &[f32]) {
    let width = S::f32s::LEN;
    let wide = S::f32s::splat(simd, factor);
    let (mut sums, mut rows) = (sum.chunks_exact_mut(width), row.chunks_exact(width));
    for (sum, row) in (&mut sums).zip(&mut rows) {
        S::f32s::from_slice(simd, row).mul_add(wide, S::f32s::from_slice(simd, sum)).store_slice(sum);
    }
    for (sum, x) in sums.into_remainder().iter_mut().zip(rows.remainder()) {
        *sum += factor * x;
    }
}
