//! What a chunk's tokens read.

use super::attend::{Ahead, Scratch, read_at, written};
use super::fading::{Fading, weigh};
use super::lanes::{across, dot, scale, sum};
use super::scores::{BLOCK, Triangle};
use super::{Decay, Erase, Options, Piece, Read};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, all_finite, product};

/// `reads`, a block of rows at a time.
#[inline(always)]
pub(super) fn read<S: Simd>(simd: S, chunk: &Piece<'_>, state: &[f32], x: &mut Scratch, ahead: Ahead<'_>) {
    let o = x.options;
    let Options { key_dim, value_dim, .. } = o;
    let own = usize::from(o.read == Read::Pre);
    let seen = |i: usize| (o.seen(i) + own).min(chunk.writes);
    let values = written(chunk, &x.solved, o.erase);
    // Decays of values weigh what the chunk gives.
    let within = chunk.writes > 0 && o.decay != Decay::Value;
    let finite = within && all_finite(values) && (o.erase != Erase::Untied || all_finite(&x.solved));
    let readers = if x.fading.key_width > 1 { &x.q_faded } else { chunk.q };
    for rows in (0..chunk.len).step_by(BLOCK).map(|first| first..(first + BLOCK).min(chunk.len)) {
        product(
            simd,
            [rows.len(), value_dim, key_dim],
            Lhs { data: &readers[rows.start * key_dim..], row_stride: key_dim, col_stride: 1 },
            Rhs { data: state, stride: value_dim },
            TileMut { data: &mut x.reads[rows.start * value_dim..], stride: value_dim },
            Start::Zero,
        );
        if x.fading.key_width == 1 {
            for i in rows.clone() {
                let down = read_at(&o, i).map_or(1.0, |at| x.fading.down[at]);
                scale(simd, down, &mut x.reads[i * value_dim..][..value_dim]);
            }
        }
        if within {
            let qk = Triangle { data: &x.qk, stride: x.stride, seen: &seen };
            qk.multiply(simd, rows.clone(), values, value_dim, finite, &mut x.reads);
            if o.erase == Erase::Untied {
                let qb = Triangle { data: &x.qb, ..qk };
                qb.multiply(simd, rows, &x.solved, value_dim, finite, &mut x.reads);
            }
        }
        ahead();
    }
    if o.norm {
        norms(simd, chunk, &state[o.matrix_len()..], x);
    }
    if chunk.writes > 0 && o.decay == Decay::Value {
        let qk = Triangle { data: &x.qk, stride: x.stride, seen: &seen };
        fade_values(simd, chunk, &qk, &o, &mut x.fading, &mut x.weighed, &mut x.reads);
    }
}

/// `norms = (q o down) z + A 1`.
#[inline(always)]
fn norms<S: Simd>(simd: S, chunk: &Piece<'_>, z: &[f32], x: &mut Scratch) {
    let (o, key_dim) = (x.options, x.options.key_dim);
    let all = x.fading.key_width > 1;
    let rows = if all { &x.q_faded[..chunk.len * key_dim] } else { chunk.q };
    for (i, (q, norm)) in rows.chunks_exact(key_dim).zip(&mut x.norms).enumerate() {
        let at = read_at(&o, i).filter(|_| x.fading.key_width == 1);
        let past = across(simd, dot(simd, q, z)) * at.map_or(1.0, |at| x.fading.down[at]);
        let seen = o.seen(i).min(chunk.writes).next_multiple_of(MAX_LANES);
        *norm = past + across(simd, sum(simd, &x.qk[i * x.stride..][..seen]));
    }
}

/// What the chunk itself gives where values decay: `reads = down o (reads + A (V o up))`, or pair by pair.
#[inline(always)]
fn fade_values<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    qk: &Triangle<'_>,
    o: &Options,
    fading: &mut Fading,
    weighed: &mut [f32],
    reads: &mut [f32],
) {
    let width = o.value_dim;
    let near = (0..chunk.len).take_while(|i| read_at(o, *i).is_none_or(|at| at < fading.near)).count();
    weigh(chunk.v, width, &fading.up, width, weighed);
    let weighed = &mut weighed[..chunk.v.len()];
    let finite = all_finite(weighed);
    for first in (0..near).step_by(BLOCK) {
        qk.multiply(simd, first..(first + BLOCK).min(near), weighed, width, finite, reads);
    }
    for (i, row) in reads.chunks_exact_mut(width).enumerate().take(chunk.len) {
        let at = read_at(o, i);
        if let Some(at) = at {
            row.iter_mut().zip(&fading.down[at * width..]).for_each(|(x, down)| *x *= down);
        }
        if i < near {
            continue;
        }
        let weights = &mut weighed[..width];
        for j in 0..(qk.seen)(i) {
            fading.pair_weights(simd, at, j, weights);
            let (score, v) = (qk.data[i * qk.stride + j], &chunk.v[j * width..]);
            row.iter_mut().zip(&*weights).zip(v).for_each(|((x, weight), v)| *x += score * weight * v);
        }
    }
}
