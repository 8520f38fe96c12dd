//! Features whose inner product is a polynomial of the rows' inner product `s = x . y / sqrt(d)`.
//!
//! ```text
//! Taylor      1 + s + s^2 / 2      [1, x_i / d^(1/4), x_i x_j / sqrt(2 d)]
//! quadratic   s^2                  [x_i x_j / sqrt(d)], of rows that are normalised first:
//!                                  x <- gamma (x - mean) / sqrt(variance + 1e-5) + beta
//! ```
//!
//! Products `x_i x_j` and `x_j x_i` are one feature `sqrt(2) x_i x_j`: half the width, the same inner product.
//!
//! Sources: Arora et al. 2024 (Based); Aksenov et al. 2024 (ReBased).

use super::maps::{Place, Side};
use crate::scan::cell::{Panel, PanelMut};
use std::f32::consts::SQRT_2;
use std::sync::Arc;

const LAYER_NORM_EPS: f32 = 1e-5;

/// What is done besides multiplying.
#[derive(Debug, Clone)]
pub enum Products {
    /// The constant and the row itself come first.
    Taylor,
    /// Rows are normalised first.
    Normalised(Arc<Affine>),
}

/// What normalised rows are scaled by and moved by, `[width]` each; empty for 1 and 0. The same for queries and keys or not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Affine {
    /// Of queries.
    pub query: (Vec<f32>, Vec<f32>),
    /// Of keys.
    pub key: (Vec<f32>, Vec<f32>),
}

impl Affine {
    fn of(&self, side: Side) -> (&[f32], &[f32]) {
        let (gamma, beta) = if side == Side::Query { &self.query } else { &self.key };
        (gamma, beta)
    }
}

/// A row minus its mean over its deviation, and one over the deviation.
#[inline(always)]
fn normalise(x: &[f32], out: &mut [f32]) -> f32 {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
    let inverse = 1.0 / (variance + LAYER_NORM_EPS).sqrt();
    out.iter_mut().zip(x).for_each(|(o, x)| *o = (x - mean) * inverse);
    inverse
}

impl Products {
    /// What products `x_i x_j`, `i < j`, are multiplied by.
    fn unit(&self, width: usize) -> f32 {
        match self {
            Self::Taylor => 1.0 / (width as f32).sqrt(),
            Self::Normalised(_) => SQRT_2 / (width as f32).sqrt(),
        }
    }

    #[inline(always)]
    pub(super) fn apply(
        &self,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        out: &mut PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let unit = self.unit(width);
        for t in 0..at.len {
            let (mut row, mut out) = (&x.row(t)[..width], out.row(t));
            match self {
                Self::Taylor => {
                    out[0] = 1.0;
                    let root = 1.0 / (width as f32).sqrt().sqrt();
                    out[1..=width].iter_mut().zip(row).for_each(|(o, x)| *o = x * root);
                    out = &mut out[1 + width..];
                }
                Self::Normalised(affine) => {
                    let (gamma, beta) = affine.of(at.side);
                    let normal = &mut scratch[..width];
                    normalise(row, normal);
                    if !gamma.is_empty() {
                        let affine = gamma.iter().zip(beta);
                        normal.iter_mut().zip(affine).for_each(|(x, (g, b))| *x = g * *x + b);
                    }
                    row = normal;
                }
            }
            for (i, x) in row.iter().enumerate() {
                let (first, rest) = out.split_at_mut(width - i);
                first[0] = x * x * unit / SQRT_2;
                first[1..].iter_mut().zip(&row[i + 1..]).for_each(|(o, y)| *o = x * unit * y);
                out = rest;
            }
        }
    }

    #[inline(always)]
    pub(super) fn back(
        &self,
        at: Place<'_>,
        (x, width): (Panel<'_>, usize),
        by: Panel<'_>,
        out: &mut PanelMut<'_>,
        (params, scratch): (&mut [f32], &mut [f32]),
    ) {
        let unit = self.unit(width);
        for t in 0..at.len {
            let (row, dx, mut by) = (&x.row(t)[..width], &mut out.row(t)[..width], by.row(t));
            match self {
                Self::Taylor => {
                    let root = 1.0 / (width as f32).sqrt().sqrt();
                    dx.iter_mut().zip(&by[1..]).for_each(|(dx, by)| *dx = by * root);
                    by = &by[1 + width..];
                    products_back(row, by, unit, dx);
                }
                Self::Normalised(affine) => {
                    let (gamma, beta) = affine.of(at.side);
                    let (normal, rest) = scratch.split_at_mut(width);
                    let inverse = normalise(row, normal);
                    let moved = &mut rest[..width];
                    moved.copy_from_slice(normal);
                    if !gamma.is_empty() {
                        let affine = gamma.iter().zip(beta);
                        moved.iter_mut().zip(affine).for_each(|(x, (g, b))| *x = g * *x + b);
                    }
                    dx.fill(0.0);
                    products_back(moved, by, unit, dx);
                    if !gamma.is_empty() {
                        let (by_gamma, by_beta) = params.split_at_mut(width);
                        for c in 0..width {
                            by_gamma[c] += dx[c] * normal[c];
                            by_beta[c] += dx[c];
                            dx[c] *= gamma[c];
                        }
                    }
                    // dx = (dn - mean dn - n mean(n dn)) / deviation
                    let n = width as f32;
                    let mean = dx.iter().sum::<f32>() / n;
                    let along = dx.iter().zip(&*normal).map(|(d, n)| d * n).sum::<f32>() / n;
                    dx.iter_mut().zip(&*normal).for_each(|(d, n)| *d = (*d - mean - n * along) * inverse);
                }
            }
        }
    }

    pub(super) fn define(&self, at: Place<'_>, x: &[f64]) -> Vec<f64> {
        let width = x.len() as f64;
        let all = |x: &[f64]| -> Vec<f64> {
            let pairs = x
                .iter()
                .enumerate()
                .flat_map(|(i, a)| x[i..].iter().enumerate().map(move |(j, b)| (j, a * b)));
            pairs.map(|(j, p)| if j == 0 { p } else { 2f64.sqrt() * p }).collect()
        };
        match self {
            Self::Taylor => {
                let linear = x.iter().map(|x| x / width.sqrt().sqrt());
                let square = all(x).into_iter().map(|p| p / (2.0 * width).sqrt());
                std::iter::once(1.0).chain(linear).chain(square).collect()
            }
            Self::Normalised(affine) => {
                let mean = x.iter().sum::<f64>() / width;
                let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width;
                let (gamma, beta) = affine.of(at.side);
                let of = |all: &[f32], c: usize, none: f64| all.get(c).map_or(none, |x| f64::from(*x));
                let normal: Vec<f64> = x
                    .iter()
                    .enumerate()
                    .map(|(c, x)| {
                        let n = (x - mean) / (variance + f64::from(LAYER_NORM_EPS)).sqrt();
                        of(gamma, c, 1.0) * n + of(beta, c, 0.0)
                    })
                    .collect();
                all(&normal).into_iter().map(|p| p / width.sqrt()).collect()
            }
        }
    }
}

/// Adds the gradient by the row of its products.
#[inline(always)]
fn products_back(row: &[f32], by: &[f32], unit: f32, dx: &mut [f32]) {
    let mut by = by;
    for (i, x) in row.iter().enumerate() {
        let (first, rest) = by.split_at(row.len() - i);
        let mut sum = 2.0 * x * first[0] / SQRT_2;
        let others = row[i + 1..].iter().zip(&mut dx[i + 1..]).zip(&first[1..]);
        for ((y, dy), by) in others {
            sum += y * by;
            *dy += unit * x * by;
        }
        dx[i] += unit * sum;
        by = rest;
    }
}
