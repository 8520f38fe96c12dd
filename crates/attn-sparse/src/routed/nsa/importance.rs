//! Which blocks a query selects: probabilities of the compressed branch, summed over a key/value group and spread over blocks.
//!
//! Scores are made for a few rows against all compressed keys that they see, `O(rows n / t)` floats a thread. For a single new
//! token the threads share the compressed keys instead, and the compressed branch's output falls out of the same pass.

use super::compression::{Compressed, CompressedHead};
use super::inputs::NsaBranch;
use super::segment::{Segment, Weigh};
use super::{Nsa, branches::Rows};
use crate::routed::ended::Ended;
use crate::routed::key_panels::PANEL;
use crate::routed::overlaps::{OfBlocks, Overlaps, RowScores};
use crate::routed::rows::rows_f32;
use crate::select::largest::LargestOf;
use attn_core::TensorView;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Rows of all heads of a group scored together.
const ROWS: usize = 8;
/// Panels of a share, where the threads share the keys.
const SHARE: usize = 64;

/// Rows of one key/value head: which, and their queries `[rows, group, head_dim]`, scaled for powers of two.
struct Group {
    first: usize,
    len: usize,
    heads: usize,
    q: Vec<f32>,
}

impl Nsa {
    /// Selected blocks, `[batch, n_heads_kv, n_q]`, each ascending.
    pub(super) fn select(&self, compressed: &Compressed, q: &TensorView<'_>, rows: &Rows) -> Vec<Vec<usize>> {
        let (s, isa) = (rows.shape, Isa::current());
        let mut lists: Vec<Vec<usize>> = vec![Vec::new(); s.batch * s.n_heads_kv * s.n_q];
        let len = (ROWS / s.group_size()).max(1);
        let blocks = s.n_q.div_ceil(len).max(1);
        let tasks = lists.chunks_mut(s.n_q.max(1)).enumerate().flat_map(|(head, lists)| {
            lists.chunks_mut(len).enumerate().map(move |(block, lists)| (head, block * len, lists))
        });
        let tasks: Vec<_> = tasks.collect();
        debug_assert!(tasks.len() <= s.batch * s.n_heads_kv * blocks);
        for_each_task(
            tasks.into_iter().rev(),
            <(Segment, RowScores)>::default,
            |scratch, (head, first, lists)| {
                let (segment, scores) = scratch;
                let (batch, kv_head) = (head / s.n_heads_kv, head % s.n_heads_kv);
                if self.all_blocks(rows, first + lists.len() - 1).is_some() {
                    let all = lists.iter_mut().enumerate();
                    return all.for_each(|(row, list)| {
                        *list = self.all_blocks(rows, first + row).unwrap_or_default()
                    });
                }
                let group = rows.group(q, (batch, kv_head), first, lists.len());
                let keys = compressed.head(batch, kv_head);
                let visible = group.visible(&rows.ended(self), 0);
                let n = visible.last().copied().unwrap_or(0);
                let panels = 0..n.div_ceil(PANEL);
                isa.run(Weigh {
                    q: &group.q,
                    keys: &keys.panels,
                    panels,
                    visible: &visible,
                    segment,
                    values: None,
                });
                for (row, list) in lists.iter_mut().enumerate() {
                    let segments = std::slice::from_ref(segment);
                    *list = self.all_blocks(rows, first + row).unwrap_or_else(|| {
                        let of_row = row * group.heads..(row + 1) * group.heads;
                        self.largest(rows, first + row, segments, of_row, scores)
                    });
                }
            },
        );
        lists
    }

    /// As [`Nsa::select`] for one query row, and the compressed branch.
    pub(super) fn select_and_attend(
        &self,
        compressed: &Compressed,
        q: &TensorView<'_>,
        rows: &Rows,
    ) -> (Vec<Vec<usize>>, NsaBranch) {
        let (s, isa) = (rows.shape, Isa::current());
        let (mut lists, mut branch) = (Vec::new(), NsaBranch::unwritten(&s));
        for head in 0..s.batch * s.n_heads_kv {
            let (batch, kv_head) = (head / s.n_heads_kv, head % s.n_heads_kv);
            let group = rows.group(q, (batch, kv_head), 0, 1);
            let CompressedHead { panels: keys, v, .. } = compressed.head(batch, kv_head);
            let n = rows.ended(self).visible(0).min(keys.len());
            let mut segments: Vec<Segment> = Vec::new();
            segments.resize_with(n.div_ceil(SHARE * PANEL), Segment::default);
            for_each_task(
                segments.iter_mut().enumerate(),
                || (),
                |(), (at, segment)| {
                    let first = at * SHARE * PANEL;
                    let len = (n - first).min(SHARE * PANEL);
                    let panels = at * SHARE..at * SHARE + len.div_ceil(PANEL);
                    let values = Some((&v[first * s.head_dim_v..], s.head_dim_v));
                    let visible = vec![len; group.heads];
                    isa.run(Weigh { q: &group.q, keys, panels, visible: &visible, segment, values });
                },
            );
            lists.push(match self.all_blocks(rows, 0) {
                Some(all) => all,
                None => self.largest(rows, 0, &segments, 0..group.heads, &mut RowScores::default()),
            });
            for h in 0..group.heads {
                let (max, sum) = normaliser(&segments, h);
                let at = head * group.heads + h;
                let out = &mut branch.out[at * s.head_dim_v..][..s.head_dim_v];
                out.fill(0.0);
                for segment in &segments {
                    let factor = factor(segment.max[h], max, sum);
                    let acc = &segment.acc[h * s.head_dim_v..][..s.head_dim_v];
                    out.iter_mut().zip(acc).for_each(|(out, x)| *out += factor * x);
                }
                let has_keys = max > f32::NEG_INFINITY || sum.is_nan();
                branch.lse[at] =
                    if has_keys { max * std::f32::consts::LN_2 + sum.ln() } else { f32::NEG_INFINITY };
            }
        }
        (lists, branch)
    }

    /// What a row selects that has no more blocks than slots.
    fn all_blocks(&self, rows: &Rows, row: usize) -> Option<Vec<usize>> {
        let blocks = rows.visible(row).div_ceil(self.select_len);
        (blocks <= self.n_selected).then(|| (0..blocks).collect())
    }

    /// The forced blocks and the largest others; `of_row` are the rows of the segments that are those of its heads.
    fn largest(
        &self,
        rows: &Rows,
        row: usize,
        segments: &[Segment],
        of_row: Range<usize>,
        scratch: &mut RowScores,
    ) -> Vec<usize> {
        let own = (rows.visible(row) - 1) / self.select_len;
        let mut taken: Vec<usize> = Vec::new();
        for block in [own, 0, own.saturating_sub(1)] {
            if taken.len() < self.n_selected && !taken.contains(&block) {
                taken.push(block);
            }
        }
        let n = rows.ended(self).visible(row);
        let RowScores { x, blocks: scores, places, largest } = scratch;
        Isa::current().run(GroupProbabilities { segments, rows: of_row, n, shares: x });
        // Behind the first one and before the previous one.
        let open = 1..own.saturating_sub(1).max(1);
        let overlaps =
            Overlaps { len: self.compress_len, stride: self.compress_stride, block: self.select_len };
        let add = |sum: f32, share: f32, common: f32| sum + common * share;
        Isa::current().run(OfBlocks { overlaps, x, blocks: open.clone(), add, scores, places });
        scores.iter_mut().for_each(|score| *score /= self.compress_stride as f32);
        let k = self.n_selected - taken.len();
        let best = Isa::current().run(LargestOf { scores, k, largest });
        taken.extend(best.into_iter().map(|block| open.start + block as usize));
        taken.sort_unstable();
        taken
    }
}

/// The maximum and the sum of powers of a row, over all segments.
fn normaliser(segments: &[Segment], row: usize) -> (f32, f32) {
    let max = segments.iter().map(|segment| segment.max[row]).fold(f32::NEG_INFINITY, f32::max);
    let parts = segments.iter().filter(|segment| segment.max[row] > f32::NEG_INFINITY);
    (max, parts.map(|segment| segment.sum[row] * (segment.max[row] - max).exp2()).sum())
}

/// What a segment's weights are multiplied with.
fn factor(segment_max: f32, max: f32, sum: f32) -> f32 {
    if segment_max == f32::NEG_INFINITY { 0.0 } else { (segment_max - max).exp2() / sum }
}

/// `sum_h P_hc` of the first `n` compressed blocks, over some rows of the segments.
pub(in crate::routed) struct GroupProbabilities<'a> {
    pub(in crate::routed) segments: &'a [Segment],
    pub(in crate::routed) rows: Range<usize>,
    pub(in crate::routed) n: usize,
    /// Replaced.
    pub(in crate::routed) shares: &'a mut Vec<f32>,
}

impl SimdOp for GroupProbabilities<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { segments, rows, n, shares } = self;
        shares.clear();
        shares.resize(n, 0.0);
        simd.vectorize(
            #[inline(always)]
            || {
                for row in rows {
                    let (max, sum) = normaliser(segments, row);
                    let mut rest = shares.as_mut_slice();
                    for segment in segments {
                        let (part, others) = rest.split_at_mut(segment.stride.min(rest.len()));
                        let factor = factor(segment.max[row], max, sum);
                        let weights = &segment.weights[row * segment.stride..];
                        part.iter_mut().zip(weights).for_each(|(share, weight)| *share += factor * weight);
                        rest = others;
                    }
                }
            },
        );
    }
}

impl Rows {
    fn group(&self, q: &TensorView<'_>, (batch, kv_head): (usize, usize), first: usize, len: usize) -> Group {
        let (s, heads) = (self.shape, self.shape.group_size());
        let factor = self.softmax_scale * std::f32::consts::LOG2_E;
        let mut all = vec![0.0; len * heads * s.head_dim];
        for h in 0..heads {
            let rows = rows_f32(q, batch, kv_head * heads + h, first..first + len);
            for (row, from) in rows.chunks_exact(s.head_dim).enumerate() {
                let to = &mut all[(row * heads + h) * s.head_dim..][..s.head_dim];
                to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
            }
        }
        Group { first, len, heads, q: all }
    }
}

impl Group {
    /// What each row of each head sees behind the first `skip` compressed blocks.
    fn visible(&self, ended: &Ended, skip: usize) -> Vec<usize> {
        let row = |row: usize| ended.visible(self.first + row).saturating_sub(skip);
        (0..self.len).flat_map(|r| std::iter::repeat_n(row(r), self.heads)).collect()
    }
}
