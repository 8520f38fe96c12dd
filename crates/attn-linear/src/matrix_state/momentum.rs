//! The delta rule with momentum in chunks.
//!
//! With `e_t = S_(t-1)^T p_t - v_t`, `alpha = e^g`, `mu = e^g_mu`:
//!
//! ```text
//! M_t = mu_t M_(t-1) + eta_t k_t e_t^T      S_t = alpha_t S_(t-1) - beta_t M_t      o_t = q_t^T S_t
//! ```
//!
//! the pair `(S, M)` passes through scalars alone, so that after token `i` of a chunk
//!
//! ```text
//! S_i = s_i S + r_i M + sum_(j<=i) c_ij eta_j k_j e_j^T      M_i = m_i M + sum_(j<=i) d_ij eta_j k_j e_j^T
//! d_ij = mu_i d_(i-1)j, d_jj = 1      c_ij = alpha_i c_(i-1)j - beta_i d_ij      s, r, m likewise from 1, 0, 1
//! ```
//!
//! and the errors solve a triangular system, with `s'_i = s_(i-1)` and so on:
//!
//! ```text
//! A_ij = c_ij eta_j (q_i . k_j)      B_ij = c_(i-1)j eta_j (p_i . k_j), j < i
//! (I - B) E = diag(s') P S + diag(r') P M - V      O = diag(s) Q S + diag(r) Q M + A E
//! ```
//!
//! Backwards, `Z = (I - B)^-T (A^T dO + ..)`, `dB = Z E^T`, `dA = dO E^T`, and the scalars in the reverse of the order in
//! which they were made.
//!
//! Source: Behrouz, Zhong, Mirrokni 2025 (Titans), whose chunks read stale errors; here they are exact.

use super::{Chunk, Options, Piece};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};

/// The scalars of a chunk; entry 0 is before its first token.
#[derive(Default)]
struct Scalars {
    alpha: Vec<f64>,
    mu: Vec<f64>,
    eta: Vec<f64>,
    beta: Vec<f64>,
    s: Vec<f64>,
    r: Vec<f64>,
    m: Vec<f64>,
    /// `[len + 1, len]`: entry `(i + 1, j)` is after token `i`.
    c: Vec<f64>,
    d: Vec<f64>,
}

impl Scalars {
    fn set(&mut self, x: &Piece<'_>) {
        let n = x.len;
        let note = |at: usize| x.notes.iter().skip(at).step_by(3).map(|x| f64::from(*x));
        self.alpha = x.log_decay.iter().map(|g| f64::from(*g).exp()).collect();
        self.mu = note(0).map(f64::exp).collect();
        self.eta = note(1).collect();
        self.beta = note(2).collect();
        (self.s, self.r, self.m) = (vec![1.0], vec![0.0], vec![1.0]);
        self.c = vec![0.0; (n + 1) * n];
        self.d = vec![0.0; (n + 1) * n];
        for i in 0..n {
            let (alpha, mu, beta) = (self.alpha[i], self.mu[i], self.beta[i]);
            let m = mu * self.m[i];
            self.m.push(m);
            self.s.push(alpha * self.s[i]);
            self.r.push(alpha * self.r[i] - beta * m);
            for j in 0..=i {
                let (now, before) = ((i + 1) * n + j, i * n + j);
                self.d[now] = if j == i { 1.0 } else { mu * self.d[before] };
                self.c[now] = alpha * self.c[before] - beta * self.d[now];
            }
        }
    }
}

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Momentum {
    scalars: Scalars,
    q: Vec<f32>,
    k: Vec<f32>,
    p: Vec<f32>,
    /// `Q K^T`, `P K^T`, `A`, `B [len, len]`.
    qk: Vec<f32>,
    pk: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    errors: Vec<f32>,
    /// `Q S`, `Q M`, `P S`, `P M [len, value_dim]`.
    seen: [Vec<f32>; 4],
    turned: Vec<f32>,
}

/// `out [m, n] (+)= a b`, where `a` may be read transposed: `[k, m]`.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    [m, n, k]: [usize; 3],
    (a, turned): (&[f32], bool),
    b: &[f32],
    out: &mut [f32],
    start: Start,
) {
    let (row_stride, col_stride) = if turned { (1, m) } else { (k, 1) };
    product(
        simd,
        [m, n, k],
        Lhs { data: a, row_stride, col_stride },
        Rhs { data: b, stride: n },
        TileMut { data: out, stride: n },
        start,
    );
}

/// The matrix `[rows, width]` transposed.
fn turn<'a>(matrix: &[f32], width: usize, out: &'a mut Vec<f32>) -> &'a [f32] {
    let rows = matrix.len() / width.max(1);
    out.clear();
    out.extend((0..rows * width).map(|at| matrix[at % rows * width + at / rows]));
    out
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    f64::from(x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>())
}

impl Momentum {
    /// Bytes that chunks of up to `len` tokens take.
    pub(super) fn bytes(o: &Options, len: usize) -> usize {
        let keys = o.key_dim / 2;
        4 * (4 * len * keys + 5 * len * o.value_dim + 4 * len * len) + 16 * (len + 1) * len
    }

    /// Everything up to the errors.
    #[inline(always)]
    fn prepare<S: Simd>(&mut self, simd: S, o: &Options, x: &Piece<'_>, state: &[f32]) {
        let (n, both, width) = (x.len, o.key_dim, o.value_dim);
        let keys = both / 2;
        self.scalars.set(x);
        let halves = |rows: &[f32], second: bool| -> Vec<f32> {
            let from = if second { keys } else { 0 };
            rows.chunks_exact(both).flat_map(|row| row[from..from + keys].iter().copied()).collect()
        };
        (self.q, self.k, self.p) = (halves(x.q, false), halves(x.k, false), halves(x.k, true));
        let (s, m) = state.split_at(keys * width);
        let Self { scalars, q, k, p, qk, pk, a, b, errors, seen, turned } = self;
        let k_turned = turn(k, keys, turned);
        for (rows, out) in [(&*q, &mut *qk), (&*p, &mut *pk)] {
            out.resize(n * n, 0.0);
            multiply(simd, [n, n, keys], (rows, false), k_turned, out, Start::Zero);
        }
        for ((rows, matrix), out) in [(&*q, s), (&*q, m), (&*p, s), (&*p, m)].into_iter().zip(seen.iter_mut())
        {
            out.resize(n * width, 0.0);
            multiply(simd, [n, width, keys], (rows, false), matrix, out, Start::Zero);
        }
        let weights = |c: &[f64], dots: &[f32], shift: usize, out: &mut Vec<f32>| {
            out.clear();
            out.extend((0..n * n).map(|at| {
                let (i, j) = (at / n, at % n);
                if j + shift <= i {
                    (c[(i + 1 - shift) * n + j] * scalars.eta[j]) as f32 * dots[at]
                } else {
                    0.0
                }
            }));
        };
        weights(&scalars.c, qk, 0, a);
        weights(&scalars.c, pk, 1, b);
        errors.clear();
        errors.resize(n * width, 0.0);
        for i in 0..n {
            let (before, row) = errors.split_at_mut(i * width);
            let (s, r) = (scalars.s[i] as f32, scalars.r[i] as f32);
            let seen = seen[2][i * width..].iter().zip(&seen[3][i * width..]).zip(&x.v[i * width..]);
            row[..width].iter_mut().zip(seen).for_each(|(e, ((ps, pm), v))| *e = s * ps + r * pm - v);
            multiply(simd, [1, width, i], (&b[i * n..][..i], false), before, row, Start::Keep);
        }
    }
}

/// A chunk forwards.
pub(super) struct Forward<'a> {
    pub(super) o: &'a Options,
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a mut [f32],
    pub(super) reads: &'a mut [f32],
    pub(super) scratch: &'a mut Momentum,
}

impl SimdOp for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, chunk, state, reads, scratch } = self;
        let (n, keys, width) = (chunk.len, o.key_dim / 2, o.value_dim);
        if n == 0 {
            return;
        }
        scratch.prepare(simd, o, &chunk, state);
        let Momentum { scalars, k, a, errors, seen, .. } = scratch;
        for (i, row) in reads.chunks_exact_mut(width).enumerate() {
            let (s, r) = (scalars.s[i + 1] as f32, scalars.r[i + 1] as f32);
            let seen = seen[0][i * width..].iter().zip(&seen[1][i * width..]);
            row.iter_mut().zip(seen).for_each(|(read, (qs, qm))| *read = s * qs + r * qm);
        }
        multiply(simd, [n, width, n], (a, false), errors, reads, Start::Keep);
        let (s, m) = state.split_at_mut(keys * width);
        let (by_s, by_r, by_m) = (scalars.s[n] as f32, scalars.r[n] as f32, scalars.m[n] as f32);
        for (s, m) in s.iter_mut().zip(m.iter_mut()) {
            (*s, *m) = (by_s * *s + by_r * *m, by_m * *m);
        }
        for (weights, matrix) in [(&scalars.c, s), (&scalars.d, m)] {
            let ended = ended(k, keys, &weights[n * n..], &scalars.eta);
            multiply(simd, [keys, width, n], (&ended, true), errors, matrix, Start::Keep);
        }
    }
}

/// The keys times what is left of them at the end.
fn ended(k: &[f32], keys: usize, weights: &[f64], eta: &[f64]) -> Vec<f32> {
    let rows = k.chunks_exact(keys).zip(weights.iter().zip(eta));
    rows.flat_map(|(row, (weight, eta))| row.iter().map(move |k| (weight * eta) as f32 * k)).collect()
}

/// A chunk backwards, as [`super::Engine::backward`]; gradients of `(g_mu, eta, beta)` are those of the notes.
pub(super) struct Backward<'a> {
    pub(super) o: &'a Options,
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a [f32],
    pub(super) d_reads: &'a [f32],
    pub(super) d_state: &'a mut [f32],
    pub(super) grads: &'a mut Chunk,
    pub(super) scratch: &'a mut Momentum,
}

impl SimdOp for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, chunk, state, d_reads, d_state, grads, scratch } = self;
        let (n, keys, width) = (chunk.len, o.key_dim / 2, o.value_dim);
        grads.resize(o, n);
        grads.notes.clear();
        grads.notes.resize(3 * n, 0.0);
        if n == 0 {
            return;
        }
        scratch.prepare(simd, o, &chunk, state);
        let Momentum { scalars, q, k, p, qk, pk, a, b, errors, seen, turned } = scratch;
        let (s, m) = state.split_at(keys * width);
        let (d_s, d_m) = d_state.split_at_mut(keys * width);
        let mut d_c = vec![0.0; (n + 1) * n];
        let mut d_d = vec![0.0; (n + 1) * n];
        let (mut d_eta, mut by_s, mut by_r, mut by_m) =
            (vec![0.0; n], vec![0.0; n + 1], vec![0.0; n + 1], vec![0.0; n + 1]);
        let (mut d_q, mut d_k, mut d_p) = (vec![0.0; n * keys], vec![0.0; n * keys], vec![0.0; n * keys]);

        // What is left at the end.
        let mut d_errors = vec![0.0; n * width];
        multiply(simd, [n, width, n], (a, true), d_reads, &mut d_errors, Start::Zero);
        let mut part = vec![0.0; n * keys];
        for (weights, d_weights, d_matrix) in [(&scalars.c, &mut d_c, &*d_s), (&scalars.d, &mut d_d, &*d_m)] {
            let weights = &weights[n * n..];
            let ended = ended(k, keys, weights, &scalars.eta);
            multiply(simd, [n, width, keys], (&ended, false), d_matrix, &mut d_errors, Start::Keep);
            // Completed below, once the errors' own gradients are not needed for it: rows of `E dS^T`.
            multiply(
                simd,
                [n, keys, width],
                (errors, false),
                turn(d_matrix, width, turned),
                &mut part,
                Start::Zero,
            );
            for (j, row) in part.chunks_exact(keys).enumerate() {
                let along = dot(&k[j * keys..][..keys], row);
                d_weights[n * n + j] += scalars.eta[j] * along;
                d_eta[j] += weights[j] * along;
                let weight = (scalars.eta[j] * weights[j]) as f32;
                d_k[j * keys..][..keys].iter_mut().zip(row).for_each(|(d, x)| *d += weight * x);
            }
        }
        by_s[n] += dot(d_s, s);
        by_r[n] += dot(d_s, m);
        by_m[n] += dot(d_m, m);

        // The errors' system, transposed.
        for i in (0..n).rev() {
            let (before, row) = d_errors.split_at_mut(i * width);
            multiply(simd, [i, width, 1], (&b[i * n..][..i], true), &row[..width], before, Start::Keep);
        }
        grads.v.iter_mut().zip(&d_errors).for_each(|(d, z)| *d = -z);

        // Scores.
        let errors_turned = turn(errors, width, turned).to_vec();
        let mut d_scores = vec![0.0; n * n];
        for (by, dots, rows, d_rows, shift) in
            [(d_reads, &*qk, &*q, &mut d_q, 0), (&d_errors[..], &*pk, &*p, &mut d_p, 1)]
        {
            multiply(simd, [n, n, width], (by, false), &errors_turned, &mut d_scores, Start::Zero);
            for (at, d) in d_scores.iter_mut().enumerate() {
                let (i, j) = (at / n, at % n);
                if j + shift > i {
                    *d = 0.0;
                    continue;
                }
                let (c, by, dot) = ((i + 1 - shift) * n + j, f64::from(*d), f64::from(dots[at]));
                d_c[c] += by * scalars.eta[j] * dot;
                d_eta[j] += by * scalars.c[c] * dot;
                *d = (by * scalars.c[c] * scalars.eta[j]) as f32;
            }
            multiply(simd, [n, keys, n], (&d_scores, false), k, d_rows, Start::Keep);
            multiply(simd, [n, keys, n], (&d_scores, true), rows, &mut d_k, Start::Keep);
        }

        // The states before.
        let (s_end, r_end, m_end) = (scalars.s[n] as f32, scalars.r[n] as f32, scalars.m[n] as f32);
        for (d_s, d_m) in d_s.iter_mut().zip(d_m.iter_mut()) {
            (*d_s, *d_m) = (s_end * *d_s, r_end * *d_s + m_end * *d_m);
        }
        for (first, by, rows, d_rows, seen) in [
            (1, d_reads, &*q, &mut d_q, [&seen[0], &seen[1]]),
            (0, &d_errors[..], &*p, &mut d_p, [&seen[2], &seen[3]]),
        ] {
            let all = [(&scalars.s, s, &mut *d_s, &mut by_s), (&scalars.r, m, &mut *d_m, &mut by_r)];
            for ((weights, matrix, d_matrix, d_weights), seen) in all.into_iter().zip(seen) {
                let weights = &weights[first..];
                for (i, (by, seen)) in by.chunks_exact(width).zip(seen.chunks_exact(width)).enumerate() {
                    d_weights[i + first] += dot(by, seen);
                }
                let weighed: Vec<f32> = by
                    .chunks_exact(width)
                    .zip(weights)
                    .flat_map(|(by, w)| by.iter().map(move |d| *w as f32 * d))
                    .collect();
                multiply(
                    simd,
                    [n, keys, width],
                    (&weighed, false),
                    turn(matrix, width, turned),
                    d_rows,
                    Start::Keep,
                );
                multiply(simd, [keys, width, n], (rows, true), &weighed, d_matrix, Start::Keep);
            }
        }

        // The scalars.
        for i in (0..n).rev() {
            let (alpha, mu, beta) = (scalars.alpha[i], scalars.mu[i], scalars.beta[i]);
            let (mut d_alpha, mut d_mu, mut d_beta) = (0.0, 0.0, 0.0);
            for j in 0..=i {
                let (now, before) = ((i + 1) * n + j, i * n + j);
                d_alpha += d_c[now] * scalars.c[before];
                d_beta -= d_c[now] * scalars.d[now];
                d_d[now] -= beta * d_c[now];
                if j < i {
                    d_c[before] += alpha * d_c[now];
                    d_mu += d_d[now] * scalars.d[before];
                    d_d[before] += mu * d_d[now];
                }
            }
            d_alpha += by_s[i + 1] * scalars.s[i] + by_r[i + 1] * scalars.r[i];
            d_beta -= by_r[i + 1] * scalars.m[i + 1];
            by_m[i + 1] -= beta * by_r[i + 1];
            d_mu += by_m[i + 1] * scalars.m[i];
            by_s[i] += alpha * by_s[i + 1];
            by_r[i] += alpha * by_r[i + 1];
            by_m[i] += mu * by_m[i + 1];
            grads.log_decay[i] = (alpha * d_alpha) as f32;
            grads.notes[3 * i] = (mu * d_mu) as f32;
            grads.notes[3 * i + 1] = d_eta[i] as f32;
            grads.notes[3 * i + 2] = d_beta as f32;
        }
        for (i, row) in grads.q.chunks_exact_mut(2 * keys).enumerate() {
            row[..keys].copy_from_slice(&d_q[i * keys..][..keys]);
            row[keys..].fill(0.0);
        }
        for (i, row) in grads.k.chunks_exact_mut(2 * keys).enumerate() {
            row[..keys].copy_from_slice(&d_k[i * keys..][..keys]);
            row[keys..].copy_from_slice(&d_p[i * keys..][..keys]);
        }
    }
}
