//! The state after a chunk.

use super::attend::{Ahead, On};
use super::fading::weigh;
use super::lanes::{lose, lose_each};
use super::scores::BLOCK;
use super::scratch::Working;
use super::{Decay, Erase, Options};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};

/// The state after the chunk, a block of its rows at a time; or, from [`Start::Zero`] and without an untied erase, what the
/// chunk adds to it.
#[inline(always)]
pub(super) fn write<S: Simd>(
    simd: S,
    on: &On<'_>,
    state: &mut [f32],
    x: &mut Working,
    start: Start,
    ahead: Ahead<'_>,
) {
    let On { o, chunk, prepared, .. } = *on;
    let Options { key_dim, value_dim, decay, erase, .. } = *o;
    let writes = chunk.writes;
    if writes == 0 {
        return;
    }
    let (state, z) = state.split_at_mut(o.matrix_len());
    let fading = &prepared.fading;
    let (loss, weighed) = (&fading.loss[..], &mut x.weighed);
    let written = on.written(&x.solved);
    match decay {
        Decay::None => {}
        Decay::Scalar | Decay::Key => weigh(chunk.k, key_dim, &fading.end, fading.width, weighed),
        Decay::Value => weigh(chunk.v, value_dim, &fading.end, value_dim, weighed),
    }
    let (keys, values) = match decay {
        Decay::None => (chunk.k, written),
        Decay::Scalar | Decay::Key => (&weighed[..], written),
        Decay::Value => (chunk.k, Rhs { data: &weighed[..], stride: value_dim }),
    };
    for first in (0..key_dim).step_by(BLOCK) {
        let rows = first..(first + BLOCK).min(key_dim);
        let block = &mut state[rows.start * value_dim..rows.end * value_dim];
        for (c, row) in rows.clone().zip(block.chunks_exact_mut(value_dim)).filter(|_| start == Start::Keep) {
            fade(simd, if decay == Decay::Key { &loss[c..c + 1] } else { loss }, row);
        }
        product(
            simd,
            [rows.len(), value_dim, writes],
            Lhs { data: &keys[first..], row_stride: 1, col_stride: key_dim },
            values,
            TileMut { data: block, stride: value_dim },
            start,
        );
        ahead();
    }
    if start == Start::Keep {
        fade(simd, loss, z);
    }
    if erase == Erase::Untied {
        let directions = if decay == Decay::None {
            chunk.b
        } else {
            weigh(chunk.b, key_dim, &fading.end, fading.width, &mut x.weighed);
            &x.weighed
        };
        product(
            simd,
            [key_dim, value_dim, writes],
            Lhs { data: directions, row_stride: 1, col_stride: key_dim },
            Rhs { data: &x.solved, stride: value_dim },
            TileMut { data: state, stride: value_dim },
            Start::Keep,
        );
    }
    if !z.is_empty() {
        let (weights, keys) = match decay {
            Decay::None | Decay::Value => (&x.ones, chunk.k),
            Decay::Scalar => (&fading.end, chunk.k),
            Decay::Key => (&x.ones, &x.weighed[..chunk.k.len()]),
        };
        product(
            simd,
            [1, key_dim, writes],
            Lhs { data: weights, row_stride: 0, col_stride: 1 },
            Rhs { data: keys, stride: key_dim },
            TileMut { data: z, stride: key_dim },
            start,
        );
    }
}

/// `row <- row + loss o row`, with no loss, one or one a number.
#[inline(always)]
pub(super) fn fade<S: Simd>(simd: S, loss: &[f32], row: &mut [f32]) {
    match *loss {
        [] => {}
        [loss] => lose(simd, loss, row),
        _ => lose_each(simd, loss, row),
    }
}
