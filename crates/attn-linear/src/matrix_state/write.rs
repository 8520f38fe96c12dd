//! The state after a chunk.

use super::attend::{Ahead, Scratch, written};
use super::fading::weigh;
use super::lanes::{lose, lose_each};
use super::scores::BLOCK;
use super::{Decay, Erase, Options, Piece};
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};

/// The state after the chunk, a block of its rows at a time; from [`Start::Zero`] what the chunk adds to it.
#[inline(always)]
pub(super) fn write<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    state: &mut [f32],
    x: &mut Scratch,
    start: Start,
    ahead: Ahead<'_>,
) {
    let Options { key_dim, value_dim, decay, erase, .. } = x.options;
    let writes = chunk.writes;
    if writes == 0 {
        return;
    }
    let (state, z) = state.split_at_mut(x.options.matrix_len());
    let (loss, weighed) = (&x.fading.loss[..], &mut x.weighed);
    let all_written = written(chunk, &x.solved, erase);
    match decay {
        Decay::None => {}
        Decay::Scalar | Decay::Key => weigh(chunk.k, key_dim, &x.fading.end, x.fading.width, weighed),
        Decay::Value => weigh(chunk.v, value_dim, &x.fading.end, value_dim, weighed),
    }
    let (keys, values) = match decay {
        Decay::None => (chunk.k, all_written),
        Decay::Scalar | Decay::Key => (&weighed[..], all_written),
        Decay::Value => (chunk.k, &weighed[..]),
    };
    for first in (0..key_dim).step_by(BLOCK) {
        let rows = first..(first + BLOCK).min(key_dim);
        let block = &mut state[rows.start * value_dim..rows.end * value_dim];
        if start == Start::Keep {
            for (c, row) in rows.clone().zip(block.chunks_exact_mut(value_dim)) {
                fade(simd, if decay == Decay::Key { &loss[c..c + 1] } else { loss }, row);
            }
        }
        product(
            simd,
            [rows.len(), value_dim, writes],
            Lhs { data: &keys[first..], row_stride: 1, col_stride: key_dim },
            Rhs { data: values, stride: value_dim },
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
            weigh(chunk.b, key_dim, &x.fading.end, x.fading.width, &mut x.weighed);
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
            Decay::Scalar => (&x.fading.end, chunk.k),
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
