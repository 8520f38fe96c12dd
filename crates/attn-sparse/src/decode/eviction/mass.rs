//! How much weight queries give each key in dense causal attention, without a matrix of weights.
//!
//! ```text
//! mass_j = mean over the query heads of the group of sum_i e^(s_ij - lse_i)
//! ```
//!
//! Queries lie in the lanes, [`LANES`] of one head at a time, and keys pass by in tiles, twice: once for the log-sum-exp, once
//! for the weights, which are summed over the lanes. Memory `O(n_kv)` for each share of the queries.

use crate::decode::rows::widen_row;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdBase, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, exp2, product};
use attn_core::{AttnShape, Qkv};
use std::ops::Range;

/// Queries side by side.
const LANES: usize = 32;
/// Keys of a tile.
const TILE: usize = 64;
/// Shares of a head's queries: fixed, so that sums do not depend on the number of threads.
const SHARES: usize = 8;

/// Masses of the keys of every key/value head, `[batch * n_heads_kv][n_kv]`, from the last `n_rows` queries. The last query
/// stands at the last key, and there are no more queries than keys.
pub(super) fn masses(x: &Qkv<'_>, softmax_scale: f32, n_rows: usize) -> Vec<Vec<f64>> {
    let s = x.shape();
    let (first_row, blocks) = (s.n_q - n_rows, n_rows.div_ceil(LANES));
    let n_heads = s.batch * s.n_heads_q;
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); n_heads * SHARES];
    let isa = Isa::current();
    let factor = softmax_scale * std::f32::consts::LOG2_E;
    for_each_task(
        shares.iter_mut().enumerate(),
        || (),
        |(), (at, columns)| {
            let (head, share) = (at / SHARES, at % SHARES);
            let blocks = blocks * share / SHARES..blocks * (share + 1) / SHARES;
            let rows = first_row + blocks.start * LANES..(first_row + blocks.end * LANES).min(s.n_q);
            if rows.start < rows.end {
                columns.resize(s.n_kv, 0.0);
                isa.run(Columns {
                    x,
                    s,
                    factor,
                    head: [head / s.n_heads_q, head % s.n_heads_q],
                    rows,
                    columns,
                });
            }
        },
    );
    let group = s.group_size();
    let of_group = |shares: &[Vec<f64>]| {
        let mut mass = vec![0.0; s.n_kv];
        for columns in shares {
            mass.iter_mut().zip(columns).for_each(|(mass, column)| *mass += column / group as f64);
        }
        mass
    };
    shares.chunks(group * SHARES).map(of_group).collect()
}

/// Adds the weights of some rows of a query head to its columns.
struct Columns<'a> {
    x: &'a Qkv<'a>,
    s: AttnShape,
    /// Scale of scores, in base 2.
    factor: f32,
    head: [usize; 2],
    rows: Range<usize>,
    columns: &'a mut [f64],
}

impl SimdOp for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let d = self.s.head_dim;
        let (mut q, mut row) = (vec![0.0; d * LANES], vec![0.0; d]);
        let (mut keys, mut scores) = (vec![0.0; TILE * d], vec![0.0f32; TILE * LANES]);
        for first in self.rows.clone().step_by(LANES) {
            let lanes = LANES.min(self.rows.end - first);
            q.fill(0.0);
            for lane in 0..lanes {
                let [batch, head] = self.head;
                widen_row(self.x.q(), [batch, head, first + lane], &mut row);
                row.iter().enumerate().for_each(|(c, x)| q[c * LANES + lane] = self.factor * x);
            }
            // Row `first + lane` sees keys up to `first_key + lane`.
            let first_key = first + self.s.n_kv - self.s.n_q;
            let (mut max, mut sum) = ([f32::NEG_INFINITY; LANES], [0.0f32; LANES]);
            for tile in (0..first_key + lanes).step_by(TILE) {
                let n = self.score(simd, tile, first_key, lanes, &q, [&mut keys, &mut scores]);
                simd.vectorize(
                    #[inline(always)]
                    || absorb(simd, &mut scores[..n * LANES], &mut max, &mut sum),
                );
            }
            let mut lse = [f32::INFINITY; LANES];
            for lane in 0..lanes {
                lse[lane] = max[lane] + sum[lane].log2();
            }
            for tile in (0..first_key + lanes).step_by(TILE) {
                let n = self.score(simd, tile, first_key, lanes, &q, [&mut keys, &mut scores]);
                let columns = &mut self.columns[tile..tile + n];
                simd.vectorize(
                    #[inline(always)]
                    || collect(simd, &mut scores[..n * LANES], &lse, columns),
                );
            }
        }
    }
}

impl Columns<'_> {
    /// `scores [keys, LANES]` of the keys from `tile` on that some lane sees; returns how many.
    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        tile: usize,
        first_key: usize,
        lanes: usize,
        q: &[f32],
        [keys, scores]: [&mut Vec<f32>; 2],
    ) -> usize {
        let [batch, head] = self.head;
        let (d, kv_head) = (self.s.head_dim, self.s.kv_head(head));
        let n = TILE.min(first_key + lanes - tile);
        for (j, key) in keys.chunks_exact_mut(d).take(n).enumerate() {
            widen_row(self.x.k(), [batch, kv_head, tile + j], key);
        }
        product(
            simd,
            [n, LANES, d],
            Lhs { data: keys, row_stride: d, col_stride: 1 },
            Rhs { data: q, stride: LANES },
            TileMut { data: scores, stride: LANES },
            Start::Zero,
        );
        for (j, scores) in scores.chunks_exact_mut(LANES).take(n).enumerate() {
            let hidden = (tile + j).saturating_sub(first_key).min(LANES);
            scores[..hidden].fill(f32::NEG_INFINITY);
        }
        n
    }
}

/// The running maximum and sum of every lane.
#[inline(always)]
fn absorb<S: Simd>(simd: S, scores: &mut [f32], max: &mut [f32; LANES], sum: &mut [f32; LANES]) {
    let mut new = *max;
    for scores in scores.as_chunks::<LANES>().0 {
        for (new, score) in new.iter_mut().zip(scores) {
            *new = if *score > *new { *score } else { *new };
        }
    }
    for lane in 0..LANES {
        // Nothing seen yet: nothing to scale.
        sum[lane] *= if max[lane] == new[lane] { 1.0 } else { (max[lane] - new[lane]).exp2() };
    }
    *max = new;
    let from: [f32; LANES] = new.map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max });
    for scores in scores.as_chunks_mut::<LANES>().0 {
        weigh(simd, scores, &from);
        sum.iter_mut().zip(&*scores).for_each(|(sum, weight)| *sum += weight);
    }
}

/// Adds the weights of all lanes to each key's column.
#[inline(always)]
fn collect<S: Simd>(simd: S, scores: &mut [f32], lse: &[f32; LANES], columns: &mut [f64]) {
    for (scores, column) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(columns) {
        weigh(simd, scores, lse);
        *column += f64::from(scores.iter().sum::<f32>());
    }
}

/// `2^(score - from)`.
#[inline(always)]
fn weigh<S: Simd>(simd: S, scores: &mut [f32; LANES], from: &[f32; LANES]) {
    for (scores, from) in scores.chunks_exact_mut(S::f32s::LEN).zip(from.chunks_exact(S::f32s::LEN)) {
        let shifted = S::f32s::from_slice(simd, scores) - S::f32s::from_slice(simd, from);
        exp2(simd, shifted).store_slice(scores);
    }
}
