//! One block of queries against every key it can see.
//!
//! Shapes, for one head: `q [rows, head_dim]`, `k [n_kv, head_dim]`, `v [n_kv, head_dim_v]`, `out [rows, head_dim_v]`.
//! Queries stand in the vector lanes, in panels of 32: `Q^T [head_dim, 32]` is made once, and each tile is
//!
//! ```text
//! S^T = K Q^T                [keys, 32]        scores; the softmax runs down the columns, without shuffles
//! O^T = O^T + V^T P^T        [head_dim_v, 32]  outputs, not yet divided
//! ```
//!
//! K and V are read where the caller keeps them (half types, pages and scattered keys through a gathered block). Where all
//! are bf16 both products may be of bf16 pairs, see `native_bf16`.

use super::Spec;
use super::chunks::{for_each_chunk, share_of, union};
use super::few::{self, FEW, FewScratch};
use super::finish::emit;
use super::native_bf16::NativeBf16;
use super::online_softmax::Sought;
use super::panel::Panel;
use super::problem::Problem;
use super::rows::Wide;
use super::tasks::Task;
use crate::tiles::{PANEL, TileSizes};
use attn_core::AttnShape;
use attn_core::dropout::Dropout;
use attn_core::mask::{Cover, Mask};
use attn_core::score::{ScoreMod, ScoreTile};
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::{Bf16Dot, Lhs, Rhs, Start, TileMut, all_finite, product, transpose};
use attn_core::view::Rows;
use std::ops::Range;

/// Keys whose cover is asked together inside a partial tile: the smaller, the fewer pairs are asked one by one.
const MASK_STEP: usize = 32;

/// A thread's scratch, taken once.
pub(super) struct Workspace {
    panels: Vec<Panel>,
    /// `[PANEL, head_dim or head_dim_v]`: queries that are gathered or widened, then outputs.
    rows: Vec<f32>,
    /// `[block_kv, PANEL]`, one row more if `block_kv` is odd.
    scores: Vec<f32>,
    /// `[block_kv, head_dim]` and `[block_kv, head_dim_v]`, for keys that are not read in place.
    wide_k: Vec<f32>,
    wide_v: Vec<f32>,
    /// `[block_kv, head_dim_v]`, for values that are not finite; empty until one is met.
    finite_v: Vec<f32>,
    /// `[block_kv]`, what the scores of a key are multiplied with; empty without a norm.
    key_scale: Vec<f32>,
    few: FewScratch,
    /// Where both products are of bf16 pairs.
    native: Option<NativeBf16>,
}

impl Workspace {
    pub(super) fn new(problem: &Problem<'_>, tiles: TileSizes, dot: Option<Bf16Dot>) -> Self {
        let shape = problem.shape();
        let n_panels = tiles.block_q().min(shape.n_q * shape.group_size()).div_ceil(PANEL);
        let block_kv = tiles.block_kv().min(shape.n_kv);
        Self {
            panels: (0..n_panels).map(|_| Panel::new(shape.head_dim, shape.head_dim_v)).collect(),
            rows: Vec::new(),
            scores: vec![0.0; block_kv.next_multiple_of(2) * PANEL],
            // Untouched pages of these cost nothing when keys are read in place.
            wide_k: vec![0.0; block_kv * shape.head_dim],
            wide_v: vec![0.0; block_kv * shape.head_dim_v],
            finite_v: Vec::new(),
            key_scale: Vec::new(),
            few: FewScratch::default(),
            native: dot.map(|dot| NativeBf16::new(dot, &shape)),
        }
    }
}

/// The kernel: one task.
pub(super) struct QueryBlock<'a, M: ?Sized, C: ?Sized> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) spec: &'a Spec<'a, M, C>,
    pub(super) tiles: TileSizes,
    pub(super) workspace: &'a mut Workspace,
    pub(super) task: Task<'a>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for QueryBlock<'_, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { problem, spec, tiles, workspace, mut task } = self;
        let shape = problem.shape();
        let kv_head = shape.kv_head(task.heads.start);
        let (k_rows, v_rows) = problem.kv_rows(task.sequence, kv_head);
        let n_lanes = task.heads.len() * task.rows.len();

        if tiles.are_rows_apart() {
            return few::attend_rows_apart(simd, problem, spec, &mut workspace.few, task);
        }
        if n_lanes <= FEW && few::serves(spec) {
            return few::attend(simd, problem, spec, &mut workspace.few, &mut task);
        }

        let Workspace { panels, rows, scores, wide_k, wide_v, finite_v, key_scale, native, .. } = workspace;
        let panels = &mut panels[..n_lanes.div_ceil(PANEL)];
        for (p, panel) in panels.iter_mut().enumerate() {
            let lanes = p * PANEL..((p + 1) * PANEL).min(n_lanes);
            panel.start(simd, problem, spec, &task, lanes, rows);
        }
        if let Some(native) = native {
            native.start(panels, problem, task.sequence);
        }

        let mut spans = match &*panels {
            [one] => one.spans.clone(),
            many => union(many.iter().flat_map(|panel| panel.spans.iter().cloned()).collect()),
        };
        if let Some(share) = &task.share {
            spans = share_of(&spans, share.clone());
        }
        let key_bias = spec.key_bias_of(problem, &task);
        let tile = Tile { spec, key_bias, shape };
        for_each_chunk(&spans, tiles.block_kv(), |ranges| {
            key_scale.clear();
            let packed = native
                .as_mut()
                .and_then(|native| native.pack(simd, (&k_rows, &v_rows), ranges).then_some(native));
            let mut rows = match packed {
                Some(native) => KeyRowsOf::Pairs(native),
                None => KeyRowsOf::Wide { k: k_rows.wide(ranges, wide_k), v: v_rows.wide(ranges, wide_v) },
            };
            if let (Some(norm), KeyRowsOf::Wide { k, .. }) = (&spec.qk_norm, &rows) {
                let n_keys = ranges.iter().map(Range::len).sum();
                key_scale.extend((0..n_keys).map(|key| norm.k().factor(k.row(key, shape.head_dim))));
            }
            for (p, panel) in panels.iter_mut().enumerate() {
                let [keys] = ranges else {
                    let keys = Keys { ranges, skip: 0, scale: key_scale };
                    tile.attend(simd, (p, panel), keys, &mut rows, TileScratch { scores, finite_v });
                    continue;
                };
                for at in 0..panel.spans.len() {
                    let seen = &panel.spans[at];
                    let seen = seen.start.max(keys.start)..seen.end.min(keys.end);
                    if !seen.is_empty() {
                        let skip = seen.start - keys.start;
                        let scale = &key_scale[skip.min(key_scale.len())..];
                        let keys = Keys { ranges: &[seen], skip, scale };
                        tile.attend(simd, (p, panel), keys, &mut rows, TileScratch { scores, finite_v });
                    }
                }
            }
        });
        write(simd, panels, spec.sinks, task, rows);
    }
}

/// The keys and values of a chunk.
enum KeyRowsOf<'a> {
    Wide { k: Wide<'a>, v: Wide<'a> },
    Pairs(&'a mut NativeBf16),
}

/// Keys of a chunk that a panel meets.
struct Keys<'a> {
    ranges: &'a [Range<usize>],
    /// Keys of the chunk before the first of them.
    skip: usize,
    /// What the scores of each key are multiplied with; empty is 1.
    scale: &'a [f32],
}

impl Keys<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Each range with the tile row of its first key.
    #[inline(always)]
    fn pieces(&self) -> impl Iterator<Item = (usize, &Range<usize>)> {
        let mut next = 0;
        self.ranges.iter().map(move |range| {
            let first = next;
            next += range.len();
            (first, range)
        })
    }

    /// Each key with its tile row.
    #[inline(always)]
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pieces().flat_map(|(first, range)| (first..).zip(range.clone()))
    }
}

/// Scratch for one tile; see [`Workspace`].
struct TileScratch<'a> {
    scores: &'a mut [f32],
    finite_v: &'a mut Vec<f32>,
}

/// What all tiles of a block share.
struct Tile<'a, M: ?Sized, C: ?Sized> {
    spec: &'a Spec<'a, M, C>,
    /// `[keys of the sequence]`.
    key_bias: Option<&'a [f32]>,
    shape: AttnShape,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Tile<'_, M, C> {
    /// One panel against `keys`.
    #[inline(always)]
    fn attend<S: Simd>(
        &self,
        simd: S,
        (p, panel): (usize, &mut Panel),
        keys: Keys<'_>,
        rows: &mut KeyRowsOf<'_>,
        scratch: TileScratch<'_>,
    ) {
        let mut covers = keys.ranges.iter().map(|range| panel.cover(self.spec.mask, range));
        let first = covers.next().unwrap_or(Cover::Empty);
        let cover = if covers.all(|cover| cover == first) { first } else { Cover::Partial };
        if cover != Cover::Empty {
            simd.vectorize(
                #[inline(always)]
                || match rows {
                    KeyRowsOf::Wide { k, v } => {
                        let (k, v) = (k.skip(keys.skip), v.skip(keys.skip));
                        self.attend_seen(simd, panel, keys, (k, v), scratch, cover);
                    }
                    KeyRowsOf::Pairs(native) => {
                        self.attend_pairs(simd, (p, panel), keys, native, scratch.scores, cover);
                    }
                },
            );
        }
    }

    /// [`Tile::attend_seen`] with products of bf16 pairs.
    #[inline(always)]
    fn attend_pairs<S: Simd>(
        &self,
        simd: S,
        (p, panel): (usize, &mut Panel),
        keys: Keys<'_>,
        native: &mut NativeBf16,
        scores: &mut [f32],
        cover: Cover,
    ) {
        let lanes = panel.n_lanes.next_multiple_of(S::f32s::LEN);
        let rows = keys.skip..keys.skip + keys.len();
        let (scores, seen) = native.scores(p, rows.clone(), lanes, self.spec.softmax_scale, scores);
        self.modify(simd, &mut scores[seen.clone()], panel, &keys);
        if cover == Cover::Partial {
            self.hide(&mut scores[seen], panel, &keys);
        }
        native.absorb(simd, panel, rows, lanes, scores);
    }

    #[inline(always)]
    fn attend_seen<S: Simd>(
        &self,
        simd: S,
        panel: &mut Panel,
        keys: Keys<'_>,
        (k, v): (Wide<'_>, Wide<'_>),
        scratch: TileScratch<'_>,
        cover: Cover,
    ) {
        let n_keys = keys.len();
        let lanes = panel.n_lanes.next_multiple_of(S::f32s::LEN);
        let scores = &mut scratch.scores[..n_keys * PANEL];
        let mut sought = Sought::first(simd);
        let hidden = loop {
            product(
                simd,
                [n_keys, lanes, self.shape.head_dim],
                Lhs { data: k.data, row_stride: k.stride, col_stride: 1 },
                Rhs { data: &panel.q, stride: PANEL },
                TileMut { data: scores, stride: PANEL },
                Start::Zero,
            );
            self.modify(simd, scores, panel, &keys);
            let hidden = if cover == Cover::Partial { self.hide(scores, panel, &keys) } else { 0..0 };
            if panel.softmax.absorb(simd, scores, &mut panel.acc, lanes, sought) {
                break hidden;
            }
            // Rare: some score lies so far above all before it that its weight is infinite.
            sought = Sought::InTile;
        };
        if let Some(dropout) = &self.spec.dropout {
            drop_weights(dropout, scores, panel, &keys);
        }

        // A weight of 0 times a value of NaN or infinity would leak what the row must not see.
        let biased_away =
            || self.key_bias.is_some_and(|bias| keys.rows().any(|(_, j)| bias[j] == f32::NEG_INFINITY));
        let all = !self.spec.score_mod.is_identity() || self.spec.dropout.is_some() || biased_away();
        let mut suspects = if all { 0..n_keys } else { hidden };
        let size = [self.shape.head_dim_v, lanes, n_keys];
        if suspects.any(|key| !all_finite(v.row(key, self.shape.head_dim_v))) {
            accumulate_poisoned(simd, size, v, scores, &mut panel.acc, scratch.finite_v);
        } else {
            accumulate(simd, size, v, scores, &mut panel.acc);
        }
    }

    /// Norm of the keys, score mod and key bias.
    #[inline(always)]
    fn modify<S: Simd>(&self, simd: S, scores: &mut [f32], panel: &Panel, keys: &Keys<'_>) {
        for (row, scale) in scores.as_chunks_mut::<PANEL>().0.iter_mut().zip(keys.scale) {
            each_vector(simd, row, |s| s * *scale);
        }
        if !self.spec.score_mod.is_identity() {
            for (at, range) in keys.pieces() {
                for segment in &panel.segments {
                    let (head, rows, keys) = (segment.head, segment.rows.clone(), range.clone());
                    let last = (at + keys.len() - 1) * PANEL + segment.lane + rows.len();
                    let scores = &mut scores[at * PANEL + segment.lane..last];
                    self.spec.score_mod.apply_tile(ScoreTile { head, rows, keys, scores, stride: PANEL });
                }
            }
        }
        if let Some(bias) = self.key_bias {
            for ((_, j), row) in keys.rows().zip(scores.as_chunks_mut::<PANEL>().0) {
                each_vector(simd, row, |s| s + bias[j]);
            }
        }
    }

    /// Sets the scores of pairs that are not seen to -inf; returns the tile rows (keys) that some query does not see.
    #[inline(always)]
    fn hide(&self, scores: &mut [f32], panel: &Panel, keys: &Keys<'_>) -> Range<usize> {
        let (mask, mut hidden) = (self.spec.mask, keys.len()..0);
        for (at, range) in keys.pieces() {
            for first in range.clone().step_by(MASK_STEP) {
                let step = first..(first + MASK_STEP).min(range.end);
                let top = at + first - range.start;
                for segment in &panel.segments {
                    let cover = mask.cover(segment.head, segment.rows.clone(), step.clone());
                    if cover == Cover::Full {
                        continue;
                    }
                    hidden = hidden.start.min(top)..hidden.end.max(top + step.len());
                    for (j, row) in step.clone().zip(top..) {
                        let lanes = segment.lane..segment.lane + segment.rows.len();
                        let scores = &mut scores[row * PANEL..][lanes];
                        match cover {
                            Cover::Empty => scores.fill(f32::NEG_INFINITY),
                            _ => mask.hide(segment.head, segment.rows.clone(), j, scores),
                        }
                    }
                }
            }
        }
        if hidden.is_empty() { 0..0 } else { hidden }
    }
}

/// `row = change(row)`, a vector at a time.
#[inline(always)]
fn each_vector<S: Simd>(simd: S, row: &mut [f32; PANEL], change: impl Fn(S::f32s) -> S::f32s) {
    for vector in row.chunks_exact_mut(S::f32s::LEN) {
        change(S::f32s::from_slice(simd, vector)).store_slice(vector);
    }
}

/// Multiplies the weights, which the normaliser already has, with 0 or `1 / (1 - p)`.
#[inline(never)]
fn drop_weights(dropout: &Dropout<'_>, weights: &mut [f32], panel: &Panel, keys: &Keys<'_>) {
    let mut factors = [0.0; PANEL];
    for (at, j) in keys.rows() {
        for segment in &panel.segments {
            let weights = &mut weights[at * PANEL + segment.lane..][..segment.rows.len()];
            dropout.factors(segment.head, segment.rows.clone(), j, &mut factors);
            weights.iter_mut().zip(factors).for_each(|(weight, factor)| *weight *= factor);
        }
    }
}

/// `acc += V^T P^T`, with `size = [head_dim_v, lanes, keys]`.
#[inline(always)]
fn accumulate<S: Simd>(simd: S, size: [usize; 3], v: Wide<'_>, weights: &[f32], acc: &mut [f32]) {
    product(
        simd,
        size,
        Lhs { data: v.data, row_stride: 1, col_stride: v.stride },
        Rhs { data: weights, stride: PANEL },
        TileMut { data: acc, stride: PANEL },
        Start::Keep,
    );
}

/// [`accumulate`] where some values are NaN or infinite: those rows of V reach only lanes whose weight is not 0.
#[cold]
#[inline(never)]
fn accumulate_poisoned<S: Simd>(
    simd: S,
    [width, lanes, n_keys]: [usize; 3],
    v: Wide<'_>,
    weights: &[f32],
    acc: &mut [f32],
    finite_v: &mut Vec<f32>,
) {
    finite_v.clear();
    finite_v.resize(n_keys * width, 0.0);
    for (key, copy) in finite_v.chunks_exact_mut(width).enumerate() {
        let row = v.row(key, width);
        if all_finite(row) {
            copy.copy_from_slice(row);
            continue;
        }
        for lane in (0..lanes).filter(|lane| weights[key * PANEL + lane] != 0.0) {
            for (c, x) in row.iter().enumerate() {
                acc[c * PANEL + lane] += weights[key * PANEL + lane] * x;
            }
        }
    }
    accumulate(simd, [width, lanes, n_keys], Wide { data: finite_v, stride: width }, weights, acc);
}

/// Divides, rounds and stores the rows with their log-sum-exps; or stores them as they are, to be merged. `rows` is
/// scratch, `[PANEL, head_dim_v]`.
#[inline(always)]
fn write<S: Simd>(simd: S, panels: &[Panel], sinks: Option<&[f32]>, mut task: Task<'_>, rows: &mut Vec<f32>) {
    for panel in panels {
        let width = panel.acc.len() / PANEL;
        rows.resize(PANEL * width, 0.0);
        transpose(simd, Rows::new(&panel.acc, width, PANEL, PANEL), 1.0, rows, width);
        for segment in &panel.segments {
            let sink = sinks.map(|sinks| sinks[segment.head.head]);
            for (lane, i) in segment.lanes() {
                let acc = &rows[lane * width..][..width];
                let (place, number) = task.place(segment.head.head, i);
                emit(&mut task.out, place, number, acc, panel.softmax.state(lane), sink);
            }
        }
    }
}
