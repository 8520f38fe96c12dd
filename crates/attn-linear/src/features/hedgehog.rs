//! The learned map of Hedgehog.
//!
//! ```text
//! y = W x + b      phi = softmax([f y, -f y]),  f = 2
//! ```
//!
//! with maps of their own for queries and keys. Source: Zhang, Bhatia, Kumbong, Ré 2024 (The Hedgehog and the Porcupine); the
//! paper has `f = 1`, flash-linear-attention 2.

use super::maps::{Place, Side, softmax, softmax_back, softmax64};
use crate::scan::cell::{Panel, PanelMut};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product};

/// One linear map each for queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    query: Linear,
    key: Linear,
    factor: f32,
}

#[derive(Debug, Clone, PartialEq)]
struct Linear {
    /// `W [features, width]` and its transpose.
    weight: Vec<f32>,
    transposed: Vec<f32>,
    /// `[features]`.
    bias: Vec<f32>,
}

impl Layer {
    /// `(W [features, width], b [features])` of queries and of keys.
    pub(super) fn new(query: (&[f32], &[f32]), key: (&[f32], &[f32]), width: usize, factor: f32) -> Self {
        let linear = |(weight, bias): (&[f32], &[f32])| Linear {
            weight: weight.to_vec(),
            transposed: crate::named::transpose(weight, bias.len(), width),
            bias: bias.to_vec(),
        };
        Self { query: linear(query), key: linear(key), factor }
    }

    /// The identity, for rows of `width`: what training starts with.
    pub(super) fn identity(width: usize, factor: f32) -> Self {
        let weight: Vec<f32> = (0..width * width).map(|at| f32::from(at / width == at % width)).collect();
        let bias = vec![0.0; width];
        Self::new((&weight, &bias), (&weight, &bias), width, factor)
    }

    /// Rows of `W`.
    pub fn features(&self) -> usize {
        self.query.bias.len()
    }

    /// Width of the rows mapped.
    pub fn width(&self) -> usize {
        self.query.weight.len() / self.features().max(1)
    }

    /// `W` and `b` of one side.
    pub(super) fn params(&self) -> usize {
        self.query.weight.len() + self.query.bias.len()
    }

    fn of(&self, side: Side) -> &Linear {
        if side == Side::Query { &self.query } else { &self.key }
    }

    fn stride(&self) -> usize {
        (2 * self.features()).next_multiple_of(MAX_LANES)
    }

    pub(super) fn scratch(&self, _: usize, len: usize) -> usize {
        len * self.stride() + self.stride()
    }

    #[inline(always)]
    pub(super) fn apply<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        out: &mut PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (linear, stride, n) = (self.of(at.side), self.stride(), self.features());
        for row in scratch.chunks_exact_mut(stride).take(at.len) {
            row[..n].copy_from_slice(&linear.bias);
        }
        product(
            simd,
            [at.len, n, width],
            Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
            Rhs { data: &linear.transposed, stride: n },
            TileMut { data: &mut *scratch, stride },
            Start::Keep,
        );
        for (t, row) in scratch.chunks_exact_mut(stride).take(at.len).enumerate() {
            let (plus, minus) = row.split_at_mut(n);
            for (plus, minus) in plus.iter_mut().zip(minus) {
                *plus *= self.factor;
                *minus = -*plus;
            }
            softmax(simd, row, 2 * n, out.row(t));
        }
    }

    #[inline(always)]
    pub(super) fn back<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        (phi, by): (Panel<'_>, Panel<'_>),
        out: &mut PanelMut<'_>,
        (params, scratch): (&mut [f32], &mut [f32]),
    ) {
        let (linear, stride, n) = (self.of(at.side), self.stride(), self.features());
        let (dy, row) = scratch.split_at_mut(at.len * stride);
        for (t, dy) in dy.chunks_exact_mut(stride).enumerate() {
            let row = &mut row[..2 * n];
            softmax_back(phi.row(t), by.row(t), row);
            let (plus, minus) = row.split_at(n);
            dy.iter_mut().zip(plus.iter().zip(minus)).for_each(|(d, (p, m))| *d = self.factor * (p - m));
        }
        product(
            simd,
            [at.len, width, n],
            Lhs { data: dy, row_stride: stride, col_stride: 1 },
            Rhs { data: &linear.weight, stride: width },
            TileMut { data: &mut *out.data, stride: out.stride },
            Start::Zero,
        );
        let (dw, db) = params.split_at_mut(n * width);
        product(
            simd,
            [n, width, at.len],
            Lhs { data: dy, row_stride: 1, col_stride: stride },
            Rhs { data: x.data, stride: x.stride },
            TileMut { data: dw, stride: width },
            Start::Keep,
        );
        for dy in dy.chunks_exact(stride) {
            db.iter_mut().zip(dy).for_each(|(sum, d)| *sum += d);
        }
    }

    pub(super) fn define(&self, at: Place<'_>, x: &[f64]) -> Vec<f64> {
        let linear = self.of(at.side);
        let y: Vec<f64> = linear
            .weight
            .chunks_exact(x.len())
            .zip(&linear.bias)
            .map(|(w, b)| f64::from(*b) + w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>())
            .collect();
        let f = f64::from(self.factor);
        let both: Vec<f64> = y.iter().map(|y| f * y).chain(y.iter().map(|y| -f * y)).collect();
        softmax64(&both)
    }
}
