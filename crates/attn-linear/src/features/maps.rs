//! Feature maps: rows of queries or keys to rows of features, forwards and backwards.
//!
//! | map | features of a row `x` of width `d` | width |
//! |---|---|---|
//! | [`Map::Relu`] | `max(x, 0)` | `d` |
//! | [`Map::EluPlusOne`] | `x + 1` above 0, `e^x` below | `d` |
//! | [`Map::Exp`] | `e^(x - m)`, `m` the largest of all keys of a channel where it is known | `d` |
//! | [`Map::Softmax`] | `e^x_c / sum e^x` | `d` |
//! | [`Map::Cosine`] | `max(x, 0)` times cosine, then sine, of the position | `2 d` |
//! | [`Map::Taylor`], [`Map::Quadratic`] | see [`Products`] | `1 + d + d (d + 1) / 2`, `d (d + 1) / 2` |
//! | [`Map::Favor`], [`Map::Fourier`] | see [`Random`] | the number of features |
//! | [`Map::Hedgehog`] | see [`Hedgehog`](super::hedgehog) | twice the layer's width |

use super::hedgehog::Layer;
use super::products::Products;
use super::random::Random;
use crate::scan::cell::{Panel, PanelMut};
use crate::scan::math::exp;
use attn_core::simd::{Select, Simd, SimdBase};
use std::sync::Arc;

/// Whose rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Those of queries.
    Query,
    /// Those of keys.
    Key,
}

/// Which rows.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Of queries or of keys.
    pub side: Side,
    /// Head.
    pub head: usize,
    /// Position of the first row.
    pub first: usize,
    /// Rows.
    pub len: usize,
    /// What exponents are lowered by, one for all features or one a feature; empty for 0.
    pub shift: &'a [f32],
}

/// A feature map.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the table above")]
pub enum Map {
    Relu,
    EluPlusOne,
    Exp,
    Softmax,
    /// With the length `m` of the half turn.
    Cosine(usize),
    Taylor(Products),
    Quadratic(Products),
    Favor(Arc<Random>),
    Fourier(Arc<Random>),
    Hedgehog(Arc<Layer>),
}

impl Map {
    /// Width of the features of rows of `width`.
    pub fn width(&self, width: usize) -> usize {
        match self {
            Self::Relu | Self::EluPlusOne | Self::Exp | Self::Softmax => width,
            Self::Cosine(_) => 2 * width,
            Self::Taylor(_) => 1 + width + width * (width + 1) / 2,
            Self::Quadratic(_) => width * (width + 1) / 2,
            Self::Favor(random) => random.features(),
            Self::Fourier(random) => 2 * random.features(),
            Self::Hedgehog(layer) => 2 * layer.features(),
        }
    }

    /// Floats of the gradient by what is learned.
    pub fn params(&self, width: usize) -> usize {
        match self {
            Self::Quadratic(_) => 2 * width,
            Self::Hedgehog(layer) => layer.params(),
            _ => 0,
        }
    }

    /// Floats of scratch for `len` rows.
    pub(crate) fn scratch(&self, width: usize, len: usize) -> usize {
        match self {
            Self::Quadratic(_) => 2 * len * width,
            Self::Favor(random) | Self::Fourier(random) => random.scratch(width, len),
            Self::Hedgehog(layer) => layer.scratch(width, len),
            _ => 0,
        }
    }

    /// Writes the features of `x [len, width]`.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        // Built once per instruction set, not once per caller.
        simd.vectorize(
            #[inline(always)]
            || self.apply_here(simd, at, (x, width), out, scratch),
        );
    }

    #[inline(always)]
    fn apply_here<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        mut out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        match self {
            Self::Relu => each(simd, at, x, out, |x, _| x.max(S::f32s::splat(simd, 0.0))),
            Self::EluPlusOne => each(simd, at, x, out, |x, _| {
                let zero = S::f32s::splat(simd, 0.0);
                let above = x.simd_gt(zero);
                above.select(x + 1.0, exp(simd, above.select(zero, x)))
            }),
            Self::Exp => each(simd, at, x, out, |x, shift| exp(simd, x - shift)),
            Self::Softmax => {
                (0..at.len).for_each(|t| softmax(simd, x.row(t), width, out.row(t)));
            }
            Self::Cosine(m) => {
                for t in 0..at.len {
                    let (cos, sin) = turn(at.first + t, *m);
                    let (first, second) = out.row(t).split_at_mut(width);
                    for ((x, c), s) in x.row(t)[..width].iter().zip(first).zip(second) {
                        (*c, *s) = (x.max(0.0) * cos, x.max(0.0) * sin);
                    }
                }
            }
            Self::Taylor(products) | Self::Quadratic(products) => {
                products.apply(at, (x, width), &mut out, scratch);
            }
            Self::Favor(random) => random.favor(simd, at, (x, width), &mut out, scratch),
            Self::Fourier(random) => random.fourier(simd, at, (x, width), &mut out, scratch),
            Self::Hedgehog(layer) => layer.apply(simd, at, (x, width), &mut out, scratch),
        }
    }

    /// Gradients by `x`, given the features `phi` and the gradient by them; adds to `params`.
    #[inline(always)]
    pub(crate) fn back<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        (phi, by): (Panel<'_>, Panel<'_>),
        out: PanelMut<'_>,
        (params, scratch): (&mut [f32], &mut [f32]),
    ) {
        // Built once per instruction set, not once per caller.
        simd.vectorize(
            #[inline(always)]
            || self.back_here(simd, at, (x, width), (phi, by), out, (params, scratch)),
        );
    }

    #[inline(always)]
    fn back_here<S: Simd>(
        &self,
        simd: S,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        (phi, by): (Panel<'_>, Panel<'_>),
        mut out: PanelMut<'_>,
        (params, scratch): (&mut [f32], &mut [f32]),
    ) {
        match self {
            Self::Relu | Self::EluPlusOne | Self::Exp => {
                for t in 0..at.len {
                    let rows = x.row(t).iter().zip(phi.row(t)).zip(by.row(t)).zip(out.row(t));
                    for (((x, phi), by), dx) in rows.take(width) {
                        let slope = match self {
                            Self::Relu => f32::from(*x > 0.0),
                            Self::EluPlusOne if *x > 0.0 => 1.0,
                            _ => *phi,
                        };
                        *dx = by * slope;
                    }
                }
            }
            Self::Softmax => {
                for t in 0..at.len {
                    softmax_back(phi.row(t), by.row(t), &mut out.row(t)[..width]);
                }
            }
            Self::Cosine(m) => {
                for t in 0..at.len {
                    let (cos, sin) = turn(at.first + t, *m);
                    let (first, second) = by.row(t).split_at(width);
                    for (((x, c), s), dx) in x.row(t).iter().zip(first).zip(second).zip(out.row(t)) {
                        *dx = if *x > 0.0 { c * cos + s * sin } else { 0.0 };
                    }
                }
            }
            Self::Taylor(products) | Self::Quadratic(products) => {
                products.back(at, (x, width), by, &mut out, (params, scratch));
            }
            Self::Favor(random) => random.favor_back(simd, at, (x, width), (phi, by), &mut out, scratch),
            Self::Fourier(random) => random.fourier_back(simd, at, (x, width), (phi, by), &mut out, scratch),
            Self::Hedgehog(layer) => layer.back(simd, at, (x, width), (phi, by), &mut out, (params, scratch)),
        }
    }

    /// What keys' exponents are lowered by, by definition: the largest of `keys [n, width]`.
    pub(super) fn define_shift(&self, head: usize, keys: &[f64], width: usize) -> Vec<f32> {
        let largest = |all: &mut dyn Iterator<Item = f64>| all.fold(f64::NEG_INFINITY, f64::max) as f32;
        match self {
            _ if keys.is_empty() => Vec::new(),
            Self::Favor(random) => {
                let rows = keys.chunks_exact(width);
                vec![largest(&mut rows.flat_map(|row| random.project64(head, row)))]
            }
            Self::Exp => {
                (0..width).map(|c| largest(&mut keys.iter().skip(c).step_by(width).copied())).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The definition, for row `at.first` in f64.
    pub fn define(&self, at: Place<'_>, x: &[f64]) -> Vec<f64> {
        let shift = |c: usize| at.shift.get(c).or(at.shift.first()).map_or(0.0, |m| f64::from(*m));
        match self {
            Self::Relu => x.iter().map(|x| x.max(0.0)).collect(),
            Self::EluPlusOne => x.iter().map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() }).collect(),
            Self::Exp => x.iter().enumerate().map(|(c, x)| (x - shift(c)).exp()).collect(),
            Self::Softmax => softmax64(x),
            Self::Cosine(m) => {
                let angle = std::f64::consts::FRAC_PI_2 * (at.first + 1) as f64 / (*m).max(1) as f64;
                let part = |by: f64| x.iter().map(move |x| x.max(0.0) * by);
                part(angle.cos()).chain(part(angle.sin())).collect()
            }
            Self::Taylor(products) | Self::Quadratic(products) => products.define(at, x),
            Self::Favor(random) => random.define_favor(at, x, shift(0)),
            Self::Fourier(random) => random.define_fourier(at, x),
            Self::Hedgehog(layer) => layer.define(at, x),
        }
    }
}

/// `f(x, shift)` of every number, whole vectors.
#[inline(always)]
fn each<S: Simd>(
    simd: S,
    at: Place<'_>,
    x: Panel<'_>,
    mut out: PanelMut<'_>,
    f: impl Fn(S::f32s, S::f32s) -> S::f32s,
) {
    for t in 0..at.len {
        let (x, out) = (x.row(t), out.row(t));
        for c in (0..out.len().min(x.len())).step_by(S::f32s::LEN) {
            let shift = match at.shift {
                [] => S::f32s::splat(simd, 0.0),
                [one] => S::f32s::splat(simd, *one),
                all => S::f32s::from_slice(simd, &all[c..c + S::f32s::LEN]),
            };
            f(S::f32s::from_slice(simd, &x[c..c + S::f32s::LEN]), shift)
                .store_slice(&mut out[c..c + S::f32s::LEN]);
        }
    }
}

/// Cosine and sine at position `i`, counted from 1 on: `pi i / 2 m`.
fn turn(i: usize, m: usize) -> (f32, f32) {
    let angle = std::f64::consts::FRAC_PI_2 * (i + 1) as f64 / m.max(1) as f64;
    (angle.cos() as f32, angle.sin() as f32)
}

/// Softmax of the first `width` numbers; both rows are whole vectors.
#[inline(always)]
pub(super) fn softmax<S: Simd>(simd: S, x: &[f32], width: usize, out: &mut [f32]) {
    // `f32::max` passes over NaN, which comes back through its exponential.
    let max = x[..width].iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    for c in (0..width).step_by(S::f32s::LEN) {
        let shifted = S::f32s::from_slice(simd, &x[c..c + S::f32s::LEN]) - max;
        exp(simd, shifted).store_slice(&mut out[c..c + S::f32s::LEN]);
    }
    let sum: f32 = out[..width].iter().sum();
    out[..width].iter_mut().for_each(|x| *x /= sum);
}

/// `dx = phi (dphi - sum phi dphi)`.
#[inline(always)]
pub(super) fn softmax_back(phi: &[f32], by: &[f32], out: &mut [f32]) {
    let mean: f32 = phi.iter().zip(by).take(out.len()).map(|(p, b)| p * b).sum();
    out.iter_mut().zip(phi.iter().zip(by)).for_each(|(dx, (p, b))| *dx = p * (b - mean));
}

pub(super) fn softmax64(x: &[f64]) -> Vec<f64> {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
    let all: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = all.iter().sum();
    all.iter().map(|x| x / sum).collect()
}
