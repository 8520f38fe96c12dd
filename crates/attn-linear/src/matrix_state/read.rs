//! What a chunk's tokens read.

use super::attend::{Ahead, Direct, On, read_at, rows_finite};
use super::fading::{Fading, weigh};
use super::lanes::{across, dot, scale, sum};
use super::scores::{BLOCK, Triangle};
use super::scratch::Working;
use super::{Decay, Erase, Options, Piece, Read};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{
    CausalProduct, Lhs, MAX_LANES, Rhs, Start, TileMut, all_finite, causal_product, product,
};
use attn_core::view::RowsMut;

/// Whether past and chunk are read at once: one triangle of scores, whose rows see what they see and no more.
pub(super) fn at_once(o: &Options) -> bool {
    o.erase != Erase::Untied && o.decay != Decay::Value
}

/// Rows, a block of them at a time, to where they are stored or to `reads`, and norms.
#[inline(always)]
pub(super) fn read<S: Simd>(
    simd: S,
    on: &On<'_>,
    state: &[f32],
    x: &mut Working,
    [reads, to_norms]: [&mut [f32]; 2],
    direct: Option<Direct<'_>>,
    ahead: Ahead<'_>,
) {
    let On { o, chunk, prepared: p, .. } = *on;
    let Options { key_dim, value_dim, .. } = *o;
    if !at_once(o) {
        return read_apart(simd, on, state, x, reads, ahead);
    }
    let own = usize::from(o.read == Read::Pre);
    let direct = direct.unwrap_or_else(|| Direct {
        rows: RowsMut::new(&mut reads[..chunk.len * value_dim], value_dim, value_dim),
        scale: 1.0,
    });
    let Direct { mut rows, scale } = direct;
    let (queries, factors) = match p.fading.key_width {
        0 => (chunk.q, &[][..]),
        1 => (chunk.q, &p.factors[..]),
        _ => (&p.q_faded[..], &[][..]),
    };
    let values = on.written(&x.solved);
    for first in (0..chunk.len).step_by(BLOCK) {
        let these = first..(first + BLOCK).min(chunk.len);
        let product = CausalProduct {
            a: Lhs { data: &queries[first * key_dim..], row_stride: key_dim, col_stride: 1 },
            b: Rhs { data: state, stride: value_dim },
            k: key_dim,
            factors: &factors[first.min(factors.len())..],
            w: Lhs { data: &p.qk[first * p.stride..], row_stride: p.stride, col_stride: 1 },
            v: values,
            first: o.seen(first) + own,
            each: o.writes,
            most: chunk.writes,
            scale,
        };
        causal_product(simd, &product, &mut rows.rows_mut(these));
        ahead();
    }
    if o.norm {
        norms(simd, on, &state[o.matrix_len()..], to_norms);
    }
}

/// Rows, a block of them at a time: with two triangles, or one whose values fade.
#[inline(always)]
fn read_apart<S: Simd>(
    simd: S,
    on: &On<'_>,
    state: &[f32],
    x: &mut Working,
    reads: &mut [f32],
    ahead: Ahead<'_>,
) {
    let On { o, chunk, prepared: p, .. } = *on;
    let Options { key_dim, value_dim, .. } = *o;
    let seen = |i: usize| o.seen(i).min(chunk.writes);
    let values = on.written(&x.solved);
    let solved = Rhs { data: &x.solved, stride: value_dim };
    // Decays of values weigh what the chunk gives.
    let within = chunk.writes > 0 && o.decay != Decay::Value;
    let finite =
        within && rows_finite(values, value_dim) && (o.erase != Erase::Untied || all_finite(&x.solved));
    let readers = if p.fading.key_width > 1 { &p.q_faded } else { chunk.q };
    for rows in (0..chunk.len).step_by(BLOCK).map(|first| first..(first + BLOCK).min(chunk.len)) {
        product(
            simd,
            [rows.len(), value_dim, key_dim],
            Lhs { data: &readers[rows.start * key_dim..], row_stride: key_dim, col_stride: 1 },
            Rhs { data: state, stride: value_dim },
            TileMut { data: &mut reads[rows.start * value_dim..], stride: value_dim },
            Start::Zero,
        );
        if p.fading.key_width == 1 {
            for i in rows.clone() {
                scale(simd, p.factors[i], &mut reads[i * value_dim..][..value_dim]);
            }
        }
        if within {
            let qk = Triangle { data: &p.qk, stride: p.stride, seen: &seen };
            // Half a block of rows, where a register tile is no higher, sees fewer columns.
            let height = if S::f32s::LEN == MAX_LANES { BLOCK / 2 } else { BLOCK };
            for start in rows.clone().step_by(height) {
                let rows = start..(start + height).min(rows.end);
                qk.multiply(simd, rows.clone(), values, value_dim, finite, reads);
                if o.erase == Erase::Untied {
                    let qb = Triangle { data: &p.qb, ..qk };
                    qb.multiply(simd, rows, solved, value_dim, finite, reads);
                }
            }
        }
        ahead();
    }
    if chunk.writes > 0 && o.decay == Decay::Value {
        let qk = Triangle { data: &p.qk, stride: p.stride, seen: &seen };
        fade_values(simd, chunk, &qk, o, &p.fading, &mut x.weighed, reads);
    }
}

/// `norms = (q o down) z + A 1`.
#[inline(always)]
fn norms<S: Simd>(simd: S, on: &On<'_>, z: &[f32], norms: &mut [f32]) {
    let On { o, chunk, prepared: p, .. } = *on;
    let key_dim = o.key_dim;
    let all = p.fading.key_width > 1;
    let rows = if all { &p.q_faded[..chunk.len * key_dim] } else { chunk.q };
    for (i, (q, norm)) in rows.chunks_exact(key_dim).zip(norms).enumerate() {
        let at = read_at(o, i).filter(|_| p.fading.key_width == 1);
        let past = across(simd, dot(simd, q, z)) * at.map_or(1.0, |at| p.fading.down[at]);
        let seen = o.seen(i).min(chunk.writes).next_multiple_of(MAX_LANES);
        *norm = past + across(simd, sum(simd, &p.qk[i * p.stride..][..seen]));
    }
}

/// What the chunk itself gives where values decay: `reads = down o (reads + A (V o up))`, or pair by pair.
#[inline(always)]
fn fade_values<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    qk: &Triangle<'_>,
    o: &Options,
    fading: &Fading,
    weighed: &mut [f32],
    reads: &mut [f32],
) {
    let width = o.value_dim;
    let near = (0..chunk.len).take_while(|i| read_at(o, *i).is_none_or(|at| at < fading.near)).count();
    weigh(chunk.v, width, &fading.up, width, weighed);
    let weighed = &mut weighed[..chunk.v.len()];
    let finite = all_finite(weighed);
    for first in (0..near).step_by(BLOCK) {
        let values = Rhs { data: weighed, stride: width };
        qk.multiply(simd, first..(first + BLOCK).min(near), values, width, finite, reads);
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
