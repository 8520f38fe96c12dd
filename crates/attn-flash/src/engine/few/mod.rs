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
//! Keys that lie apart are brought side by side first, a block at a time: the rows of a list of tokens are asked for in one
//! pass, some ahead of the one that is copied.
//!
//! The work is bound by reading. A few rows of keys and then the same rows of values are read, each from its first to
//! its last channel: two streams that the hardware's prefetchers follow. Asking for rows ahead of time disturbs them (14
//! instead of 29 GB/s on a Zen 4 core).

mod gathered;
pub(super) mod groups;
pub(super) mod kernels;
mod weights;

use super::Spec;
use super::chunks::{SHORT, for_each_chunk};
use super::finish::emit;
use super::panel::{Segment, segments, spans_of};
use super::problem::Problem;
use super::rows::{HeadRows, KeyRows};
use super::tasks::Task;
use aligned_vec::{AVec, ConstAlign};
use attn_core::mask::{Cover, Mask};
use attn_core::score::ScoreMod;
use attn_core::simd::Simd;
use attn_core::tile::all_finite;
use attn_core::view::Rows;
use gathered::Gathered;
use groups::Groups;
use kernels::{Plain, Scores, Values, with_lanes};
use std::ops::Range;
use weights::{Running, weigh};

/// Most queries of a task that runs here; more are faster side by side in the lanes.
pub(super) const FEW: usize = 4;
/// Keys whose visibility is asked for together.
pub(super) const BLOCK: usize = 128;
/// On cache lines of their own: a vector that lies on two takes twice as long to load, and queries are loaded for every
/// key.
pub(super) type Lines = AVec<f32, ConstAlign<64>>;

/// A thread's scratch.
pub(super) struct FewScratch {
    /// `[FEW, groups of channels]`, scaled.
    q: Lines,
    /// `[FEW, groups of channels]`.
    acc: Lines,
    /// `[FEW, BLOCK]`.
    scores: Lines,
    /// `[width]`.
    row: Vec<f32>,
    narrow: Narrow,
    gathered: Gathered,
}

impl Default for FewScratch {
    fn default() -> Self {
        let [q, acc, scores] = std::array::from_fn(|_| Lines::new(64));
        let (narrow, gathered) = (Narrow::default(), Gathered::default());
        Self { q, acc, scores, row: Vec::new(), narrow, gathered }
    }
}

/// Whether tasks of `spec` can run here.
pub(super) fn serves<M: ?Sized, C: ?Sized>(spec: &Spec<'_, M, C>) -> bool {
    spec.dropout.is_none() && spec.qk_norm.is_none()
}

/// Runs a task of at most [`FEW`] queries.
#[inline(always)]
pub(super) fn attend<S: Simd, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    simd: S,
    problem: &Problem<'_>,
    spec: &Spec<'_, M, C>,
    scratch: &mut FewScratch,
    task: &mut Task<'_>,
) {
    let shape = problem.shape();
    let (k_rows, v_rows) = problem.kv_rows(task.sequence, shape.kv_head(task.heads.start));
    let n_lanes = task.heads.len() * task.rows.len();
    let segments = segments(task, 0..n_lanes);
    let (groups, groups_v) = (Groups::of::<S>(shape.head_dim), Groups::of::<S>(shape.head_dim_v));
    let is_narrow = groups.is_narrow() || groups_v.is_narrow();

    let FewScratch { q, acc, scores, row, narrow, gathered } = scratch;
    q.clear();
    q.resize(FEW * groups.numbers(), 0.0);
    acc.clear();
    acc.resize(FEW * groups_v.numbers(), 0.0);
    scores.resize(FEW * BLOCK, 0.0);
    row.resize(groups_v.numbers(), 0.0);
    for segment in &segments {
        let rows = problem.q_rows(task.sequence, segment.head.head);
        for (lane, i) in segment.lanes() {
            let q = &mut q[lane * groups.numbers()..][..groups.numbers()];
            rows.slice(i..i + 1).copy_to(&mut q[..shape.head_dim]);
            q.iter_mut().for_each(|q| *q *= spec.softmax_scale);
            groups.spread(q);
        }
    }

    let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; FEW];
    let (spans, all_seen) = spans_of(problem, spec, task, &segments);
    let key_bias = spec.key_bias_of(problem, task);
    let edges = Edges { spec, segments: &segments, key_bias, all_seen };
    for_each_chunk(&spans, BLOCK, SHORT, |ranges| {
        let is_plain = edges.is_plain(ranges);
        let apart = (ranges.len() > 1).then(|| gathered.rows((&k_rows, &v_rows), ranges, [groups, groups_v]));
        if let Some((k, v)) = apart
            && is_plain
        {
            let (running, scores) = (&mut running, &mut *scores);
            return with_lanes(n_lanes, simd, Plain { k, v, q, running, scores, acc });
        }
        if let [range] = ranges
            && is_plain
            && !is_narrow
            && problem.has_one_kv_type()
        {
            each_piece(&k_rows, ranges, |at, k| {
                let keys = range.start + at..range.start + at + k.len();
                each_piece(&v_rows, &[keys], |at, v| {
                    let k = k.slice(at..at + v.len());
                    let (running, scores) = (&mut running, &mut *scores);
                    with_lanes(n_lanes, simd, Plain { k, v, q, running, scores, acc });
                });
            });
            return;
        }
        let n_keys = ranges.iter().map(Range::len).sum::<usize>();
        each_piece_or(&k_rows, ranges, apart.map(|(k, _)| k), |at, rows| {
            let rows = narrow.widened(rows, groups);
            with_lanes(n_lanes, simd, Scores { rows, q, scores: &mut scores[at..] });
        });
        let suspect = edges.apply(scores, ranges);
        for (lane, running) in running.iter_mut().enumerate().take(n_lanes) {
            let scores = &mut scores[lane * BLOCK..][..n_keys];
            let acc = &mut acc[lane * groups_v.numbers()..][..groups_v.numbers()];
            simd.vectorize(
                #[inline(always)]
                || weigh(simd, scores, running, acc),
            );
        }
        each_piece_or(&v_rows, ranges, apart.map(|(_, v)| v), |at, rows| {
            let mut add = |keys: Range<usize>, weights: &mut [f32], acc: &mut [f32]| {
                let rows = narrow.widened(rows.slice(keys.clone()), groups_v);
                let weights = &mut weights[at + keys.start..];
                with_lanes(n_lanes, simd, Values { rows, weights, acc });
            };
            if suspect {
                each_finite_run(rows, row, |run| match run {
                    Run::Finite(keys) => add(keys, scores, acc),
                    Run::Poisoned(key, row) => {
                        // A weight of 0 times NaN or infinity would leak what the query must not see.
                        for lane in (0..n_lanes).filter(|lane| scores[lane * BLOCK + at + key] != 0.0) {
                            let weight = scores[lane * BLOCK + at + key];
                            let acc = &mut acc[lane * groups_v.numbers()..];
                            row.iter().enumerate().for_each(|(c, x)| acc[groups_v.place(c)] += weight * x);
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
            let acc = groups_v.compact(&mut acc[lane * groups_v.numbers()..][..groups_v.numbers()]);
            let (place, number) = task.place(segment.head.head, i);
            emit(&mut task.out, place, number, acc, state, sink);
        }
    }
}

/// [`each_piece`], or all keys at once where they have been gathered.
#[inline(always)]
fn each_piece_or<'a>(
    rows: &KeyRows<'a>,
    ranges: &[Range<usize>],
    gathered: Option<HeadRows<'a>>,
    mut visit: impl FnMut(usize, HeadRows<'a>),
) {
    match gathered {
        Some(rows) => visit(0, rows),
        None => each_piece(rows, ranges, visit),
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

/// Rows that are narrower than a group of channels, copied and filled up with zeros.
#[derive(Default)]
struct Narrow {
    rows: Vec<f32>,
    filled: Vec<f32>,
}

impl Narrow {
    #[inline(always)]
    fn widened<'s>(&'s mut self, rows: HeadRows<'s>, groups: Groups) -> HeadRows<'s> {
        let (width, numbers, n_rows) = (rows.width(), groups.numbers(), rows.len());
        if !groups.is_narrow() || n_rows == 0 || width == 0 {
            return rows;
        }
        self.rows.resize(n_rows * width, 0.0);
        rows.copy_to(&mut self.rows);
        self.filled.clear();
        self.filled.resize(n_rows * numbers, 0.0);
        for (filled, row) in self.filled.chunks_exact_mut(numbers).zip(self.rows.chunks_exact(width)) {
            filled[..width].copy_from_slice(row);
        }
        HeadRows::F32(Rows::new(&self.filled, n_rows, numbers, numbers))
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
    let row = &mut row[..rows.width()];
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
    /// Whether each query is known to see all keys of the spans.
    all_seen: bool,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Edges<'_, M, C> {
    /// Whether every query sees all these keys and nothing but the product makes a score.
    fn is_plain(&self, ranges: &[Range<usize>]) -> bool {
        let seen = |s: &Segment| ranges.iter().all(|keys| self.cover(s, keys) == Cover::Full);
        self.spec.score_mod.is_identity() && self.key_bias.is_none() && self.segments.iter().all(seen)
    }

    fn cover(&self, segment: &Segment, keys: &Range<usize>) -> Cover {
        match self.all_seen {
            true => Cover::Full,
            false => self.spec.mask.cover(segment.head, segment.rows.clone(), keys.clone()),
        }
    }

    /// Score mod, key bias and mask; returns whether a query may have to be kept from a key's value.
    #[inline(always)]
    fn apply(&self, scores: &mut [f32], ranges: &[Range<usize>]) -> bool {
        let (mask, score_mod) = (self.spec.mask, self.spec.score_mod);
        let mut suspect = !score_mod.is_identity();
        let mut at = 0;
        for range in ranges {
            for segment in self.segments {
                let cover = self.cover(segment, range);
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
