//! The inner loops of decoding, over rows in the type they are stored in.
//!
//! Channels are taken in [`Groups`] of four vectors, keys one vector of scores at a time.

use super::super::rows::HeadRows;
use super::groups::Groups;
use super::weights::{Running, Scales, weigh};
use super::{BLOCK, FEW};
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{MAX_LANES, Stored, touch};
use attn_core::view::Rows;
use std::ops::Range;

/// Work for `L` queries at a time, whatever the rows' storage type.
pub(in crate::engine) trait LaneOp {
    fn run<S: Simd, const L: usize>(self, simd: S);
}

/// Three queries run as four: buffers hold [`FEW`] of them.
#[inline(always)]
pub(in crate::engine) fn with_lanes<S: Simd>(n_lanes: usize, simd: S, op: impl LaneOp) {
    match n_lanes {
        1 => op.run::<S, 1>(simd),
        2 => op.run::<S, 2>(simd),
        _ => op.run::<S, FEW>(simd),
    }
}

/// Keys that every query sees.
pub(super) struct Plain<'a, 's> {
    pub(super) k: HeadRows<'a>,
    pub(super) v: HeadRows<'a>,
    pub(super) q: &'s [f32],
    pub(super) running: &'s mut [Running; FEW],
    pub(super) scores: &'s mut [f32],
    pub(super) acc: &'s mut [f32],
}

impl LaneOp for Plain<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const L: usize>(self, simd: S) {
        match (self.k, self.v) {
            (HeadRows::F32(k), HeadRows::F32(v)) => self.rows::<S, _, L>(simd, k, v, None),
            (HeadRows::Bf16(k), HeadRows::Bf16(v)) => self.rows::<S, _, L>(simd, k, v, None),
            (HeadRows::F16(k), HeadRows::F16(v)) => self.rows::<S, _, L>(simd, k, v, None),
            (
                HeadRows::Int8 { rows: k, scales, block, first },
                HeadRows::Int8 { rows: v, scales: v_scales, block: v_block, first: v_first },
            ) => {
                let k_scales = Scales { scales, block, first };
                let v_scales = Scales { scales: v_scales, block: v_block, first: v_first };
                self.rows::<S, _, L>(simd, k, v, Some((k_scales, v_scales)));
            }
            _ => unreachable!("keys and values of one type run here"),
        }
    }
}

impl Plain<'_, '_> {
    #[inline(always)]
    fn rows<S: Simd, E: Stored, const L: usize>(
        self,
        simd: S,
        k: Rows<'_, E>,
        v: Rows<'_, E>,
        scales: Option<(Scales<'_>, Scales<'_>)>,
    ) {
        match (Groups::of::<S>(k.width()).len, Groups::of::<S>(v.width()).len) {
            // The loads of a known number of groups are put into an order of the compiler's own: `in_order` mends that for
            // one query, for more of them it would cost more than it gives.
            (1, 1) if L == 1 || !is_widest::<E>() => self.rows_in::<S, _, L, 1>(simd, k, v, scales),
            (2, 2) if L == 1 || !is_widest::<E>() => self.rows_in::<S, _, L, 2>(simd, k, v, scales),
            _ => self.rows_in::<S, _, L, 0>(simd, k, v, scales),
        }
    }

    /// [`Self::rows`] for `G` groups of channels, or any number of them if `G` is 0.
    #[inline(always)]
    fn rows_in<S: Simd, E: Stored, const L: usize, const G: usize>(
        self,
        simd: S,
        k: Rows<'_, E>,
        v: Rows<'_, E>,
        scales: Option<(Scales<'_>, Scales<'_>)>,
    ) {
        let Self { q, running, scores, acc, .. } = self;
        simd.vectorize(
            #[inline(always)]
            || {
                let k_groups = Groups::known::<S, G>(k.width());
                let v_groups = Groups::known::<S, G>(v.width());
                let numbers = v_groups.numbers();
                for first in (0..k.len()).step_by(S::f32s::LEN) {
                    let keys = first..(first + S::f32s::LEN).min(k.len());
                    dots::<S, _, L>(simd, k_groups, k, keys.clone(), q, scores);
                    for (lane, running) in running.iter_mut().enumerate().take(L) {
                        let scores = &mut scores[lane * BLOCK..][..keys.len()];
                        if let Some((k_scales, _)) = scales {
                            k_scales.apply(first, scores);
                        }
                        weigh(simd, scores, running, &mut acc[lane * numbers..][..numbers]);
                        if let Some((_, v_scales)) = scales {
                            v_scales.apply(first, scores);
                        }
                    }
                    accumulate::<S, _, L>(simd, v_groups, v, keys, scores, acc);
                }
            },
        );
    }
}

/// Work for one stored type of rows.
trait RowsOp {
    fn run<S: Simd, E: Stored>(self, simd: S, rows: Rows<'_, E>, scales: Option<Scales<'_>>);
}

#[inline(always)]
fn with_stored<S: Simd>(simd: S, rows: HeadRows<'_>, op: impl RowsOp) {
    match rows {
        HeadRows::F32(rows) => op.run(simd, rows, None),
        HeadRows::Bf16(rows) => op.run(simd, rows, None),
        HeadRows::F16(rows) => op.run(simd, rows, None),
        HeadRows::Int8 { rows, scales, block, first } => {
            op.run(simd, rows, Some(Scales { scales, block, first }));
        }
    }
}

/// `scores[l * BLOCK + j] = q_l . row_j`.
pub(in crate::engine) struct Scores<'a, 's> {
    pub(in crate::engine) rows: HeadRows<'a>,
    pub(in crate::engine) q: &'s [f32],
    pub(in crate::engine) scores: &'s mut [f32],
}

impl LaneOp for Scores<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const L: usize>(self, simd: S) {
        with_stored(simd, self.rows, ScoresOf::<L> { q: self.q, scores: self.scores });
    }
}

struct ScoresOf<'s, const L: usize> {
    q: &'s [f32],
    scores: &'s mut [f32],
}

impl<const L: usize> RowsOp for ScoresOf<'_, L> {
    #[inline(always)]
    fn run<S: Simd, E: Stored>(self, simd: S, rows: Rows<'_, E>, scales: Option<Scales<'_>>) {
        simd.vectorize(
            #[inline(always)]
            || {
                let groups = Groups::of::<S>(rows.width());
                dots::<S, _, L>(simd, groups, rows, 0..rows.len(), self.q, self.scores);
                if let Some(scales) = scales {
                    (0..L).for_each(|l| scales.apply(0, &mut self.scores[l * BLOCK..][..rows.len()]));
                }
            },
        );
    }
}

/// `acc_l += sum_j weights[l * BLOCK + j] row_j`; an int8 row's scale goes into its weight.
pub(in crate::engine) struct Values<'a, 's> {
    pub(in crate::engine) rows: HeadRows<'a>,
    pub(in crate::engine) weights: &'s mut [f32],
    pub(in crate::engine) acc: &'s mut [f32],
}

impl LaneOp for Values<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const L: usize>(self, simd: S) {
        with_stored(simd, self.rows, ValuesOf::<L> { weights: self.weights, acc: self.acc });
    }
}

struct ValuesOf<'s, const L: usize> {
    weights: &'s mut [f32],
    acc: &'s mut [f32],
}

impl<const L: usize> RowsOp for ValuesOf<'_, L> {
    #[inline(always)]
    fn run<S: Simd, E: Stored>(self, simd: S, rows: Rows<'_, E>, scales: Option<Scales<'_>>) {
        simd.vectorize(
            #[inline(always)]
            || {
                if let Some(scales) = scales {
                    (0..L).for_each(|l| scales.apply(0, &mut self.weights[l * BLOCK..][..rows.len()]));
                }
                let groups = Groups::of::<S>(rows.width());
                accumulate::<S, _, L>(simd, groups, rows, 0..rows.len(), self.weights, self.acc);
            },
        );
    }
}

/// Whether rows are as long as rows get, and reading them all that counts.
#[inline(always)]
fn is_widest<E>() -> bool {
    size_of::<E>() == size_of::<f32>()
}

/// Keeps the lines of a row in order where the loop waits for nothing else.
#[inline(always)]
fn in_order<E: Stored, const L: usize>(row: &[E]) {
    if L == 1 && is_widest::<E>() {
        touch(row);
    }
}

/// The products of `L` queries with rows `keys`, into the start of each lane's `scores`.
#[inline(always)]
fn dots<S: Simd, E: Stored, const L: usize>(
    simd: S,
    groups: Groups,
    rows: Rows<'_, E>,
    keys: Range<usize>,
    q: &[f32],
    scores: &mut [f32],
) {
    let lanes = S::f32s::LEN;
    for first in (0..keys.len()).step_by(lanes) {
        let n = lanes.min(keys.len() - first);
        let mut parts = [[S::f32s::splat(simd, 0.0); MAX_LANES]; L];
        for r in 0..n {
            let sums = dot::<S, E, L>(simd, rows.row(keys.start + first + r), groups, q);
            for (parts, sum) in parts.iter_mut().zip(sums) {
                parts[r] = sum;
            }
        }
        for (lane, parts) in parts.iter_mut().enumerate() {
            let sums = lane_sums(parts);
            let scores = &mut scores[lane * BLOCK + first..];
            if n == lanes {
                sums.store_slice(&mut scores[..lanes]);
            } else {
                scores[..n].copy_from_slice(&sums.as_slice()[..n]);
            }
        }
    }
}

/// Partial sums of `q_l . row`, a vector of them for each query.
#[inline(always)]
fn dot<S: Simd, E: Stored, const L: usize>(simd: S, row: &[E], groups: Groups, q: &[f32]) -> [S::f32s; L] {
    let (lanes, step) = (S::f32s::LEN, 4 * S::f32s::LEN);
    in_order::<E, L>(row);
    let mut sums = [[S::f32s::splat(simd, 0.0); 2]; L];
    for g in 0..groups.len {
        let four = E::load4(simd, &row[groups.start(g)..][..step]);
        for (lane, sums) in sums.iter_mut().enumerate() {
            let q = &q[(lane * groups.len + g) * step..][..step];
            for (i, (value, q)) in four.into_iter().zip(q.chunks_exact(lanes)).enumerate() {
                sums[i % 2] = value.mul_add(S::f32s::from_slice(simd, q), sums[i % 2]);
            }
        }
    }
    sums.map(
        #[inline(always)]
        |[a, b]| a + b,
    )
}

/// Lane `r` of the result is the sum of all lanes of `parts[r]`: neighbours are added until one vector is left.
#[inline(always)]
fn lane_sums<S: Simd, V: SimdFloat<S>>(parts: &mut [V; MAX_LANES]) -> V {
    let mut n = V::LEN;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            let (even, odd) = parts[2 * i].deinterleave(parts[2 * i + 1]);
            parts[i] = even + odd;
        }
    }
    parts[0]
}

/// Adds rows `keys` by their weights, which lie at the start of each lane of `weights`.
#[inline(always)]
fn accumulate<S: Simd, E: Stored, const L: usize>(
    simd: S,
    groups: Groups,
    rows: Rows<'_, E>,
    keys: Range<usize>,
    weights: &[f32],
    acc: &mut [f32],
) {
    let mut g = 0;
    while g < groups.len {
        let sum = Sum { rows: &rows, keys: keys.clone(), groups, g };
        if g + 2 > groups.len {
            sum.run::<S, L, 1>(simd, weights, acc);
            g += 1;
            continue;
        }
        // Sixteen accumulators at a time leave registers for the row, and whole rows are read in order.
        for lane in (0..L).step_by(2) {
            let (weights, acc) = (&weights[lane * BLOCK..], &mut acc[lane * groups.numbers()..]);
            if L == 1 {
                sum.run::<S, 1, 2>(simd, weights, acc);
            } else {
                sum.run::<S, 2, 2>(simd, weights, acc);
            }
        }
        g += 2;
    }
}

/// [`accumulate`] from group `g` on.
struct Sum<'r, 'a, E> {
    rows: &'r Rows<'a, E>,
    keys: Range<usize>,
    groups: Groups,
    g: usize,
}

impl<E: Stored> Sum<'_, '_, E> {
    /// For `L` queries and `G` groups.
    #[inline(always)]
    fn run<S: Simd, const L: usize, const G: usize>(&self, simd: S, weights: &[f32], acc: &mut [f32]) {
        let (lanes, step) = (S::f32s::LEN, 4 * S::f32s::LEN);
        let place = |lane: usize| lane * self.groups.numbers() + self.g * step;
        let mut sums = [[[S::f32s::splat(simd, 0.0); 4]; G]; L];
        for (lane, sums) in sums.iter_mut().enumerate() {
            let acc = &acc[place(lane)..][..G * step];
            for (sum, acc) in sums.as_flattened_mut().iter_mut().zip(acc.chunks_exact(lanes)) {
                *sum = S::f32s::from_slice(simd, acc);
            }
        }
        let starts: [usize; G] = std::array::from_fn(|g| self.groups.start(self.g + g));
        for (at, j) in self.keys.clone().enumerate() {
            let row = self.rows.row(j);
            in_order::<E, L>(row);
            for (g, start) in starts.into_iter().enumerate() {
                let four = E::load4(simd, &row[start..][..step]);
                for (lane, sums) in sums.iter_mut().enumerate() {
                    let weight = S::f32s::splat(simd, weights[lane * BLOCK + at]);
                    for (sum, value) in sums[g].iter_mut().zip(four) {
                        *sum = value.mul_add(weight, *sum);
                    }
                }
            }
        }
        for (lane, sums) in sums.iter().enumerate() {
            let acc = &mut acc[place(lane)..][..G * step];
            for (sum, acc) in sums.as_flattened().iter().zip(acc.chunks_exact_mut(lanes)) {
                sum.store_slice(acc);
            }
        }
    }
}
