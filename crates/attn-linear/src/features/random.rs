//! Random features.
//!
//! ```text
//! FAVOR+, softmax   x' = d^(-1/4) x      phi = M^(-1/2) (e^(W x' - |x'|^2 / 2 - m) + eps)
//! FAVOR+, ReLU                           phi = relu(W x') + eps
//! Fourier           u = x / |x|          phi = M'^(-1/2) [sin(W_h u d^(-1/4)), cos(W_h u d^(-1/4))]      M' features of either
//! ```
//!
//! `m` is the largest `W x'` of the row for queries, and for keys a constant: the largest of all keys, or 0. It has no gradient.
//!
//! Sources: Choromanski et al. 2021 (Performers), lemma 1 and section 2.4; Peng et al. 2021 (random feature attention).

use super::maps::{Place, Side};
use crate::scan::cell::{Panel, PanelMut};
use crate::scan::math::exp;
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product};

/// A projection, and what FAVOR+ makes of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Random {
    /// `W`, `[heads or 1, features, width]`.
    weight: Vec<f32>,
    /// `W^T`, `[heads or 1, width, features]`.
    transposed: Vec<f32>,
    features: usize,
    width: usize,
    /// ReLU instead of exponentials.
    relu: bool,
    eps: f32,
}

impl Random {
    /// `weight [heads or 1, features, width]`.
    pub(super) fn new(weight: Vec<f32>, features: usize, width: usize, relu: bool, eps: f32) -> Self {
        let transposed = crate::named::transpose(&weight, features, width);
        Self { weight, transposed, features, width, relu, eps }
    }

    /// Rows of `W`.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Width of the rows projected.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Heads with a projection of their own; 1 if all share it.
    pub fn heads(&self) -> usize {
        self.weight.len() / (self.features * self.width).max(1)
    }

    fn stride(&self) -> usize {
        self.features.next_multiple_of(MAX_LANES)
    }

    pub(super) fn scratch(&self, width: usize, len: usize) -> usize {
        len * (width + self.stride())
    }

    fn of_head<'a>(&self, all: &'a [f32], head: usize) -> &'a [f32] {
        let size = self.features * self.width;
        let heads = all.len() / size.max(1);
        &all[if heads > 1 { head % heads * size } else { 0 }..][..size]
    }

    fn root(&self) -> f32 {
        1.0 / (self.width as f32).sqrt().sqrt()
    }

    /// `d^(-1/4) W x`, into a panel.
    #[inline(always)]
    fn project<S: Simd>(&self, simd: S, at: Place<'_>, x: Panel<'_>, out: &mut [f32], stride: usize) {
        product(
            simd,
            [at.len, self.features, self.width],
            Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
            Rhs { data: self.of_head(&self.transposed, at.head), stride: self.features },
            TileMut { data: out, stride },
            Start::Zero,
        );
        let root = self.root();
        for row in out.chunks_exact_mut(stride).take(at.len) {
            row[..self.features].iter_mut().for_each(|x| *x *= root);
        }
    }

    fn shift(at: Place<'_>, row: &[f32]) -> f32 {
        match at.side {
            Side::Query => row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)),
            Side::Key => at.shift.first().copied().unwrap_or(0.0),
        }
    }

    /// The largest `d^(-1/4) W x` of all rows and features.
    #[inline(always)]
    pub(super) fn largest<S: Simd>(&self, simd: S, at: Place<'_>, x: Panel<'_>, scratch: &mut [f32]) -> f32 {
        let stride = self.stride();
        self.project(simd, at, x, scratch, stride);
        let rows = scratch.chunks_exact(stride).take(at.len);
        rows.flat_map(|row| &row[..self.features]).fold(f32::NEG_INFINITY, |m, x| m.max(*x))
    }

    #[inline(always)]
    pub(super) fn favor<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        out: &mut PanelMut<'_>,
        _: &mut [f32],
    ) {
        let stride = out.stride;
        self.project(simd, at, x, out.data, stride);
        let (root, unit) = (self.root(), 1.0 / (self.features as f32).sqrt());
        for t in 0..at.len {
            let row = out.row(t);
            if self.relu {
                row[..self.features].iter_mut().for_each(|x| *x = x.max(0.0) + self.eps);
                continue;
            }
            let norm: f32 = x.row(t)[..width].iter().map(|x| (root * x) * (root * x)).sum();
            let lower = norm / 2.0 + Self::shift(at, &row[..self.features]);
            for c in (0..self.features).step_by(S::f32s::LEN) {
                let x = S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
                ((exp(simd, x - lower) + self.eps) * unit).store_slice(&mut row[c..c + S::f32s::LEN]);
            }
        }
    }

    #[inline(always)]
    pub(super) fn favor_back<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        (phi, by): (Panel<'_>, Panel<'_>),
        out: &mut PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (root, unit) = (self.root(), 1.0 / (self.features as f32).sqrt());
        let stride = self.stride();
        for t in 0..at.len {
            let rows = scratch[t * stride..][..self.features].iter_mut().zip(phi.row(t)).zip(by.row(t));
            // d phi / d(W x') = phi - M^(-1/2) eps; for ReLU 1 where it is positive.
            rows.for_each(|((d, phi), by)| {
                let slope = if self.relu { f32::from(*phi > self.eps) } else { phi - unit * self.eps };
                *d = by * slope;
            });
        }
        product(
            simd,
            [at.len, width, self.features],
            Lhs { data: scratch, row_stride: stride, col_stride: 1 },
            Rhs { data: self.of_head(&self.weight, at.head), stride: width },
            TileMut { data: &mut *out.data, stride: out.stride },
            Start::Zero,
        );
        for t in 0..at.len {
            let sum: f32 = if self.relu { 0.0 } else { scratch[t * stride..][..self.features].iter().sum() };
            let rows = out.row(t).iter_mut().zip(&x.row(t)[..width]);
            rows.for_each(|(dx, x)| *dx = root * *dx - root * root * x * sum);
        }
    }

    /// Rows over their length, into `unit`; a zero row stays.
    #[inline(always)]
    fn unit_rows(at: Place<'_>, x: Panel<'_>, width: usize, unit: &mut [f32]) {
        for (t, unit) in unit.chunks_exact_mut(width).take(at.len).enumerate() {
            let row = &x.row(t)[..width];
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            unit.iter_mut().zip(row).for_each(|(u, x)| *u = x / norm);
        }
    }

    #[inline(always)]
    pub(super) fn fourier<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        out: &mut PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (unit, angles) = scratch.split_at_mut(at.len * width);
        Self::unit_rows(at, x, width, unit);
        let stride = self.stride();
        self.project(simd, at, Panel { data: unit, stride: width }, angles, stride);
        let scale = 1.0 / (self.features as f32).sqrt();
        for (t, angles) in angles.chunks_exact(stride).take(at.len).enumerate() {
            let (sin, cos) = out.row(t).split_at_mut(self.features);
            for ((angle, sin), cos) in angles.iter().zip(sin).zip(cos) {
                (*sin, *cos) = (scale * angle.sin(), scale * angle.cos());
            }
        }
    }

    #[inline(always)]
    pub(super) fn fourier_back<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        (phi, by): (Panel<'_>, Panel<'_>),
        out: &mut PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let stride = self.stride();
        for t in 0..at.len {
            let ((sin, cos), (by_sin, by_cos)) =
                (phi.row(t).split_at(self.features), by.row(t).split_at(self.features));
            let d = &mut scratch[t * stride..][..self.features];
            for (c, d) in d.iter_mut().enumerate() {
                *d = by_sin[c] * cos[c] - by_cos[c] * sin[c];
            }
        }
        product(
            simd,
            [at.len, width, self.features],
            Lhs { data: scratch, row_stride: stride, col_stride: 1 },
            Rhs { data: self.of_head(&self.weight, at.head), stride: width },
            TileMut { data: &mut *out.data, stride: out.stride },
            Start::Zero,
        );
        let root = self.root();
        for t in 0..at.len {
            // u = x / |x|: dx = (du - u (u . du)) / |x|
            let (x, dx) = (&x.row(t)[..width], &mut out.row(t)[..width]);
            let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            let along: f32 = x.iter().zip(&*dx).map(|(x, d)| x / norm * root * d).sum();
            dx.iter_mut().zip(x).for_each(|(d, x)| *d = (root * *d - x / norm * along) / norm);
        }
    }

    pub(super) fn project64(&self, head: usize, x: &[f64]) -> Vec<f64> {
        let rows = self.of_head(&self.weight, head).chunks_exact(self.width);
        let root = (self.width as f64).sqrt().sqrt();
        rows.map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() / root).collect()
    }

    pub(super) fn define_favor(&self, at: Place<'_>, x: &[f64], key_shift: f64) -> Vec<f64> {
        let (projected, eps) = (self.project64(at.head, x), f64::from(self.eps));
        if self.relu {
            return projected.iter().map(|x| x.max(0.0) + eps).collect();
        }
        let norm = x.iter().map(|x| x * x).sum::<f64>() / (self.width as f64).sqrt();
        let largest = projected.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
        let shift = if at.side == Side::Query { largest } else { key_shift };
        let unit = (self.features as f64).sqrt();
        projected.iter().map(|x| ((x - norm / 2.0 - shift).exp() + eps) / unit).collect()
    }

    pub(super) fn define_fourier(&self, at: Place<'_>, x: &[f64]) -> Vec<f64> {
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
        let unit: Vec<f64> = x.iter().map(|x| x / norm).collect();
        let angles = self.project64(at.head, &unit);
        let scale = 1.0 / (self.features as f64).sqrt();
        let (sin, cos) = (angles.iter().map(|a| scale * a.sin()), angles.iter().map(|a| scale * a.cos()));
        sin.chain(cos).collect()
    }
}
