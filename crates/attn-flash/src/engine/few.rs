//! A few queries against many keys: decoding.
//!
//! With one row of a few heads there is nothing to put into the vector lanes but the channels. Keys and values are read
//! once for all queries of the task, in the type they are stored in:
//!
//! ```text
//! s_lj = softmax_scale q_l . k_j      channels in the lanes, one sum across the lanes a score
//! w_lj = e^(s_lj - m_l)               keys in the lanes
//! acc_l += w_lj v_j                   channels in the lanes
//! ```
//!
//! The work is bound by reading: rows are asked for [`AHEAD`] bytes before they are needed.

use super::Spec;
use super::chunks::for_each_chunk;
use super::finish::emit;
use super::panel::{Segment, segments, spans_of};
use super::problem::Problem;
use super::rows::{HeadRows, KeyRows};
use super::tasks::Task;
use attn_core::mask::{Cover, Mask};
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{MAX_LANES, Stored, all_finite, exp2, load4_padded, prefetch};
use attn_core::view::Rows;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Most queries of a task that runs here; more are faster side by side in the lanes.
pub(super) const FEW: usize = 4;
/// Keys whose scores are weighed together.
const BLOCK: usize = 64;
/// How far ahead rows are asked for.
const AHEAD: usize = 4096;
/// Channels of the widest group of vectors; rows of queries and accumulators are padded to it.
const GROUP: usize = 4 * MAX_LANES;

/// A thread's scratch.
#[derive(Default)]
pub(super) struct FewScratch {
    /// `[FEW, width padded to GROUP]`, scaled.
    q: Vec<f32>,
    /// `[FEW, width padded to GROUP]`.
    acc: Vec<f32>,
    /// `[FEW, BLOCK]`.
    scores: Vec<f32>,
    /// `[width]`.
    row: Vec<f32>,
}

/// Running maximum and sum of one query, as in `online_softmax`.
#[derive(Debug, Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl Running {
    /// `m`, or 0 before anything was seen.
    fn reference(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }
}

/// Runs a task of at most [`FEW`] queries.
#[inline(always)]
pub(super) fn attend<S: Simd, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    simd: S,
    problem: &Problem<'_>,
    spec: &Spec<'_, M, C>,
    scratch: &mut FewScratch,
    mut task: Task<'_>,
) {
    let shape = problem.shape();
    let (k_rows, v_rows) = problem.kv_rows(task.sequence, shape.kv_head(task.heads.start));
    let n_lanes = task.heads.len() * task.rows.len();
    let segments = segments(&task, 0..n_lanes);
    let (width, width_v) = (shape.head_dim.next_multiple_of(GROUP), shape.head_dim_v.next_multiple_of(GROUP));

    let FewScratch { q, acc, scores, row } = scratch;
    q.clear();
    q.resize(FEW * width, 0.0);
    acc.clear();
    acc.resize(FEW * width_v, 0.0);
    scores.resize(FEW * BLOCK, 0.0);
    row.resize(shape.head_dim_v, 0.0);
    for segment in &segments {
        let rows = problem.q_rows(task.sequence, segment.head.head);
        for (lane, i) in segment.lanes() {
            let q = &mut q[lane * width..][..shape.head_dim];
            rows.slice(i..i + 1).copy_to(q);
            q.iter_mut().for_each(|q| *q *= spec.softmax_scale);
        }
    }

    let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; FEW];
    let spans = spans_of(problem, spec, &task, &segments);
    let key_bias = spec.key_bias_of(problem, &task);
    let edges = Edges { spec, segments: &segments, key_bias };
    for_each_chunk(&spans, BLOCK, |ranges| {
        let n_keys = ranges.iter().map(Range::len).sum::<usize>();
        each_piece(&k_rows, ranges, |at, rows| {
            with_lanes(n_lanes, simd, Scores { rows, q, width, scores: &mut scores[at..] });
        });
        let suspect = edges.apply(scores, ranges);
        for (lane, running) in running.iter_mut().enumerate().take(n_lanes) {
            let scores = &mut scores[lane * BLOCK..][..n_keys];
            let acc = &mut acc[lane * width_v..][..width_v];
            simd.vectorize(
                #[inline(always)]
                || weigh(simd, scores, running, acc),
            );
        }
        each_piece(&v_rows, ranges, |at, rows| {
            let add = |keys: Range<usize>, scores: &[f32], acc: &mut [f32]| {
                let rows = rows.slice(keys.clone());
                with_lanes(
                    n_lanes,
                    simd,
                    Values { rows, weights: &scores[at + keys.start..], acc, width: width_v },
                );
            };
            if suspect {
                each_finite_run(rows, row, |run| match run {
                    Run::Finite(keys) => add(keys, scores, acc),
                    Run::Poisoned(key, row) => {
                        // A weight of 0 times NaN or infinity would leak what the query must not see.
                        for lane in (0..n_lanes).filter(|lane| scores[lane * BLOCK + at + key] != 0.0) {
                            let weight = scores[lane * BLOCK + at + key];
                            acc[lane * width_v..].iter_mut().zip(row).for_each(|(a, x)| *a += weight * x);
                        }
                    }
                });
            } else {
                add(0..rows.len(), scores, acc);
            }
        });
    });

    for segment in &segments {
        let sink = spec.sinks.map(|sinks| sinks[segment.head.head]);
        for (lane, i) in segment.lanes() {
            let state = (running[lane].max, running[lane].sum);
            let acc = &acc[lane * width_v..][..shape.head_dim_v];
            let place = (segment.head.head - task.heads.start, i - task.rows.start);
            emit(&mut task.out, place, lane, acc, state, sink);
        }
    }
}

/// Calls `visit` with each stored piece of the keys and its place among them.
#[inline(always)]
fn each_piece<'a>(rows: &KeyRows<'a>, ranges: &[Range<usize>], mut visit: impl FnMut(usize, HeadRows<'a>)) {
    let mut at = 0;
    for range in ranges {
        let mut keys = range.clone();
        while !keys.is_empty() {
            let piece = rows.piece(keys.clone());
            let len = piece.len();
            visit(at, piece);
            at += len;
            keys.start += len;
        }
    }
}

/// Some rows of values, and whether they are finite.
enum Run<'a> {
    Finite(Range<usize>),
    Poisoned(usize, &'a [f32]),
}

/// Cuts rows where one is not finite. `row` is scratch.
fn each_finite_run(rows: HeadRows<'_>, row: &mut [f32], mut visit: impl FnMut(Run<'_>)) {
    let mut start = 0;
    for key in 0..rows.len() {
        rows.slice(key..key + 1).copy_to(row);
        if !all_finite(row) {
            visit(Run::Finite(start..key));
            visit(Run::Poisoned(key, row));
            start = key + 1;
        }
    }
    visit(Run::Finite(start..rows.len()));
}

/// What happens to scores besides the product.
struct Edges<'a, M: ?Sized, C: ?Sized> {
    spec: &'a Spec<'a, M, C>,
    segments: &'a [Segment],
    key_bias: Option<&'a [f32]>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Edges<'_, M, C> {
    /// Score mod, key bias and mask; returns whether a query may have to be kept from a key's value.
    #[inline(always)]
    fn apply(&self, scores: &mut [f32], ranges: &[Range<usize>]) -> bool {
        let (mask, score_mod) = (self.spec.mask, self.spec.score_mod);
        let mut suspect = !score_mod.is_identity();
        let mut at = 0;
        for range in ranges {
            for segment in self.segments {
                let cover = mask.cover(segment.head, segment.rows.clone(), range.clone());
                suspect |= cover != Cover::Full;
                if cover == Cover::Full && score_mod.is_identity() && self.key_bias.is_none() {
                    continue;
                }
                for (lane, i) in segment.lanes() {
                    let scores = &mut scores[lane * BLOCK + at..][..range.len()];
                    for (score, j) in scores.iter_mut().zip(range.clone()) {
                        let pair = segment.head.pair(i, j);
                        let seen = cover == Cover::Full || (cover == Cover::Partial && mask.sees(pair));
                        let bias = self.key_bias.map_or(0.0, |bias| bias[j]);
                        let changed = score_mod.apply(*score, pair) + bias;
                        *score = if seen { changed } else { f32::NEG_INFINITY };
                    }
                }
            }
            at += range.len();
        }
        suspect
    }
}

/// Turns the scores of one query into weights, and brings its sum and accumulator to the new reference.
#[inline(always)]
fn weigh<S: Simd>(simd: S, scores: &mut [f32], running: &mut Running, acc: &mut [f32]) {
    let max = scores.iter().fold(running.max, |max, s| max.max(*s));
    if max > running.max {
        let moved = Running { max, ..*running };
        let factor = if running.sum == 0.0 { 0.0 } else { (running.max - moved.reference()).exp() };
        running.sum *= factor;
        acc.iter_mut().for_each(|a| *a *= factor);
        running.max = max;
    }
    let reference = S::f32s::splat(simd, running.reference());
    let mut sum = S::f32s::splat(simd, 0.0);
    let mut chunks = scores.chunks_exact_mut(S::f32s::LEN);
    for chunk in &mut chunks {
        let weight = exp2(simd, (S::f32s::from_slice(simd, chunk) - reference) * LOG2_E);
        weight.store_slice(chunk);
        sum += weight;
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let mut padded = [f32::NEG_INFINITY; MAX_LANES];
        padded[..rest.len()].copy_from_slice(rest);
        let padded = &mut padded[..S::f32s::LEN];
        let weight = exp2(simd, (S::f32s::from_slice(simd, padded) - reference) * LOG2_E);
        weight.store_slice(padded);
        sum += weight;
        rest.copy_from_slice(&padded[..rest.len()]);
    }
    running.sum += sum.as_slice().iter().sum::<f32>();
}

/// Work on rows for `L` queries at a time, whatever the rows' storage type.
trait LaneOp {
    fn run<S: Simd, const L: usize>(self, simd: S);
}

#[inline(always)]
fn with_lanes<S: Simd>(n_lanes: usize, simd: S, op: impl LaneOp) {
    match n_lanes {
        1 => op.run::<S, 1>(simd),
        2 => op.run::<S, 2>(simd),
        3 => op.run::<S, 3>(simd),
        _ => op.run::<S, 4>(simd),
    }
}

/// `scores[l * BLOCK + j] = q_l . row_j`.
struct Scores<'a, 's> {
    rows: HeadRows<'a>,
    q: &'s [f32],
    width: usize,
    scores: &'s mut [f32],
}

impl LaneOp for Scores<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const L: usize>(self, simd: S) {
        let Self { rows, q, width, scores } = self;
        match rows {
            HeadRows::F32(rows) => dots::<S, _, L>(simd, rows, q, width, scores),
            HeadRows::Bf16(rows) => dots::<S, _, L>(simd, rows, q, width, scores),
            HeadRows::F16(rows) => dots::<S, _, L>(simd, rows, q, width, scores),
            HeadRows::Int8 { rows, scales, block, first } => {
                dots::<S, _, L>(simd, rows, q, width, scores);
                for j in 0..rows.len() {
                    let scale = scales.row((first + j) / block)[0];
                    (0..L).for_each(|lane| scores[lane * BLOCK + j] *= scale);
                }
            }
        }
    }
}

#[inline(always)]
fn dots<S: Simd, E: Stored, const L: usize>(
    simd: S,
    rows: Rows<'_, E>,
    q: &[f32],
    width: usize,
    scores: &mut [f32],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let step = 4 * S::f32s::LEN;
            for j in 0..rows.len() {
                ask_ahead(&rows, j);
                let mut sums = [[S::f32s::splat(simd, 0.0); 2]; L];
                for (g, from) in rows.row(j).chunks(step).enumerate() {
                    let [a, b, c, d] = load4_padded(simd, from);
                    for (lane, sums) in sums.iter_mut().enumerate() {
                        let q = &q[lane * width + g * step..][..step];
                        let (qa, q) = q.split_at(S::f32s::LEN);
                        let (qb, q) = q.split_at(S::f32s::LEN);
                        let (qc, qd) = q.split_at(S::f32s::LEN);
                        sums[0] = a.mul_add(S::f32s::from_slice(simd, qa), sums[0]);
                        sums[1] = b.mul_add(S::f32s::from_slice(simd, qb), sums[1]);
                        sums[0] = c.mul_add(S::f32s::from_slice(simd, qc), sums[0]);
                        sums[1] = d.mul_add(S::f32s::from_slice(simd, qd), sums[1]);
                    }
                }
                for (lane, sums) in sums.iter().enumerate() {
                    scores[lane * BLOCK + j] = (sums[0] + sums[1]).reduce_sum();
                }
            }
        },
    );
}

/// `acc_l += sum_j weights[l * BLOCK + j] row_j`.
struct Values<'a, 's> {
    rows: HeadRows<'a>,
    weights: &'s [f32],
    acc: &'s mut [f32],
    width: usize,
}

impl LaneOp for Values<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const L: usize>(self, simd: S) {
        let Self { rows, weights, acc, width } = self;
        match rows {
            HeadRows::F32(rows) => accumulate::<S, _, L>(simd, rows, weights, acc, width, None),
            HeadRows::Bf16(rows) => accumulate::<S, _, L>(simd, rows, weights, acc, width, None),
            HeadRows::F16(rows) => accumulate::<S, _, L>(simd, rows, weights, acc, width, None),
            HeadRows::Int8 { rows, scales, block, first } => {
                let mut factors = [0.0; BLOCK];
                for (j, factor) in factors.iter_mut().enumerate().take(rows.len()) {
                    *factor = scales.row((first + j) / block)[0];
                }
                accumulate::<S, _, L>(simd, rows, weights, acc, width, Some(&factors));
            }
        }
    }
}

#[inline(always)]
fn accumulate<S: Simd, E: Stored, const L: usize>(
    simd: S,
    rows: Rows<'_, E>,
    weights: &[f32],
    acc: &mut [f32],
    width: usize,
    factors: Option<&[f32; BLOCK]>,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (lanes, step) = (S::f32s::LEN, 4 * S::f32s::LEN);
            for first in (0..rows.width()).step_by(step) {
                let mut sums = [[S::f32s::splat(simd, 0.0); 4]; L];
                for (lane, sums) in sums.iter_mut().enumerate() {
                    let acc = &acc[lane * width + first..][..step];
                    for (sum, acc) in sums.iter_mut().zip(acc.chunks_exact(lanes)) {
                        *sum = S::f32s::from_slice(simd, acc);
                    }
                }
                for j in 0..rows.len() {
                    if first == 0 {
                        ask_ahead(&rows, j);
                    }
                    let row = rows.row(j);
                    let four = load4_padded(simd, &row[first..(first + step).min(row.len())]);
                    let factor = factors.map_or(1.0, |factors| factors[j]);
                    for (lane, sums) in sums.iter_mut().enumerate() {
                        let weight = S::f32s::splat(simd, weights[lane * BLOCK + j] * factor);
                        for (sum, value) in sums.iter_mut().zip(four) {
                            *sum = value.mul_add(weight, *sum);
                        }
                    }
                }
                for (lane, sums) in sums.iter().enumerate() {
                    let acc = &mut acc[lane * width + first..][..step];
                    for (sum, acc) in sums.iter().zip(acc.chunks_exact_mut(lanes)) {
                        sum.store_slice(acc);
                    }
                }
            }
        },
    );
}

/// Asks for the row that will be needed some rows after row `j`.
#[inline(always)]
fn ask_ahead<E: Stored>(rows: &Rows<'_, E>, j: usize) {
    let row_bytes = (rows.width() * size_of::<E>()).max(1);
    let start = (j + AHEAD.div_ceil(row_bytes)) * rows.stride();
    if let Some(row) = rows.data().get(start..start + rows.width()) {
        prefetch(row);
    }
}
