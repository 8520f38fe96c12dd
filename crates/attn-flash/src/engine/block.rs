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
//! K and V are read where the caller keeps them (half types through a widened block).

use super::Spec;
use super::online_softmax::OnlineSoftmax;
use crate::tiles::{PANEL, TileSizes};
use attn_core::mask::{Cover, Head, Mask};
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, product, transpose, widen};
use attn_core::view::{BlockMut, Rows};
use attn_core::{AttnShape, Element, TypedQkv};
use std::ops::Range;

/// Keys whose cover is asked together inside a partial tile: the smaller, the fewer pairs are asked one by one.
const MASK_STEP: usize = 32;

/// One panel of queries: what it accumulates.
struct Panel {
    /// `[head_dim, PANEL]`, scaled.
    q: Vec<f32>,
    /// `[head_dim_v, PANEL]`.
    acc: Vec<f32>,
    softmax: OnlineSoftmax,
    /// Query rows in the lanes.
    rows: Range<usize>,
    /// Keys these rows can see.
    spans: Vec<Range<usize>>,
}

/// A thread's scratch, taken once.
pub(super) struct Workspace {
    panels: Vec<Panel>,
    /// `[block_kv, PANEL]`.
    scores: Vec<f32>,
    /// `[block_kv, head_dim]` and `[block_kv, head_dim_v]`, for storage types that are not f32.
    wide_k: Vec<f32>,
    wide_v: Vec<f32>,
    /// `[block_kv, head_dim_v]`, for values that are not finite; empty until one is met.
    finite_v: Vec<f32>,
}

impl Workspace {
    pub(super) fn new(shape: &AttnShape, tiles: TileSizes, widen: bool) -> Self {
        let panel = || Panel {
            q: vec![0.0; shape.head_dim * PANEL],
            acc: vec![0.0; shape.head_dim_v * PANEL],
            softmax: OnlineSoftmax::new(),
            rows: 0..0,
            spans: Vec::new(),
        };
        let n_panels = tiles.block_q().min(shape.n_q).div_ceil(PANEL);
        let block_kv = tiles.block_kv().min(shape.n_kv);
        let wide = |width: usize| vec![0.0; if widen { block_kv * width } else { 0 }];
        Self {
            panels: (0..n_panels).map(|_| panel()).collect(),
            scores: vec![0.0; block_kv * PANEL],
            wide_k: wide(shape.head_dim),
            wide_v: wide(shape.head_dim_v),
            finite_v: Vec::new(),
        }
    }
}

/// The kernel: one block of queries of one head.
pub(super) struct QueryBlock<'a, E, M: ?Sized, C: ?Sized> {
    pub(super) x: &'a TypedQkv<'a, E>,
    pub(super) spec: &'a Spec<'a, M, C>,
    pub(super) tiles: TileSizes,
    pub(super) workspace: &'a mut Workspace,
    pub(super) block: BlockMut<'a, E>,
    pub(super) lse: Option<&'a mut [f32]>,
}

/// Rows of K or V as f32: `row i = data[i * stride..]`.
#[derive(Clone, Copy)]
struct Wide<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Wide<'a> {
    /// The rows in place where they are f32 already, else widened into `scratch`.
    #[inline(always)]
    fn new<E: Element>(rows: Rows<'a, E>, scratch: &'a mut [f32]) -> Self {
        match E::as_f32(rows.data()) {
            Some(data) => Self { data, stride: rows.stride() },
            None => {
                widen(rows, scratch);
                Self { data: scratch, stride: rows.width() }
            }
        }
    }

    #[inline(always)]
    fn skip(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], ..self }
    }
}

impl<E: Element, M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for QueryBlock<'_, E, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        let shape = self.x.shape;
        let head = Head { batch: self.block.batch, head: self.block.head };
        let kv_head = shape.kv_head(head.head);
        let (k, v) = (self.x.k.head(head.batch, kv_head), self.x.v.head(head.batch, kv_head));
        let rows = self.block.rows.clone();

        let n_panels = rows.len().div_ceil(PANEL);
        let Workspace { panels, scores, wide_k, wide_v, finite_v } = &mut *self.workspace;
        let panels = &mut panels[..n_panels];
        let q = self.x.q.head(head.batch, head.head);
        for (p, panel) in panels.iter_mut().enumerate() {
            let start = rows.start + p * PANEL;
            panel.start(simd, start..(start + PANEL).min(rows.end), q, head, self.spec, shape.n_kv);
        }

        let tile = Tile { spec: self.spec, head, shape };
        for span in self.spec.mask.spans(head, rows.clone(), shape.n_kv) {
            for first in span.clone().step_by(self.tiles.block_kv()) {
                let keys = first..(first + self.tiles.block_kv()).min(span.end);
                let k = Wide::new(k.slice(keys.clone()), wide_k);
                let v = Wide::new(v.slice(keys.clone()), wide_v);
                for panel in &mut *panels {
                    for at in 0..panel.spans.len() {
                        let seen = &panel.spans[at];
                        let seen = seen.start.max(keys.start)..seen.end.min(keys.end);
                        if !seen.is_empty() {
                            let skip = seen.start - keys.start;
                            let keys = Keys { range: seen, k: k.skip(skip), v: v.skip(skip) };
                            tile.attend(simd, panel, keys, TileScratch { scores, finite_v });
                        }
                    }
                }
            }
        }
        self.write(n_panels);
    }
}

impl Panel {
    #[inline(always)]
    fn start<S: Simd, E: Element, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
        &mut self,
        simd: S,
        rows: Range<usize>,
        q: Rows<'_, E>,
        head: Head,
        spec: &Spec<'_, M, C>,
        n_kv: usize,
    ) {
        transpose(simd, q.slice(rows.clone()), spec.softmax_scale, &mut self.q, PANEL);
        self.acc.fill(0.0);
        self.softmax = OnlineSoftmax::new();
        self.spans = spec.mask.spans(head, rows.clone(), n_kv);
        self.rows = rows;
    }
}

/// Keys that a panel meets, and their rows: `k` and `v` start at the first of them.
struct Keys<'a> {
    range: Range<usize>,
    k: Wide<'a>,
    v: Wide<'a>,
}

/// Scratch for one tile; see [`Workspace`].
struct TileScratch<'a> {
    scores: &'a mut [f32],
    finite_v: &'a mut Vec<f32>,
}

/// What all tiles of a block share.
struct Tile<'a, M: ?Sized, C: ?Sized> {
    spec: &'a Spec<'a, M, C>,
    head: Head,
    shape: AttnShape,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Tile<'_, M, C> {
    /// One panel against `keys`.
    #[inline(always)]
    fn attend<S: Simd>(&self, simd: S, panel: &mut Panel, keys: Keys<'_>, scratch: TileScratch<'_>) {
        let cover = self.spec.mask.cover(self.head, panel.rows.clone(), keys.range.clone());
        if cover != Cover::Empty {
            // Nothing inside depends on the storage type: a function of its own, compiled once for all of them.
            simd.vectorize(
                #[inline(always)]
                || self.attend_seen(simd, panel, keys, scratch, cover),
            );
        }
    }

    #[inline(always)]
    fn attend_seen<S: Simd>(
        &self,
        simd: S,
        panel: &mut Panel,
        keys: Keys<'_>,
        scratch: TileScratch<'_>,
        cover: Cover,
    ) {
        let (k, v, n_keys) = (keys.k, keys.v, keys.range.len());
        let lanes = panel.rows.len().next_multiple_of(S::f32s::LEN);
        let scores = &mut scratch.scores[..n_keys * PANEL];
        product(
            simd,
            [n_keys, lanes, self.shape.head_dim],
            Lhs { data: k.data, row_stride: k.stride, col_stride: 1 },
            Rhs { data: &panel.q, stride: PANEL },
            TileMut { data: scores, stride: PANEL },
            Start::Zero,
        );
        self.modify(scores, &panel.rows, &keys.range);
        let hidden = if cover == Cover::Partial { self.hide(scores, &panel.rows, &keys.range) } else { 0..0 };
        panel.softmax.absorb(simd, scores, &mut panel.acc, lanes);

        // A weight of 0 times a value of NaN or infinity would leak what the row must not see.
        let mut suspects = if self.spec.score_mod.is_identity() { hidden } else { 0..n_keys };
        let size = [self.shape.head_dim_v, lanes, n_keys];
        if suspects.any(|key| !all_finite(&v.data[key * v.stride..][..self.shape.head_dim_v])) {
            accumulate_poisoned(simd, size, v, scores, &mut panel.acc, scratch.finite_v);
        } else {
            accumulate(simd, size, v, scores, &mut panel.acc);
        }
    }

    /// Score mod and key bias.
    #[inline(always)]
    fn modify(&self, scores: &mut [f32], rows: &Range<usize>, keys: &Range<usize>) {
        let score_mod = self.spec.score_mod;
        let tile_rows = || keys.clone().zip(0..);
        if !score_mod.is_identity() {
            for (j, at) in tile_rows() {
                for (i, score) in rows.clone().zip(&mut scores[at * PANEL..][..PANEL]) {
                    *score = score_mod.apply(*score, self.head.pair(i, j));
                }
            }
        }
        if let Some(bias) = self.spec.key_bias {
            for (j, at) in tile_rows() {
                scores[at * PANEL..][..PANEL].iter_mut().for_each(|s| *s += bias[j]);
            }
        }
    }

    /// Sets the scores of pairs that are not seen to -inf; returns the tile rows (keys) that some row does not see.
    #[inline(always)]
    fn hide(&self, scores: &mut [f32], rows: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let (mask, mut hidden) = (self.spec.mask, keys.len()..0);
        for first in keys.clone().step_by(MASK_STEP) {
            let step = first..(first + MASK_STEP).min(keys.end);
            let cover = mask.cover(self.head, rows.clone(), step.clone());
            if cover == Cover::Full {
                continue;
            }
            hidden = hidden.start.min(step.start - keys.start)..step.end - keys.start;
            for j in step {
                for (i, score) in rows.clone().zip(&mut scores[(j - keys.start) * PANEL..][..PANEL]) {
                    if cover == Cover::Empty || !mask.sees(self.head.pair(i, j)) {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        if hidden.is_empty() { 0..0 } else { hidden }
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
        let row = &v.data[key * v.stride..][..width];
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

impl<E: Element, M: ?Sized, C: ?Sized> QueryBlock<'_, E, M, C> {
    /// Divides, rounds and stores the rows; writes the log-sum-exps.
    #[inline(always)]
    fn write(&mut self, n_panels: usize) {
        for (p, panel) in self.workspace.panels[..n_panels].iter().enumerate() {
            for lane in 0..panel.rows.len() {
                let sum = panel.softmax.sum(lane);
                let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                let row = self.block.out.row_mut(p * PANEL + lane);
                for (out, acc) in row.iter_mut().zip(panel.acc.as_chunks::<PANEL>().0) {
                    *out = E::store(acc[lane] * inverse);
                }
                if let Some(lse) = &mut self.lse {
                    lse[p * PANEL + lane] = panel.softmax.lse(lane);
                }
            }
        }
    }
}
