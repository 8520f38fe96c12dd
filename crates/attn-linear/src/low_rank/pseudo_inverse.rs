//! The iterative pseudo-inverse of Nystromformer, and its gradient.
//!
//! ```text
//! Z <- Z (13 I - P (15 I - P (7 I - P))) / 4      P = X Z      Z_0 = X^T / c
//! ```
//!
//! `c` is the largest column sum of `X`, whose entries are positive and whose rows sum to 1: of this matrix, or of all matrices
//! of a call. Six steps are usual.
//!
//! Source: Xiong et al. 2021 (Nystromformer), after Razavi et al. 2014.

use super::tensor::matmul;
use crate::named::transpose;
use attn_core::tile::Start;

/// A matrix `[n, n]`.
type Matrix = Vec<f32>;

fn times(a: &[f32], b: &[f32], n: usize) -> Matrix {
    let mut c = vec![0.0; n * n];
    matmul([n, n, n], (a, n, 1), b, &mut c, Start::Zero);
    c
}

/// `factor I - a`.
fn less(factor: f32, mut a: Matrix, n: usize) -> Matrix {
    a.iter_mut().for_each(|x| *x = -*x);
    a.iter_mut().step_by(n + 1).for_each(|x| *x += factor);
    a
}

/// Largest column sum, and its column.
pub(super) fn largest_column(x: &[f32], n: usize) -> (f32, usize) {
    let sum = |c: usize| x.iter().skip(c).step_by(n).sum::<f32>();
    (0..n).map(|c| (sum(c), c)).fold((f32::NEG_INFINITY, 0), |a, b| if b.0 > a.0 { b } else { a })
}

/// All iterates, the last being the pseudo-inverse.
pub(super) fn iterates(x: &[f32], n: usize, c: f32, steps: usize) -> Vec<Matrix> {
    let first = transpose(x, n, n).into_iter().map(|x| x / c).collect();
    let mut all: Vec<Matrix> = vec![first];
    for _ in 0..steps {
        let next = all.last().map(|z| {
            let [_, _, _, outer] = inside(x, z, n);
            let mut next = times(z, &outer, n);
            next.iter_mut().for_each(|x| *x *= 0.25);
            next
        });
        all.extend(next);
    }
    all
}

/// `P`, `7 I - P`, `15 I - P (..)`, `13 I - P (..)`.
fn inside(x: &[f32], z: &[f32], n: usize) -> [Matrix; 4] {
    let p = times(x, z, n);
    let a = less(7.0, p.clone(), n);
    let b = less(15.0, times(&p, &a, n), n);
    let c = less(13.0, times(&p, &b, n), n);
    [p, a, b, c]
}

/// Gradients by `X` (but for `c`) and by `c`, given that by the last iterate.
pub(super) fn back(x: &[f32], n: usize, c: f32, iterates: &[Matrix], by: Matrix) -> (Matrix, f32) {
    let mut dx = vec![0.0; n * n];
    let mut dz = by;
    let turned = |a: &[f32]| transpose(a, n, n);
    let add = |to: &mut Matrix, a: Matrix, sign: f32| to.iter_mut().zip(a).for_each(|(t, a)| *t += sign * a);
    for z in iterates.iter().rev().skip(1) {
        let [p, a, b, outer] = inside(x, z, n);
        dz.iter_mut().for_each(|x| *x *= 0.25);
        let d_outer = times(&turned(z), &dz, n);
        let mut next = times(&dz, &turned(&outer), n);
        let p_turned = turned(&p);
        let mut dp = vec![0.0; n * n];
        add(&mut dp, times(&d_outer, &turned(&b), n), -1.0);
        let db: Matrix = times(&p_turned, &d_outer, n).into_iter().map(|x| -x).collect();
        add(&mut dp, times(&db, &turned(&a), n), -1.0);
        // -dA = P^T dB, and A = 7 I - P.
        add(&mut dp, times(&p_turned, &db, n), 1.0);
        add(&mut dx, times(&dp, &turned(z), n), 1.0);
        add(&mut next, times(&turned(x), &dp, n), 1.0);
        dz = next;
    }
    add(&mut dx, turned(&dz), 1.0 / c);
    let dc = iterates.first().map_or(0.0, |z| -z.iter().zip(&dz).map(|(z, d)| z * d).sum::<f32>() / c);
    (dx, dc)
}
