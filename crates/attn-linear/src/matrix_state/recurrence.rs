//! Recurrences of the same state that are not sums of writes along given directions, token by token.
//!
//! The formulas are generic over the float: f64 is the definition, f32 the form that runs where there is none in chunks.

use super::{Options, Piece};
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::{Add, Div, Mul, Sub};

/// A float of the state.
pub(super) trait Real:
    Copy + Send + Sync + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// The nearest.
    fn of(x: f32) -> Self;
    /// `e^x`, the decay of a log.
    fn decay(log: f32) -> Self;
    /// The square root.
    fn root(self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn decay(log: f32) -> Self {
        log.exp()
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        f64::from(x)
    }

    #[inline(always)]
    fn decay(log: f32) -> Self {
        f64::from(log).exp()
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// What a variant does instead of the engine's recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recurrence {
    /// Oja's rule, the delta rule of the transposed state: with `log_decay` of value channels, `k` times `beta` in `k` and
    /// `beta` in `notes`, `S~ = S diag(e^g)`, `S = S~ + (k - beta S~ v) v^T`, read `q^T S`.
    Oja,
    /// A delta rule whose corrections have momentum: rows of `k` are `[k, p]`, the state is `[S; M]`, `notes` are
    /// `(g_mu, eta, beta)`: `M = e^g_mu M + eta k (S^T p - v)^T`, `S = e^g S - beta M`, read `q^T S` with `q` in the first half.
    Momentum,
    /// Regression solved exactly: the state is `[H | G]`, written by `k` (times `beta`) with the value row `[k, v]`;
    /// the read is that of `x` with `(H + diag(bonus)) x = q`, its first `key_dim` numbers 0.
    Regression,
}

impl Recurrence {
    /// Runs `chunk` over a state of the sizes that `o` gives it; fills `reads [len, value_dim]`, not scaled.
    pub(super) fn run<F: Real>(
        self,
        isa: Isa,
        o: &Options,
        chunk: Piece<'_>,
        state: &mut [F],
        reads: &mut [F],
    ) {
        reads.fill(F::of(0.0));
        isa.run(Run { recurrence: self, o, chunk, state, reads });
    }
}

struct Run<'a, F> {
    recurrence: Recurrence,
    o: &'a Options,
    chunk: Piece<'a>,
    state: &'a mut [F],
    reads: &'a mut [F],
}

impl<F: Real> SimdOp for Run<'_, F> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { recurrence, o, chunk, state, reads } = self;
        let mut scratch = vec![F::of(0.0); o.value_dim.max(o.key_dim)];
        let mut factor = vec![F::of(0.0); o.key_dim * o.key_dim];
        for (i, read) in reads.chunks_exact_mut(o.value_dim).enumerate() {
            match recurrence {
                Recurrence::Oja => oja(o, &chunk, i, state, read),
                Recurrence::Momentum => momentum(o, &chunk, i, state, &mut scratch[..o.value_dim], read),
                Recurrence::Regression => regression(o, &chunk, i, state, [&mut scratch, &mut factor], read),
            }
        }
    }
}

/// `out += by row`.
#[inline(always)]
fn add_row<F: Real, X: Copy>(out: &mut [F], by: F, row: &[X], of: impl Fn(X) -> F) {
    out.iter_mut().zip(row).for_each(|(out, x)| *out = *out + by * of(*x));
}

#[inline(always)]
fn oja<F: Real>(o: &Options, x: &Piece<'_>, i: usize, state: &mut [F], read: &mut [F]) {
    let (key_dim, value_dim) = (o.key_dim, o.value_dim);
    let v = &x.v[i * value_dim..][..value_dim];
    let g = &x.log_decay[i * value_dim..][..value_dim];
    let beta = F::of(x.notes[i]);
    for (c, row) in state.chunks_exact_mut(value_dim).enumerate() {
        let mut along = F::of(0.0);
        for ((s, g), v) in row.iter_mut().zip(g).zip(v) {
            *s = *s * F::decay(*g);
            along = along + *s * F::of(*v);
        }
        let by = F::of(x.k[i * key_dim + c]) - beta * along;
        add_row(row, by, v, F::of);
        add_row(read, F::of(x.q[i * key_dim + c]), row, |s| s);
    }
}

#[inline(always)]
fn momentum<F: Real>(o: &Options, x: &Piece<'_>, i: usize, state: &mut [F], error: &mut [F], read: &mut [F]) {
    let (both, value_dim) = (o.key_dim, o.value_dim);
    let key_dim = both / 2;
    let (k, p) = x.k[i * both..][..both].split_at(key_dim);
    let v = &x.v[i * value_dim..][..value_dim];
    let [mu, eta, beta] = [0, 1, 2].map(|n| x.notes[3 * i + n]);
    let (mu, eta, beta, fade) = (F::decay(mu), F::of(eta), F::of(beta), F::decay(x.log_decay[i]));
    let (s, m) = state.split_at_mut(key_dim * value_dim);
    error.iter_mut().zip(v).for_each(|(e, v)| *e = F::of(0.0) - F::of(*v));
    for (s, p) in s.chunks_exact(value_dim).zip(p) {
        add_row(error, F::of(*p), s, |s| s);
    }
    let rows = s.chunks_exact_mut(value_dim).zip(m.chunks_exact_mut(value_dim));
    for ((c, (s, m)), k) in rows.enumerate().zip(k) {
        let by = eta * F::of(*k);
        for ((s, m), e) in s.iter_mut().zip(m).zip(&*error) {
            *m = mu * *m + by * *e;
            *s = fade * *s - beta * *m;
        }
        add_row(read, F::of(x.q[i * both + c]), s, |s| s);
    }
}

#[inline(always)]
fn regression<F: Real>(
    o: &Options,
    x: &Piece<'_>,
    i: usize,
    state: &mut [F],
    [solution, factor]: [&mut [F]; 2],
    read: &mut [F],
) {
    let (n, width) = (o.key_dim, o.value_dim);
    absorb(o, x, i, state);
    factorise(o, x.bonus, state, factor);
    solution[..n].iter_mut().zip(&x.q[i * n..]).for_each(|(s, q)| *s = F::of(*q));
    solve(n, factor, solution);
    for (row, x) in state.chunks_exact(width).zip(&*solution) {
        add_row(&mut read[n..], *x, &row[n..], |s| s);
    }
}

/// Token `i` of a regression into its state.
#[inline(always)]
pub(super) fn absorb<F: Real>(o: &Options, x: &Piece<'_>, i: usize, state: &mut [F]) {
    let (n, width) = (o.key_dim, o.value_dim);
    let fade = F::decay(x.log_decay[i]);
    let v = &x.v[i * width..][..width];
    for (row, k) in state.chunks_exact_mut(width).zip(&x.k[i * n..]) {
        let k = F::of(*k);
        row.iter_mut().zip(v).for_each(|(s, v)| *s = fade * *s + k * F::of(*v));
    }
}

/// The lower factor `L` of `H + diag(bonus) = L L^T`, row by row.
#[inline(always)]
pub(super) fn factorise<F: Real>(o: &Options, bonus: &[f32], state: &[F], factor: &mut [F]) {
    let (n, width) = (o.key_dim, o.value_dim);
    for r in 0..n {
        for c in 0..=r {
            let (before, own) = factor.split_at_mut(r * n);
            let other = if c == r { None } else { Some(&before[c * n..][..c]) };
            let dot = (0..c).fold(F::of(0.0), |sum, j| sum + own[j] * other.map_or(own[j], |row| row[j]));
            let diagonal = if c == r { F::of(bonus[r]) } else { F::of(0.0) };
            let left = state[r * width + c] + diagonal - dot;
            own[c] = if c == r { left.root() } else { left / before[c * n + c] };
        }
    }
}

/// `x <- (L L^T)^-1 x`.
#[inline(always)]
pub(super) fn solve<F: Real>(n: usize, factor: &[F], x: &mut [F]) {
    for r in 0..n {
        let row = &factor[r * n..][..=r];
        let dot = (0..r).fold(F::of(0.0), |sum, j| sum + row[j] * x[j]);
        x[r] = (x[r] - dot) / row[r];
    }
    for r in (0..n).rev() {
        x[r] = x[r] / factor[r * n + r];
        let known = x[r];
        for c in 0..r {
            x[c] = x[c] - factor[r * n + c] * known;
        }
    }
}
