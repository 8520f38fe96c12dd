//! Gradients of a chunk whose keys decay, or nothing does.

use super::pairs::{At, Pairs};
use super::products::{Lower, multiply, multiply_turned, score_gradients, turn};
use super::{BackScratch, sum_gradients};
use crate::matrix_state::attend::{erase_at, read_at, written};
use crate::matrix_state::fading::{Fading, weigh};
use crate::matrix_state::lanes::{add, add_scaled, dot_f64, lose};
use crate::matrix_state::scratch::Scratch;
use crate::matrix_state::solve::solve_back;
use crate::matrix_state::{Chunk, Erase, Options, Piece, Read};
use attn_core::simd::Simd;
use attn_core::tile::Start;

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn keys_decay<S: Simd>(
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
    let (len, writes, stride, width) = (chunk.len, chunk.writes, x.prepared.stride, x.prepared.fading.width);
    let own = usize::from(o.read == Read::Pre);
    let seen = |i: usize| (o.seen(i) + own).min(writes);
    let (state, z) = state.split_at(o.matrix_len());
    let (d_state, d_z) = d_state.split_at_mut(o.matrix_len());
    let (q_at, a_at) = (|i: usize| read_at(&o, i), |w: usize| erase_at(&o, w));
    let BackScratch {
        scores,
        turned,
        state_turned,
        ended,
        d_written,
        d_solved,
        part,
        faded,
        weights,
        d_sums,
        ..
    } = back;
    // Out of the scratch, so that the rest of it can change meanwhile.
    let solved = std::mem::take(&mut x.work.solved);
    let all_written = written(chunk, &solved, o.erase);
    let all_solved = solved.get(..writes * value_dim).unwrap_or_default();

    // What is left at the end: dS by the written rows, and the state before.
    d_written.resize(writes * value_dim, 0.0);
    weigh(chunk.k, key_dim, &x.prepared.fading.end, width, &mut x.work.weighed);
    multiply(simd, [writes, value_dim, key_dim], &x.work.weighed, d_state, d_written, Start::Zero);
    let qk = Lower { data: &x.prepared.qk, stride, rows: len, seen: &seen };
    qk.multiply_turned(simd, writes, d_reads, value_dim, d_written);
    d_written.iter_mut().zip(d_writes).for_each(|(d, more)| *d += more);
    turn(simd, d_state, key_dim, value_dim, ended);
    let mut ends = Ends { o: &o, ended, d_z, part: &mut *part, faded: &mut *faded, d_sums: &mut *d_sums };
    ends.gradients(simd, all_written, chunk.k, &x.prepared.fading, &mut grads.k);
    if o.erase == Erase::Untied {
        ends.gradients(simd, all_solved, chunk.b, &x.prepared.fading, &mut grads.b);
    }
    // The state before, as it has faded at the end.
    if let Some(last) = writes.checked_sub(1).filter(|_| width > 0) {
        let rows = state.chunks_exact(value_dim).zip(d_state.chunks_exact_mut(value_dim));
        for (c, (row, d_row)) in rows.enumerate() {
            let own = if width == 1 { 0 } else { c };
            lose(simd, x.prepared.fading.loss[own], d_row);
            d_sums[last * width + own] += dot_f64(row, d_row);
        }
        for (c, (z, d_z)) in z.iter().zip(&mut *d_z).enumerate() {
            let own = if width == 1 { 0 } else { c };
            *d_z += x.prepared.fading.loss[own] * *d_z;
            d_sums[last * width + own] += f64::from(*z) * f64::from(*d_z);
        }
    }

    turn(simd, state, key_dim, value_dim, state_turned);
    if o.erase != Erase::None {
        let tied = o.erase == Erase::Tied;
        if tied {
            d_solved.clone_from(d_written);
        } else {
            d_solved.resize(writes * value_dim, 0.0);
            weigh(chunk.b, key_dim, &x.prepared.fading.end, width, &mut x.work.weighed);
            // `d_state` has faded by now: what ends is in `ended`, transposed.
            let end = turn(simd, ended, value_dim, key_dim, turned);
            multiply(simd, [writes, value_dim, key_dim], &x.work.weighed, end, d_solved, Start::Zero);
            let qb = Lower { data: &x.prepared.qb, stride, rows: len, seen: &seen };
            qb.multiply_turned(simd, writes, d_reads, value_dim, d_solved);
        }
        let matrix = if tied { &x.prepared.ak } else { &x.prepared.ab };
        let size = [writes, value_dim];
        solve_back(simd, matrix, stride, size, chunk.strength, d_solved, &mut grads.v);
        if tied && chunk.strength.is_empty() {
            grads.v.copy_from_slice(d_solved);
        }
        if !chunk.strength.is_empty() {
            part.resize(writes * value_dim, 0.0);
            multiply(simd, [writes, value_dim, key_dim], &x.prepared.a_faded, state, part, Start::Zero);
            let ak = Lower { data: &x.prepared.ak, stride, rows: writes, seen: &|w| w };
            ak.multiply(simd, all_solved, value_dim, part);
            let rows = grads.strength.iter_mut().zip(&*part).zip(&grads.v);
            rows.for_each(|((d, y), dv)| *d = y * dv);
        }
        // The state before, and the erasers' share of it.
        part.resize(writes * key_dim, 0.0);
        multiply(simd, [writes, key_dim, value_dim], d_solved, state_turned, part, Start::Zero);
        for (w, (da, part)) in grads.a.chunks_exact_mut(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
            x.prepared.fading.fade(part, a_at(w), da);
        }
        multiply_turned(simd, [key_dim, value_dim, writes], &x.prepared.a_faded, d_solved, d_state);
        // Scores of the erasers.
        let x_faded = std::mem::take(&mut x.prepared.a_faded);
        let erasers = Pairs { x: chunk.a, x_faded: &x_faded, at: &a_at, seen: &|w| w, y: chunk.k };
        score_gradients(simd, d_solved, all_written, value_dim, stride, &|w| w, [&mut *turned, &mut *scores]);
        erasers.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.a, &mut grads.k]);
        if !tied {
            let erasers = Pairs { x: chunk.a, x_faded: &x_faded, at: &a_at, seen: &|w| w, y: chunk.b };
            score_gradients(
                simd,
                d_solved,
                all_solved,
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
            let ak = Lower { data: &x.prepared.ak, stride, rows: writes, seen: &|w| w };
            ak.multiply_turned(simd, writes, d_solved, value_dim, &mut grads.v);
        }
        x.prepared.a_faded = x_faded;
    } else {
        grads.v.copy_from_slice(d_written);
    }

    // The queries: the state before, and their scores.
    part.resize(len * key_dim, 0.0);
    multiply(simd, [len, key_dim, value_dim], d_reads, state_turned, part, Start::Zero);
    if o.norm {
        let rows = part.chunks_exact_mut(key_dim).zip(x.prepared.q_faded.chunks_exact(key_dim)).zip(d_norms);
        for ((part, q), d) in rows {
            add_scaled(simd, *d, z, part);
            add_scaled(simd, *d, q, d_z);
        }
    }
    for (i, (dq, part)) in grads.q.chunks_exact_mut(key_dim).zip(part.chunks_exact(key_dim)).enumerate() {
        x.prepared.fading.fade(part, q_at(i), dq);
    }
    multiply_turned(simd, [key_dim, value_dim, len], &x.prepared.q_faded, d_reads, d_state);
    score_gradients(simd, d_reads, all_written, value_dim, stride, &seen, [&mut *turned, &mut *scores]);
    for (i, d) in d_norms.iter().enumerate().filter(|_| o.norm) {
        scores[i * stride..][..seen(i)].iter_mut().for_each(|score| *score += d);
    }
    let own_scores: Vec<f32> = (0..len * own).map(|i| std::mem::take(&mut scores[i * stride + i])).collect();
    let x_faded = std::mem::take(&mut x.prepared.q_faded);
    let readers = |i: usize| o.seen(i).min(writes);
    let queries = Pairs { x: chunk.q, x_faded: &x_faded, at: &q_at, seen: &readers, y: chunk.k };
    queries.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.q, &mut grads.k]);
    if o.erase == Erase::Untied {
        score_gradients(simd, d_reads, all_solved, value_dim, stride, &seen, [&mut *turned, &mut *scores]);
        let queries = Pairs { x: chunk.q, x_faded: &x_faded, at: &q_at, seen: &readers, y: chunk.b };
        queries.run(simd, scores, x, [&mut *part, &mut *faded, &mut *weights], [&mut grads.q, &mut grads.b]);
    }
    x.prepared.q_faded = x_faded;
    x.work.solved = solved;

    // Decays.
    if width > 0 {
        sum_rows(d_sums, [key_dim, width], &q_at, 1.0, chunk.q, &grads.q);
        sum_rows(d_sums, [key_dim, width], &a_at, 1.0, chunk.a, &grads.a);
        sum_rows(d_sums, [key_dim, width], &Some, -1.0, chunk.k, &grads.k);
        sum_rows(d_sums, [key_dim, width], &Some, -1.0, chunk.b, &grads.b);
    }
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

/// What the state after the chunk gives to the rows written into it.
struct Ends<'a> {
    o: &'a Options,
    /// `dS^T [value_dim, key_dim]`.
    ended: &'a [f32],
    d_z: &'a [f32],
    part: &'a mut Vec<f32>,
    faded: &'a mut Vec<f32>,
    d_sums: &'a mut [f64],
}

impl Ends<'_> {
    /// Adds to the gradients of `rows [writes, key_dim]`, written with `values [writes, value_dim]`.
    #[inline(always)]
    fn gradients<S: Simd>(
        &mut self,
        simd: S,
        values: &[f32],
        rows: &[f32],
        fading: &Fading,
        d_rows: &mut [f32],
    ) {
        let Options { key_dim, value_dim, .. } = *self.o;
        let (writes, width) = (rows.len() / key_dim, fading.width);
        if writes == 0 {
            return;
        }
        self.part.resize(writes * key_dim, 0.0);
        multiply(simd, [writes, key_dim, value_dim], values, self.ended, self.part, Start::Zero);
        if !self.d_z.is_empty() {
            for row in self.part.chunks_exact_mut(key_dim) {
                add(simd, self.d_z, row);
            }
        }
        self.faded.resize(writes * key_dim, 0.0);
        weigh(self.part, key_dim, &fading.end, width, self.faded);
        add(simd, self.faded, d_rows);
        let end = |_: usize| Some(writes - 1);
        sum_rows(self.d_sums, [key_dim, width], &end, 1.0, rows, self.faded);
    }
}

/// Adds `sign x o dx` of every row to the sums it stands at.
#[inline(always)]
fn sum_rows(d_sums: &mut [f64], [key_dim, width]: [usize; 2], at: At<'_>, sign: f64, x: &[f32], dx: &[f32]) {
    for (i, (x, dx)) in x.chunks_exact(key_dim).zip(dx.chunks_exact(key_dim)).enumerate() {
        sum_gradients(d_sums, width, at(i), sign, x, dx);
    }
}
