//! Gradients of a chunk whose values decay.

use super::products::{Lower, multiply, multiply_turned, score_gradients, turn};
use super::{BackScratch, sum_gradients};
use crate::matrix_state::attend::read_at;
use crate::matrix_state::fading::weigh;
use crate::matrix_state::lanes::{across, add_product, dot};
use crate::matrix_state::scratch::Scratch;
use crate::matrix_state::{Chunk, Options, Piece};
use attn_core::simd::Simd;
use attn_core::tile::Start;

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn values_decay<S: Simd>(
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
    let (len, writes, stride) = (chunk.len, chunk.writes, x.prepared.stride);
    let BackScratch { scores, turned, state_turned, ended, d_written, part, faded, weights, d_sums, .. } =
        back;
    let at = |i: usize| read_at(&o, i);
    let seen = |i: usize| o.seen(i);

    // What is left at the end.
    turn(simd, d_state, key_dim, value_dim, ended);
    d_written.resize(writes * value_dim, 0.0);
    multiply(simd, [writes, value_dim, key_dim], chunk.k, d_state, d_written, Start::Zero);
    weigh(d_written, value_dim, &x.prepared.fading.end, value_dim, &mut grads.v);
    weigh(chunk.v, value_dim, &x.prepared.fading.end, value_dim, &mut x.work.weighed);
    multiply(simd, [writes, key_dim, value_dim], &x.work.weighed, ended, &mut grads.k, Start::Zero);
    let last = writes.saturating_sub(1);
    for (v, dv) in chunk.v.chunks_exact(value_dim).zip(grads.v.chunks_exact(value_dim)) {
        sum_gradients(d_sums, value_dim, Some(last), 1.0, v, dv);
    }
    for (row, d_row) in state.chunks_exact(value_dim).zip(d_state.chunks_exact_mut(value_dim)) {
        d_row.iter_mut().zip(&x.prepared.fading.loss).for_each(|(d, loss)| *d += loss * *d);
        sum_gradients(d_sums, value_dim, Some(last), 1.0, row, d_row);
    }

    // Reads: all of a row has faded alike.
    faded.resize(len * value_dim, 0.0);
    for (i, (d, out)) in d_reads.chunks_exact(value_dim).zip(faded.chunks_exact_mut(value_dim)).enumerate() {
        let down = at(i).map_or(&[][..], |at| &x.prepared.fading.down[at * value_dim..][..value_dim]);
        weigh(d, value_dim, down, down.len(), out);
        sum_gradients(d_sums, value_dim, at(i), 1.0, &x.read.rows[i * value_dim..][..value_dim], d);
    }
    turn(simd, state, key_dim, value_dim, state_turned);
    multiply(simd, [len, key_dim, value_dim], faded, state_turned, &mut grads.q, Start::Zero);
    multiply_turned(simd, [key_dim, value_dim, len], chunk.q, faded, d_state);
    let near = (0..len).take_while(|i| at(*i).is_none_or(|at| at < x.prepared.fading.near)).count();
    weigh(chunk.v, value_dim, &x.prepared.fading.up, value_dim, &mut x.work.weighed);
    score_gradients(
        simd,
        faded,
        &x.work.weighed[..chunk.v.len()],
        value_dim,
        stride,
        &seen,
        [&mut *turned, &mut *scores],
    );
    part.resize(writes * value_dim, 0.0);
    part.fill(0.0);
    let qk = Lower { data: &x.prepared.qk, stride, rows: near, seen: &seen };
    qk.multiply_turned(simd, writes, faded, value_dim, part);
    add_product(simd, part, &x.prepared.fading.up, &mut grads.v);
    weights.resize(value_dim, 0.0);
    for i in near..len {
        let d = &d_reads[i * value_dim..][..value_dim];
        for j in 0..seen(i) {
            x.prepared.fading.pair_weights(simd, at(i), j, weights);
            let score = x.prepared.qk[i * stride + j];
            let (v, dv) = (&chunk.v[j * value_dim..], &mut grads.v[j * value_dim..]);
            let weighed = &mut faded[..value_dim];
            for (((out, d), weight), dv) in weighed.iter_mut().zip(d).zip(&*weights).zip(dv) {
                *out = d * weight;
                *dv += score * *out;
            }
            scores[i * stride + j] = across(simd, dot(simd, weighed, &v[..value_dim]));
        }
    }
    for (j, (v, dv)) in chunk.v.chunks_exact(value_dim).zip(grads.v.chunks_exact(value_dim)).enumerate() {
        sum_gradients(d_sums, value_dim, Some(j), -1.0, v, dv);
    }
    let scores = Lower { data: scores, stride, rows: len, seen: &seen };
    scores.multiply(simd, chunk.k, key_dim, &mut grads.q);
    scores.multiply_turned(simd, writes, chunk.q, key_dim, &mut grads.k);
}
