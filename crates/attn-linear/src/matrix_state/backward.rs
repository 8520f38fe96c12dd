//! Gradients of a chunk: the forward pass of [`super::attend`] backwards.
//!
//! With `dN` the gradient of the reads (scale included), `dS` that of the state after the chunk, `U` what is written:
//!
//! ```text
//! dA = tril(dN U^T)      dU = A^T dN + (k o end) dS      Z = (I - P)^-T dU      dP = stril(Z U^T)      dV = Z
//! d(q o down) = dN S^T   d(a o down) = Z S^T             d(k o end) = U dS^T
//! dS <- down_last o dS + (q o down)^T dN + (a o down)^T Z
//! ```
//!
//! Every use of a reader `x` that stands at `G_i` carries the factor `e^(G_i)`, every use of a write's vector `y` carries
//! `e^(-G_j)`, and what is left at the end `e^(G_last)`; hence, per channel and in natural logs,
//!
//! ```text
//! dG_i += x_i o dx_i      dG_j -= y_j o dy_j      dG_last += sum_v dS o S'      d log_decay_t = sum_(i >= t) dG_i
//! ```
//!
//! with `S'` the state after the chunk. A norm `D` adds `dD_i` to the gradients of its row of `A`, `dD_i z` to those of its
//! query, and is a column of `S'` like any other. Where values decay the same holds with reads in the place of readers and values in
//! that of keys.

use super::attend::{Scratch, erase_at, fade_queries, prepare, read, read_at, solve, written};
use super::fading::weigh;
use super::{Chunk, Decay, Erase, Options, Piece, Read};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product, transpose};
use attn_core::view::Rows;

/// A thread's buffers for the gradients of one chunk.
#[derive(Default)]
pub(super) struct BackScratch {
    /// Gradients of scores `[rows, stride]`.
    scores: Vec<f32>,
    /// A matrix transposed.
    turned: Vec<f32>,
    /// Gradients of what is written, then of what the erase reads, `[writes, value_dim]`.
    d_written: Vec<f32>,
    d_solved: Vec<f32>,
    /// Rows on their way.
    part: Vec<f32>,
    faded: Vec<f32>,
    weights: Vec<f32>,
    /// `dG [writes, decay_width]`.
    d_sums: Vec<f64>,
    state: Vec<f32>,
}

/// Gradients of one chunk.
pub(super) struct Backward<'a> {
    pub(super) chunk: Piece<'a>,
    /// Before the chunk.
    pub(super) state: &'a [f32],
    /// Of the reads, `[len, value_dim]`.
    pub(super) d_reads: &'a [f32],
    /// Of the norms, `[len]`.
    pub(super) d_norms: &'a [f32],
    /// Of what is written, beside what reads and state say; may be empty.
    pub(super) d_writes: &'a [f32],
    /// Of the state after the chunk; becomes that of the state before it.
    pub(super) d_state: &'a mut [f32],
    /// Becomes the gradients of the chunk's rows; those of the bonus are added to.
    pub(super) grads: &'a mut Chunk,
    pub(super) scratch: &'a mut Scratch,
    pub(super) back: &'a mut BackScratch,
}

impl SimdOp for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, d_reads, d_norms, d_writes, d_state, grads, scratch: x, back } = self;
        let (o, chunk) = (x.options, &chunk);
        grads.resize(&o, chunk.len.max(chunk.writes / o.writes));
        grads.q.truncate(chunk.q.len());
        grads.k.truncate(chunk.k.len());
        grads.v.truncate(chunk.v.len());
        grads.log_decay.truncate(chunk.log_decay.len());
        for rows in
            [&mut grads.q, &mut grads.k, &mut grads.v, &mut grads.a, &mut grads.b, &mut grads.log_decay]
        {
            rows.fill(0.0);
        }
        grads.strength.clear();
        grads.strength.resize(chunk.strength.len(), 0.0);
        grads.bonus.resize(chunk.bonus.len(), 0.0);
        back.d_sums.clear();
        back.d_sums.resize(chunk.log_decay.len(), 0.0);
        prepare(simd, chunk, x);
        if x.fading.key_width <= 1 {
            fade_queries(chunk, x);
        }
        if o.erase != Erase::None {
            solve(simd, chunk, state, x);
        }
        if o.decay == Decay::Value {
            read(simd, chunk, state, x);
            values_decay(simd, chunk, state, d_reads, d_state, grads, x, back);
        } else {
            keys_decay(simd, chunk, state, [d_reads, d_norms, d_writes], d_state, grads, x, back);
        }
        accumulate(&back.d_sums, o.decay_width(), &mut grads.log_decay);
    }
}

/// `d log_decay_t = sum_(i >= t) dG_i`.
fn accumulate(d_sums: &[f64], width: usize, out: &mut [f32]) {
    let mut later = vec![0.0; width];
    let rows = out.chunks_exact_mut(width.max(1)).zip(d_sums.chunks_exact(width.max(1))).rev();
    for (out, row) in rows {
        for ((out, g), later) in out.iter_mut().zip(row).zip(&mut later) {
            *later += g;
            *out = *later as f32;
        }
    }
}

/// `out [m, n] (+)= a [m, k] b [k, n]`, row-major.
#[inline(always)]
fn multiply<S: Simd>(simd: S, [m, n, k]: [usize; 3], a: &[f32], b: &[f32], out: &mut [f32], start: Start) {
    product(
        simd,
        [m, n, k],
        Lhs { data: a, row_stride: k, col_stride: 1 },
        Rhs { data: b, stride: n },
        TileMut { data: out, stride: n },
        start,
    );
}

/// `out [m, n] += a^T b` with `a [k, stride]` of which the first `m` columns count, `b [k, n]`.
#[inline(always)]
fn multiply_turned<S: Simd>(
    simd: S,
    [m, n, k]: [usize; 3],
    a: &[f32],
    stride: usize,
    b: &[f32],
    out: &mut [f32],
) {
    product(
        simd,
        [m, n, k],
        Lhs { data: a, row_stride: 1, col_stride: stride },
        Rhs { data: b, stride: n },
        TileMut { data: out, stride: n },
        Start::Keep,
    );
}

/// `out [rows, writes]`, `stride` apart, `= left values^T`, zero from `seen` on.
#[inline(always)]
fn score_gradients<S: Simd>(
    simd: S,
    left: &[f32],
    values: &[f32],
    width: usize,
    stride: usize,
    seen: &dyn Fn(usize) -> usize,
    [turned, out]: [&mut Vec<f32>; 2],
) {
    let (rows, writes) = (left.len() / width, values.len() / width);
    turned.resize(width * stride, 0.0);
    transpose(simd, Rows::new(values, writes, width, width), 1.0, turned, stride);
    out.resize(rows * stride, 0.0);
    multiply(simd, [rows, stride, width], left, turned, out, Start::Zero);
    out.chunks_exact_mut(stride).enumerate().for_each(|(i, row)| row[seen(i)..].fill(0.0));
}

/// The matrix `[rows, width]` transposed, densely.
#[inline(always)]
fn turn<'a, S: Simd>(simd: S, matrix: &[f32], rows: usize, width: usize, out: &'a mut Vec<f32>) -> &'a [f32] {
    out.resize(rows * width, 0.0);
    transpose(simd, Rows::new(matrix, rows, width, width), 1.0, out, rows);
    out
}

/// Where readers stand.
type At<'a> = &'a dyn Fn(usize) -> Option<usize>;

/// Readers `x` and columns `y`, whose scores have gradients.
struct Pairs<'a> {
    x: &'a [f32],
    x_faded: &'a [f32],
    at: At<'a>,
    seen: &'a dyn Fn(usize) -> usize,
    y: &'a [f32],
}

impl Pairs<'_> {
    /// Adds the gradients of `x` and `y` that those of their scores give; `scores` is left weighed.
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        simd: S,
        scores: &mut [f32],
        s: &mut Scratch,
        [part, faded, weights]: [&mut Vec<f32>; 3],
        [dx, dy]: [&mut [f32]; 2],
    ) {
        let (key_dim, stride, width) = (s.options.key_dim, s.stride, s.fading.key_width);
        let (rows, writes) = (self.x.len() / key_dim, self.y.len() / key_dim);
        if width <= 1 {
            for (i, row) in scores.chunks_exact_mut(stride).enumerate().take(rows) {
                s.fading.weigh_scores(simd, (self.at)(i), &mut row[..(self.seen)(i)]);
            }
            product(
                simd,
                [rows, key_dim, writes],
                Lhs { data: scores, row_stride: stride, col_stride: 1 },
                Rhs { data: self.y, stride: key_dim },
                TileMut { data: dx, stride: key_dim },
                Start::Keep,
            );
            return multiply_turned(simd, [writes, key_dim, rows], scores, stride, self.x, dy);
        }
        let near = (0..rows).take_while(|i| s.fading.is_near((self.at)(*i))).count();
        // Near the start: scores are x_faded . (y o up).
        faded.resize(self.y.len(), 0.0);
        weigh(self.y, key_dim, &s.fading.up, width, faded);
        part.resize(self.x.len().max(self.y.len()), 0.0);
        product(
            simd,
            [near, key_dim, writes],
            Lhs { data: scores, row_stride: stride, col_stride: 1 },
            Rhs { data: faded, stride: key_dim },
            TileMut { data: part, stride: key_dim },
            Start::Zero,
        );
        for (i, (dx, part)) in
            dx.chunks_exact_mut(key_dim).zip(part.chunks_exact_mut(key_dim)).enumerate().take(near)
        {
            faded.resize(key_dim.max(faded.len()), 0.0);
            s.fading.fade(part, (self.at)(i), &mut faded[..key_dim]);
            dx.iter_mut().zip(&*faded).for_each(|(dx, x)| *dx += x);
        }
        let all = &mut part[..self.y.len()];
        all.fill(0.0);
        multiply_turned(simd, [writes, key_dim, near], scores, stride, self.x_faded, all);
        faded.resize(self.y.len(), 0.0);
        weigh(all, key_dim, &s.fading.up, width, faded);
        dy.iter_mut().zip(&*faded).for_each(|(dy, y)| *dy += y);
        // Further on, pair by pair.
        weights.resize(key_dim.max(width), 0.0);
        for i in near..rows {
            let own = i * key_dim..(i + 1) * key_dim;
            for j in 0..(self.seen)(i) {
                let score = scores[i * stride + j];
                s.fading.pair_weights(simd, (self.at)(i), j, &mut weights[..width]);
                let theirs = j * key_dim..(j + 1) * key_dim;
                let (x, y) = (&self.x[own.clone()], &self.y[theirs.clone()]);
                let (dx, dy) = (&mut dx[own.clone()], &mut dy[theirs]);
                for c in 0..key_dim {
                    let weighted = score * weights[c];
                    dx[c] += weighted * y[c];
                    dy[c] += weighted * x[c];
                }
            }
        }
    }
}

/// Adds `sign x o dx` to the sums a row stands at.
#[inline(always)]
fn sum_gradients(d_sums: &mut [f64], width: usize, at: Option<usize>, sign: f64, x: &[f32], dx: &[f32]) {
    let Some(at) = at.filter(|_| width > 0) else { return };
    let out = &mut d_sums[at * width..][..width];
    let products = x.iter().zip(dx).map(|(x, dx)| sign * f64::from(*x) * f64::from(*dx));
    if width == 1 {
        out[0] += products.sum::<f64>();
    } else {
        out.iter_mut().zip(products).for_each(|(out, x)| *out += x);
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn keys_decay<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    state: &[f32],
    [d_reads, d_norms, d_writes]: [&[f32]; 3],
    d_state: &mut [f32],
    grads: &mut Chunk,
    x: &mut Scratch,
    back: &mut BackScratch,
) {
    let o = x.options;
    let Options { key_dim, value_dim, .. } = o;
    let (len, writes, stride, width) = (chunk.len, chunk.writes, x.stride, x.fading.width);
    let own = usize::from(o.read == Read::Pre);
    let seen = |i: usize| (o.seen(i) + own).min(writes);
    let (state, z) = state.split_at(o.matrix_len());
    let (d_state, d_z) = d_state.split_at_mut(o.matrix_len());
    let (q_at, a_at) = (|i: usize| read_at(&o, i), |w: usize| erase_at(&o, w));
    let BackScratch { scores, turned, d_written, d_solved, part, faded, weights, d_sums, state: s_after } =
        back;
    let all_written = written(chunk, &x.solved, o.erase).to_vec();
    let all_solved = x.solved.get(..writes * value_dim).unwrap_or_default().to_vec();

    // What is left at the end: dS by the written rows, and the state before.
    d_written.resize(writes * value_dim, 0.0);
    weigh(chunk.k, key_dim, &x.fading.end, width, &mut x.weighed);
    multiply(simd, [writes, value_dim, key_dim], &x.weighed, d_state, d_written, Start::Zero);
    multiply_turned(simd, [writes, value_dim, len], &x.qk, stride, d_reads, d_written);
    d_written.iter_mut().zip(d_writes).for_each(|(d, more)| *d += more);
    let ended = turn(simd, d_state, key_dim, value_dim, turned).to_vec();
    let mut end_gradients = |values: &[f32], rows: &[f32], d_rows: &mut [f32], x: &mut Scratch| {
        part.resize(writes * key_dim, 0.0);
        multiply(simd, [writes, key_dim, value_dim], values, &ended, part, Start::Zero);
        for row in part.chunks_exact_mut(key_dim).take(writes) {
            row.iter_mut().zip(&*d_z).for_each(|(d, d_z)| *d += d_z);
        }
        faded.resize(writes * key_dim, 0.0);
        weigh(part, key_dim, &x.fading.end, width, faded);
        d_rows.iter_mut().zip(&*faded).for_each(|(d, y)| *d += y);
        for (y, dy) in rows.chunks_exact(key_dim).zip(faded.chunks_exact(key_dim)) {
            sum_gradients(d_sums, width, writes.checked_sub(1), 1.0, y, dy);
        }
    };
    end_gradients(&all_written, chunk.k, &mut grads.k, x);
    if o.erase == Erase::Untied {
        end_gradients(&all_solved, chunk.b, &mut grads.b, x);
    }
    // The state before, as it has faded at the end.
    s_after.clear();
    s_after.extend_from_slice(state);
    for (c, row) in s_after.chunks_exact_mut(value_dim).enumerate() {
        let loss = x.fading.loss.get(if width == 1 { 0 } else { c }).copied().unwrap_or(0.0);
        let d_row = &mut d_state[c * value_dim..][..value_dim];
        d_row.iter_mut().for_each(|d| *d += loss * *d);
        if let Some(last) = writes.checked_sub(1).filter(|_| width > 0) {
            let kept: f64 = row.iter().zip(&*d_row).map(|(s, d)| f64::from(*s) * f64::from(*d)).sum();
            d_sums[last * width + if width == 1 { 0 } else { c }] += kept;
        }
    }

    for (c, (z, d_z)) in z.iter().zip(&mut *d_z).enumerate() {
        let own = if width == 1 { 0 } else { c };
        *d_z += x.fading.loss.get(own).copied().unwrap_or(0.0) * *d_z;
        if let Some(last) = writes.checked_sub(1).filter(|_| width > 0) {
            d_sums[last * width + own] += f64::from(*z) * f64::from(*d_z);
        }
    }

    let turned_state = turn(simd, state, key_dim, value_dim, turned).to_vec();
    if o.erase != Erase::None {
        let tied = o.erase == Erase::Tied;
        if tied {
            d_solved.clone_from(d_written);
        } else {
            d_solved.resize(writes * value_dim, 0.0);
            weigh(chunk.b, key_dim, &x.fading.end, width, &mut x.weighed);
            // `d_state` has faded by now: what ends is in `ended`, transposed.
            let end = turn(simd, &ended, value_dim, key_dim, turned);
            multiply(simd, [writes, value_dim, key_dim], &x.weighed, end, d_solved, Start::Zero);
            multiply_turned(simd, [writes, value_dim, len], &x.qb, stride, d_reads, d_solved);
        }
        let matrix = if tied { &x.ak } else { &x.ab };
        for i in (0..writes).rev() {
            let (before, row) = d_solved.split_at_mut(i * value_dim);
            let row = &mut row[..value_dim];
            if tied {
                grads.v[i * value_dim..][..value_dim].copy_from_slice(row);
                if !chunk.strength.is_empty() {
                    let own = i * value_dim..(i + 1) * value_dim;
                    row.iter_mut().zip(&chunk.strength[own]).for_each(|(d, strength)| *d *= strength);
                }
            }
            // x_j += P_ij x_i for the rows before.
            product(
                simd,
                [i, value_dim, 1],
                Lhs { data: &matrix[i * stride..], row_stride: 1, col_stride: 1 },
                Rhs { data: row, stride: value_dim },
                TileMut { data: before, stride: value_dim },
                Start::Keep,
            );
        }
        if !chunk.strength.is_empty() {
            part.resize(writes * value_dim, 0.0);
            multiply(simd, [writes, value_dim, key_dim], &x.a_faded, state, part, Start::Zero);
            product(
                simd,
                [writes, value_dim, writes],
                Lhs { data: &x.ak, row_stride: stride, col_stride: 1 },
                Rhs { data: &all_solved, stride: value_dim },
                TileMut { data: part, stride: value_dim },
                Start::Keep,
            );
            let rows = grads.strength.iter_mut().zip(&*part).zip(&grads.v);
            rows.for_each(|((d, y), dv)| *d = y * dv);
        }
        // The state before, and the erasers' share of it.
        part.resize(writes * key_dim, 0.0);
        multiply(simd, [writes, key_dim, value_dim], d_solved, &turned_state, part, Start::Zero);
        for (w, (da, part)) in grads.a.chunks_exact_mut(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
            x.fading.fade(part, a_at(w), da);
        }
        multiply_turned(simd, [key_dim, value_dim, writes], &x.a_faded, key_dim, d_solved, d_state);
        // Scores of the erasers.
        let x_faded = std::mem::take(&mut x.a_faded);
        let erasers = Pairs { x: chunk.a, x_faded: &x_faded, at: &a_at, seen: &|w| w, y: chunk.k };
        score_gradients(
            simd,
            d_solved,
            &all_written,
            value_dim,
            stride,
            &|w| w,
            [&mut *turned, &mut *scores],
        );
        erasers.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.a, &mut grads.k]);
        if !tied {
            let erasers = Pairs { x: chunk.a, x_faded: &x_faded, at: &a_at, seen: &|w| w, y: chunk.b };
            score_gradients(
                simd,
                d_solved,
                &all_solved,
                value_dim,
                stride,
                &|w| w,
                [&mut *turned, &mut *scores],
            );
            erasers.run(
                simd,
                scores,
                x,
                [&mut *part, &mut *faded, &mut *weights],
                [&mut grads.a, &mut grads.b],
            );
            grads.v.copy_from_slice(d_written);
            multiply_turned(simd, [writes, value_dim, writes], &x.ak, stride, d_solved, &mut grads.v);
        }
        x.a_faded = x_faded;
    } else {
        grads.v.copy_from_slice(d_written);
    }

    // The queries: the state before, and their scores.
    part.resize(len * key_dim, 0.0);
    multiply(simd, [len, key_dim, value_dim], d_reads, &turned_state, part, Start::Zero);
    if o.norm {
        let rows = part.chunks_exact_mut(key_dim).zip(x.q_faded.chunks_exact(key_dim)).zip(d_norms);
        for ((part, q), d) in rows {
            part.iter_mut().zip(z).for_each(|(part, z)| *part += d * z);
            d_z.iter_mut().zip(q).for_each(|(d_z, q)| *d_z += d * q);
        }
    }
    for (i, (dq, part)) in grads.q.chunks_exact_mut(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
        x.fading.fade(part, q_at(i), dq);
    }
    multiply_turned(simd, [key_dim, value_dim, len], &x.q_faded, key_dim, d_reads, d_state);
    score_gradients(simd, d_reads, &all_written, value_dim, stride, &seen, [&mut *turned, &mut *scores]);
    for (i, d) in d_norms.iter().enumerate().filter(|_| o.norm) {
        scores[i * stride..][..seen(i)].iter_mut().for_each(|score| *score += d);
    }
    let own_scores: Vec<f32> = (0..len * own).map(|i| std::mem::take(&mut scores[i * stride + i])).collect();
    let x_faded = std::mem::take(&mut x.q_faded);
    let readers = |i: usize| o.seen(i).min(writes);
    let queries = Pairs { x: chunk.q, x_faded: &x_faded, at: &q_at, seen: &readers, y: chunk.k };
    queries.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.q, &mut grads.k]);
    if o.erase == Erase::Untied {
        score_gradients(simd, d_reads, &all_solved, value_dim, stride, &seen, [&mut *turned, &mut *scores]);
        let queries = Pairs { x: chunk.q, x_faded: &x_faded, at: &q_at, seen: &readers, y: chunk.b };
        queries.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.q, &mut grads.b]);
    }
    x.q_faded = x_faded;

    // Decays.
    let mut decays = |rows: &[f32], d_rows: &[f32], sign: f64, at: &dyn Fn(usize) -> Option<usize>| {
        for (i, (x, dx)) in rows.chunks_exact(key_dim).zip(d_rows.chunks_exact(key_dim)).enumerate() {
            sum_gradients(d_sums, width, at(i), sign, x, dx);
        }
    };
    decays(chunk.q, &grads.q, 1.0, &q_at);
    decays(chunk.a, &grads.a, 1.0, &a_at);
    decays(chunk.k, &grads.k, -1.0, &Some);
    decays(chunk.b, &grads.b, -1.0, &Some);
    // A token's own write before it fades: nothing of it decays.
    for (i, d) in own_scores.into_iter().enumerate() {
        for c in 0..key_dim {
            let (q, k, u) = (chunk.q[i * key_dim + c], chunk.k[i * key_dim + c], chunk.bonus[c]);
            grads.q[i * key_dim + c] += d * u * k;
            grads.k[i * key_dim + c] += d * u * q;
            grads.bonus[c] += d * q * k;
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn values_decay<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    state: &[f32],
    d_reads: &[f32],
    d_state: &mut [f32],
    grads: &mut Chunk,
    x: &mut Scratch,
    back: &mut BackScratch,
) {
    let o = x.options;
    let Options { key_dim, value_dim, .. } = o;
    let (len, writes, stride) = (chunk.len, chunk.writes, x.stride);
    let BackScratch { scores, turned, d_written, part, faded, weights, d_sums, .. } = back;
    let at = |i: usize| read_at(&o, i);
    let seen = |i: usize| o.seen(i);

    // What is left at the end.
    let ended = turn(simd, d_state, key_dim, value_dim, turned).to_vec();
    d_written.resize(writes * value_dim, 0.0);
    multiply(simd, [writes, value_dim, key_dim], chunk.k, d_state, d_written, Start::Zero);
    weigh(d_written, value_dim, &x.fading.end, value_dim, &mut grads.v);
    weigh(chunk.v, value_dim, &x.fading.end, value_dim, &mut x.weighed);
    multiply(simd, [writes, key_dim, value_dim], &x.weighed, &ended, &mut grads.k, Start::Zero);
    let last = writes.saturating_sub(1);
    for (v, dv) in chunk.v.chunks_exact(value_dim).zip(grads.v.chunks_exact(value_dim)) {
        sum_gradients(d_sums, value_dim, Some(last), 1.0, v, dv);
    }
    for (row, d_row) in state.chunks_exact(value_dim).zip(d_state.chunks_exact_mut(value_dim)) {
        d_row.iter_mut().zip(&x.fading.loss).for_each(|(d, loss)| *d += loss * *d);
        sum_gradients(d_sums, value_dim, Some(last), 1.0, row, d_row);
    }

    // Reads: all of a row has faded alike.
    faded.resize(len * value_dim, 0.0);
    for (i, (d, out)) in d_reads.chunks_exact(value_dim).zip(faded.chunks_exact_mut(value_dim)).enumerate() {
        let down = at(i).map_or(&[][..], |at| &x.fading.down[at * value_dim..][..value_dim]);
        weigh(d, value_dim, down, down.len(), out);
        sum_gradients(d_sums, value_dim, at(i), 1.0, &x.reads[i * value_dim..][..value_dim], d);
    }
    let turned_state = turn(simd, state, key_dim, value_dim, turned).to_vec();
    multiply(simd, [len, key_dim, value_dim], faded, &turned_state, &mut grads.q, Start::Zero);
    multiply_turned(simd, [key_dim, value_dim, len], chunk.q, key_dim, faded, d_state);
    let near = (0..len).take_while(|i| at(*i).is_none_or(|at| at < x.fading.near)).count();
    weigh(chunk.v, value_dim, &x.fading.up, value_dim, &mut x.weighed);
    score_gradients(
        simd,
        faded,
        &x.weighed[..chunk.v.len()],
        value_dim,
        stride,
        &seen,
        [&mut *turned, &mut *scores],
    );
    part.resize(writes * value_dim, 0.0);
    part.fill(0.0);
    multiply_turned(simd, [writes, value_dim, near], &x.qk, stride, faded, part);
    let rows = grads.v.iter_mut().zip(&*part).zip(&x.fading.up);
    rows.for_each(|((dv, part), up)| *dv += part * up);
    weights.resize(value_dim, 0.0);
    for i in near..len {
        let d = &d_reads[i * value_dim..][..value_dim];
        for j in 0..seen(i) {
            x.fading.pair_weights(simd, at(i), j, weights);
            let score = x.qk[i * stride + j];
            let (v, dv) = (&chunk.v[j * value_dim..], &mut grads.v[j * value_dim..]);
            let mut sum = 0.0;
            for c in 0..value_dim {
                sum += d[c] * weights[c] * v[c];
                dv[c] += score * weights[c] * d[c];
            }
            scores[i * stride + j] = sum;
        }
    }
    for (j, (v, dv)) in chunk.v.chunks_exact(value_dim).zip(grads.v.chunks_exact(value_dim)).enumerate() {
        sum_gradients(d_sums, value_dim, Some(j), -1.0, v, dv);
    }
    product(
        simd,
        [len, key_dim, writes],
        Lhs { data: scores, row_stride: stride, col_stride: 1 },
        Rhs { data: chunk.k, stride: key_dim },
        TileMut { data: &mut grads.q, stride: key_dim },
        Start::Keep,
    );
    multiply_turned(simd, [writes, key_dim, len], scores, stride, chunk.q, &mut grads.k);
}
