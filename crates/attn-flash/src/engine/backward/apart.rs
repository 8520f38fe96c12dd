//! Gradients of rows that stand apart: each row with its own short list of keys, work in proportion to the pairs.
//!
//! Side by side, rows visit what any of them sees; here a row's keys and values are gathered, and
//!
//! ```text
//! s_j = softmax_scale q.k_j     p_j = e^(score_mod(s_j) + key_bias_j - lse)     dp_j = dout.v_j
//! dr_j = p_j (dp_j - delta) softmax_scale score_mod'(s_j)                       dq = sum_j dr_j k_j
//! ```
//!
//! Then `dk_j += dr_j q` and `dv_j += p_j dout` are scattered. Rows come in batches: first their pairs are computed, row by
//! row; then shares of the keys take up what concerns them, in the order of the rows. The batches, the shares and the order
//! depend on the problem alone, so the sums have the same bits on any number of threads.
//!
//! Memory: f32 sums of the keys of one head, and the pairs of one batch of rows.

use super::scatter::{Pairs, Scatter, Share};
use super::{Pass, RowState};
use crate::engine::chunks::for_each_chunk;
use crate::engine::few::groups::Groups;
use crate::engine::few::kernels::{Scores, Values, with_lanes};
use crate::engine::few::{BLOCK, Lines};
use crate::engine::rows::HeadRows;
use attn_core::mask::{Head, Mask};
use attn_core::parallel::for_each_task;
use attn_core::score::ScoreMod;
use attn_core::simd::{Isa, Simd, SimdBase, SimdOp};
use attn_core::tile::exp2;
use attn_core::view::Rows;
use attn_core::{OutMut, OutRows};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Rows of a task.
const ROWS: usize = 16;
/// Rows of a batch, over all heads that share keys.
const BATCH: usize = 1024;
/// Shares of the keys of a sequence ...
const SHARES: usize = 32;
/// ... each of at least so many.
const SHARE: usize = 128;

/// Cuts the length axis of each sequence.
pub(super) fn cut(
    sequences: impl Iterator<Item = Range<usize>>,
    size: impl Fn(usize) -> usize,
) -> Vec<Vec<Range<usize>>> {
    let pieces = |all: Range<usize>| {
        let (size, end) = (size(all.len()), all.end);
        all.step_by(size).map(|first| first..(first + size).min(end)).collect()
    };
    sequences.map(pieces).collect()
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Pass<'_, M, C> {
    /// Writes the gradients of q, k and v; `key_sums [batch, n_heads_kv, n_kv]` those of the key bias, or empty.
    pub(super) fn run_apart(&self, state: RowState<'_>, [q, k, v]: [OutMut<'_>; 3], key_sums: &mut [f32]) {
        let (problem, shape) = (self.problem, self.problem.shape());
        let packed = problem.is_packed();
        let of_entry = if packed { problem.n_sequences() } else { shape.batch.min(1) };
        let rows = cut((0..of_entry).map(|s| problem.q_range(s)), |_| ROWS);
        let share = |n: usize| n.div_ceil(SHARES).max(SHARE);
        let shares = cut((0..of_entry).map(|s| problem.kv_range(s)), share);
        let (n_pieces, n_shares): (usize, usize) =
            (rows.iter().map(Vec::len).sum(), shares.iter().map(Vec::len).sum());
        let mut out_q: Vec<Option<OutRows<'_>>> = q.into_cuts(rows.concat()).into_iter().map(Some).collect();
        let mut out_kv: Vec<Option<(OutRows<'_>, OutRows<'_>)>> = {
            let both = k.into_cuts(shares.concat()).into_iter().zip(v.into_cuts(shares.concat()));
            both.map(Some).collect()
        };
        let isa = Isa::current();
        let mut kept: Vec<Pairs> = Vec::new();
        for batch in 0..shape.batch {
            let (mut first_piece, mut first_share): (usize, usize) = (0, 0);
            for (s, (rows, shares)) in rows.iter().zip(&shares).enumerate() {
                let sequence = if packed { s } else { batch };
                let (q_start, kv_start) = (problem.q_range(sequence).start, problem.kv_range(sequence).start);
                for kv_head in 0..shape.n_heads_kv {
                    let head = batch * shape.n_heads_kv + kv_head;
                    let mut take = |(at, keys): (usize, &Range<usize>)| -> Option<Share<'_>> {
                        let (out_k, out_v) = out_kv.get_mut(head * n_shares + first_share + at)?.take()?;
                        let zeros = |width: usize| vec![0.0; keys.len() * width];
                        let sums = if self.sum_keys { zeros(1) } else { Vec::new() };
                        let (grad_k, grad_v) = (zeros(shape.head_dim), zeros(shape.head_dim_v));
                        let keys = keys.start - kv_start..keys.end - kv_start;
                        Some(Share { place: at, keys, grad_k, grad_v, sums, out_k, out_v })
                    };
                    let mut of_keys: Vec<Share<'_>> =
                        shares.iter().enumerate().filter_map(&mut take).collect();
                    let ends: Vec<usize> = of_keys.iter().map(|share| share.keys.end).collect();
                    let group = shape.group_size();
                    let heads = kv_head * group..(kv_head + 1) * group;
                    let pieces_a_batch = (BATCH / ROWS / group.max(1)).max(1);
                    for (b, some) in rows.chunks(pieces_a_batch).enumerate() {
                        let mut tasks = Vec::with_capacity(group * some.len());
                        for head in heads.clone() {
                            for (at, rows) in some.iter().enumerate() {
                                let piece = first_piece + b * pieces_a_batch + at;
                                let place = (batch * shape.n_heads_q + head) * n_pieces + piece;
                                let Some(out) = out_q.get_mut(place).and_then(Option::take) else { continue };
                                let rows = rows.start - q_start..rows.end - q_start;
                                tasks.push((Head { batch: sequence, head }, rows, out));
                            }
                        }
                        if kept.len() < tasks.len() {
                            kept.resize_with(tasks.len(), Pairs::default);
                        }
                        let n_tasks = tasks.len();
                        for_each_task(
                            tasks.into_iter().zip(&mut kept),
                            || Scratch::new(self),
                            |scratch, ((head, rows, out), pairs)| {
                                let ends = &ends;
                                isa.run(RowPairs {
                                    pass: self,
                                    state,
                                    head,
                                    rows,
                                    ends,
                                    out,
                                    pairs,
                                    scratch,
                                });
                            },
                        );
                        let pairs = &kept[..n_tasks];
                        for_each_task(
                            of_keys.iter_mut(),
                            || (),
                            |(), share| {
                                let widths = [shape.head_dim, shape.head_dim_v];
                                isa.run(Scatter { share, pairs, n_shares: ends.len(), widths });
                            },
                        );
                    }
                    for share in &of_keys {
                        let first = head * shape.n_kv + kv_start + share.keys.start;
                        if let Some(sums) = key_sums.get_mut(first..first + share.sums.len()) {
                            sums.copy_from_slice(&share.sums);
                        }
                    }
                    for_each_task(
                        of_keys.into_iter(),
                        || (),
                        |(), mut share| {
                            store(&mut share.out_k, &share.grad_k, shape.head_dim);
                            store(&mut share.out_v, &share.grad_v, shape.head_dim_v);
                        },
                    );
                }
                (first_piece, first_share) = (first_piece + rows.len(), first_share + shares.len());
            }
        }
    }
}

pub(super) fn store(out: &mut OutRows<'_>, rows: &[f32], width: usize) {
    rows.chunks_exact(width.max(1)).enumerate().for_each(|(i, row)| out.store(i, row.iter().copied()));
}

/// A thread's scratch.
struct Scratch {
    /// Queries, scaled, and gradients of outputs, in groups of channels; and the gradient of the query.
    q: Lines,
    grad_out: Lines,
    grad_q: Lines,
    /// `[BLOCK, width]`, gathered.
    k: Lines,
    v: Lines,
    /// `[BLOCK]`.
    scores: Lines,
    dp: Lines,
    slopes: Lines,
    hidden: Vec<usize>,
}

impl Scratch {
    fn new<M: ?Sized, C: ?Sized>(pass: &Pass<'_, M, C>) -> Self {
        let shape = pass.problem.shape();
        let lines = |len: usize| {
            let mut lines = Lines::new(64);
            lines.resize(len, 0.0);
            lines
        };
        // At most two groups more than the width, whatever the instruction set.
        let [d, d_v] = [shape.head_dim, shape.head_dim_v].map(|width| width + 128);
        Self {
            q: lines(d),
            grad_out: lines(d_v),
            grad_q: lines(d),
            k: lines(BLOCK * d),
            v: lines(BLOCK * d_v),
            scores: lines(BLOCK),
            dp: lines(BLOCK),
            slopes: lines(BLOCK),
            hidden: Vec::new(),
        }
    }
}

/// The pairs of some rows, and the gradients of their queries.
struct RowPairs<'a, 'b, M: ?Sized, C: ?Sized> {
    pass: &'a Pass<'a, M, C>,
    state: RowState<'a>,
    head: Head,
    rows: Range<usize>,
    /// Where each share of the keys ends.
    ends: &'a [usize],
    out: OutRows<'b>,
    pairs: &'a mut Pairs,
    scratch: &'a mut Scratch,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for RowPairs<'_, '_, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { pass, state, head, rows, ends, mut out, pairs, scratch } = self;
        let (problem, spec, shape) = (pass.problem, pass.spec, pass.problem.shape());
        let (d, d_v) = (shape.head_dim, shape.head_dim_v);
        let (groups, groups_v) = (Groups::of::<S>(d), Groups::of::<S>(d_v));
        let [width, width_v] = [(groups, d), (groups_v, d_v)]
            .map(|(groups, width)| if groups.is_narrow() { groups.numbers() } else { width });
        let kv_head = shape.kv_head(head.head);
        let (k_rows, v_rows) = problem.kv_rows(head.batch, kv_head);
        let bias = pass.key_bias(head.batch, kv_head);
        let (n_kv, q_range) = (problem.kv_range(head.batch).len(), problem.q_range(head.batch));
        let first = (problem.batch_of(head.batch) * shape.n_heads_q + head.head) * shape.n_q + q_range.start;

        pairs.clear();
        pairs.q.resize(rows.len() * d, 0.0);
        pairs.grad_out.resize(rows.len() * d_v, 0.0);
        problem.q_rows(head.batch, head.head).slice(rows.clone()).copy_to(&mut pairs.q);
        pass.grad_out_rows(head).slice(rows.clone()).copy_to(&mut pairs.grad_out);

        let Scratch { q, grad_out, grad_q, k, v, scores, dp, slopes, hidden } = scratch;
        let (q, grad_out) = (&mut q[..groups.numbers()], &mut grad_out[..groups_v.numbers()]);
        let grad_q = &mut grad_q[..groups.numbers()];
        for (at, i) in rows.enumerate() {
            let mut end_of_share = pairs.keys.len();
            pairs.bounds.push(end_of_share);
            grad_q.fill(0.0);
            let (lse, delta) = (state.lse[first + i], state.delta[first + i]);
            // A row that sees nothing has no pairs.
            let spans =
                if lse == f32::NEG_INFINITY { Vec::new() } else { spec.mask.spans(head, i..i + 1, n_kv) };
            let all_seen = spec.mask.sees_spans(head, i..i + 1);
            q.fill(0.0);
            q[..d].copy_from_slice(&pairs.q[at * d..][..d]);
            q.iter_mut().for_each(|q| *q *= spec.softmax_scale);
            groups.spread(q);
            grad_out.fill(0.0);
            grad_out[..d_v].copy_from_slice(&pairs.grad_out[at * d_v..][..d_v]);
            groups_v.spread(grad_out);
            for_each_chunk(&spans, BLOCK, BLOCK, |ranges| {
                let n = ranges.iter().map(Range::len).sum::<usize>();
                k_rows.spread_to(ranges, k, width);
                v_rows.spread_to(ranges, v, width_v);
                let keys = || ranges.iter().cloned().flatten();
                hidden.clear();
                if !all_seen {
                    let unseen = keys().enumerate().filter(|(_, j)| !spec.mask.sees(head.pair(i, *j)));
                    hidden.extend(unseen.map(|(key, _)| key));
                }
                for &key in hidden.iter() {
                    k[key * width..][..width].fill(0.0);
                    v[key * width_v..][..width_v].fill(0.0);
                }
                let rows = HeadRows::F32(Rows::new(k, n, width, width));
                with_lanes(1, simd, Scores { rows, q, scores });
                let rows = HeadRows::F32(Rows::new(v, n, width_v, width_v));
                with_lanes(1, simd, Scores { rows, q: grad_out, scores: dp });
                slopes[..n].fill(spec.softmax_scale);
                if !spec.score_mod.is_identity() {
                    for ((score, slope), j) in scores.iter_mut().zip(slopes.iter_mut()).zip(keys()) {
                        let pair = head.pair(i, j);
                        *slope = spec.softmax_scale * spec.score_mod.derivative(*score, pair);
                        *score = spec.score_mod.apply(*score, pair);
                    }
                }
                if let Some(bias) = bias {
                    scores.iter_mut().zip(keys()).for_each(|(score, j)| *score += bias[j]);
                }
                hidden.iter().for_each(|key| scores[*key] = f32::NEG_INFINITY);
                hidden.clear();
                for key in (0..n).filter(|key| scores[*key] == f32::NEG_INFINITY) {
                    // What is not seen must not be met, not even with a weight of 0.
                    hidden.push(key);
                    k[key * width..][..width].fill(0.0);
                    (dp[key], slopes[key]) = (0.0, 0.0);
                }
                simd.vectorize(
                    #[inline(always)]
                    || weigh(simd, n, [&mut *scores, &mut *dp, &mut *slopes], lse, delta),
                );
                let kept = |key: &(usize, usize)| hidden.is_empty() || hidden.binary_search(&key.0).is_err();
                for (key, j) in keys().enumerate().filter(kept) {
                    pairs.keys.push(j as u32);
                    pairs.weights.push(scores[key]);
                    pairs.grads.push(dp[key]);
                    if pass.sum_keys {
                        pairs.sums.push(slopes[key]);
                    }
                }
                let k = HeadRows::F32(Rows::new(k, n, width, width));
                with_lanes(1, simd, Values { rows: k, weights: dp, acc: grad_q });
            });
            out.store(at, groups.compact(grad_q).iter().copied());
            for end in ends {
                let more = pairs.keys[end_of_share..].iter().take_while(|j| (**j as usize) < *end);
                end_of_share += more.count();
                pairs.bounds.push(end_of_share);
            }
        }
    }
}

/// From scores, `dp` and slopes of `n` keys to weights, `dr` and `ds`, in place.
#[inline(always)]
fn weigh<S: Simd>(simd: S, n: usize, [scores, dp, slopes]: [&mut [f32]; 3], lse: f32, delta: f32) {
    let width = S::f32s::LEN;
    let (reference, delta) = (S::f32s::splat(simd, lse), S::f32s::splat(simd, delta));
    // Blocks are whole vectors: what lies behind the last key is never read again.
    for at in (0..n).step_by(width) {
        let of = |numbers: &[f32]| S::f32s::from_slice(simd, &numbers[at..at + width]);
        let weight = exp2(simd, (of(scores) - reference) * LOG2_E);
        let grad = weight * (of(dp) - delta);
        (grad * of(slopes)).store_slice(&mut dp[at..at + width]);
        grad.store_slice(&mut slopes[at..at + width]);
        weight.store_slice(&mut scores[at..at + width]);
    }
}
