//! Sums of the true probabilities of a few queries, by key and by distance.
//!
//! ```text
//! P_ij = softmax_j(softmax_scale * q_i . k_j) over j <= p_i        p_i = i + n_kv - n_q
//! column_j = sum_i P_ij                                      diagonal_t = sum_i P_{i, p_i - t}
//! ```
//!
//! over the chosen rows `i`. The keys are read twice: once for the normaliser of each row, once for its probabilities, which
//! are recomputed tile by tile and never kept.

use super::{HeadRows, PANEL};
use attn_core::simd::{Isa, Select, Simd, SimdBase, SimdOp};
use attn_core::tile::{Rhs, Start, TileMut, exp2, product};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Keys of a tile.
const TILE: usize = 128;

/// The sums of one head.
#[derive(Debug)]
pub(crate) struct QuerySums {
    /// By key, `[n_kv]`.
    pub(crate) columns: Vec<f32>,
    /// By distance from the query's position, `[n_kv]`; 0 is the position itself.
    pub(crate) diagonals: Vec<f32>,
}

impl QuerySums {
    /// Over the query rows `rows`. Time `O(rows * n_kv * head_dim)`, memory `O(n_kv)`.
    pub(crate) fn of(
        isa: Isa,
        q: HeadRows<'_>,
        k: HeadRows<'_>,
        rows: Range<usize>,
        softmax_scale: f32,
    ) -> Self {
        let (n_kv, offset) = (k.len(), k.len() as isize - q.len() as isize);
        let mut sums = Self { columns: vec![0.0; n_kv], diagonals: vec![0.0; n_kv] };
        // Lanes before the start of the diagonal's axis: a distance below 0 has probability 0.
        let mut shifted = vec![0.0; n_kv + 2 * PANEL];
        for first in rows.clone().step_by(PANEL) {
            let rows = first..(first + PANEL).min(rows.end);
            let position = first as isize + offset;
            let (columns, diagonals) = (&mut sums.columns[..], &mut shifted[..]);
            isa.run(Panel { q, k, rows, position, scale: softmax_scale * LOG2_E, columns, diagonals });
        }
        sums.diagonals.copy_from_slice(&shifted[PANEL..PANEL + n_kv]);
        sums
    }
}

/// At most [`PANEL`] queries.
struct Panel<'a, 'o> {
    q: HeadRows<'a>,
    k: HeadRows<'a>,
    rows: Range<usize>,
    /// Of the first row, on the key axis.
    position: isize,
    /// Scores are logarithms to base 2.
    scale: f32,
    columns: &'o mut [f32],
    /// Distance `t` at `t + PANEL`.
    diagonals: &'o mut [f32],
}

impl SimdOp for Panel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let width = self.q.width();
        let lanes = self.rows.len();
        let last = self.position + lanes as isize - 1;
        let n_keys = (last + 1).clamp(0, self.k.len() as isize) as usize;
        let mut queries = vec![0.0; width * PANEL];
        self.q.turn(simd, self.rows.clone(), self.scale, &mut queries, PANEL);
        let (mut scores, mut scratch) = (vec![0.0; TILE * PANEL], Vec::new());
        let mut max = [f32::NEG_INFINITY; PANEL];
        let mut sum = [0.0f32; PANEL];
        let queries = Rhs { data: &queries, stride: PANEL };
        for first in (0..n_keys).step_by(TILE) {
            let keys = first..(first + TILE).min(n_keys);
            self.score(simd, &keys, queries, &mut scores, &mut scratch);
            absorb(simd, &scores[..keys.len() * PANEL], &mut max, &mut sum);
        }
        // A lane that sees nothing, or is none, has an infinite normaliser: all its probabilities are 0.
        let mut lse = [f32::INFINITY; PANEL];
        for lane in (0..lanes).filter(|lane| max[*lane] != f32::NEG_INFINITY) {
            lse[lane] = max[lane] + sum[lane].log2();
        }
        for first in (0..n_keys).step_by(TILE) {
            let keys = first..(first + TILE).min(n_keys);
            self.score(simd, &keys, queries, &mut scores, &mut scratch);
            for (j, row) in keys.zip(scores.chunks_exact_mut(PANEL)) {
                // Distance of lane 0; those of the others follow. Below -PANEL no lane sees the key.
                let start = self.position - j as isize + PANEL as isize;
                let diagonals = &mut self.diagonals[start as usize..][..PANEL];
                let mut column = S::f32s::splat(simd, 0.0);
                let step = S::f32s::LEN;
                for ((row, lse), diagonal) in
                    row.chunks_exact(step).zip(lse.chunks_exact(step)).zip(diagonals.chunks_exact_mut(step))
                {
                    let weight = exp2(simd, S::f32s::from_slice(simd, row) - S::f32s::from_slice(simd, lse));
                    column += weight;
                    (weight + S::f32s::from_slice(simd, diagonal)).store_slice(diagonal);
                }
                self.columns[j] += column.as_slice().iter().sum::<f32>();
            }
        }
    }
}

impl Panel<'_, '_> {
    /// Scores of a tile, `[keys, PANEL]`; -inf where a lane does not see the key.
    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        keys: &Range<usize>,
        queries: Rhs<'_>,
        scores: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let a = self.k.lhs(simd, keys.clone(), scratch);
        let c = TileMut { data: scores, stride: PANEL };
        product(simd, [keys.len(), PANEL, self.q.width()], a, queries, c, Start::Zero);
        for (j, row) in keys.clone().zip(scores.chunks_exact_mut(PANEL)) {
            // Lanes before `j - position` stand before the key.
            let hidden = (j as isize - self.position).clamp(0, PANEL as isize) as usize;
            row[..hidden].fill(f32::NEG_INFINITY);
        }
    }
}

/// Adds rows of scores (base 2) to the running maximum and sum of each lane.
#[inline(always)]
pub(super) fn absorb<S: Simd>(simd: S, scores: &[f32], max: &mut [f32; PANEL], sum: &mut [f32; PANEL]) {
    let step = S::f32s::LEN;
    for first in (0..PANEL).step_by(step) {
        let load = |from: &[f32]| S::f32s::from_slice(simd, &from[first..first + step]);
        let before = load(max);
        let mut highest = before;
        for row in scores.chunks_exact(PANEL) {
            highest = highest.max(load(row));
        }
        // Where nothing is visible yet, any finite reference does.
        let nothing = highest.simd_eq(S::f32s::splat(simd, f32::NEG_INFINITY));
        let reference = nothing.select(S::f32s::splat(simd, 0.0), highest);
        let mut total = load(sum) * exp2(simd, before - reference);
        for row in scores.chunks_exact(PANEL) {
            total += exp2(simd, load(row) - reference);
        }
        highest.store_slice(&mut max[first..first + step]);
        total.store_slice(&mut sum[first..first + step]);
    }
}
