//! One panel against some keys: scores, score mod, mask, softmax, outputs.

use super::Spec;
use super::ahead::Ahead;
use super::native_bf16::NativeBf16;
use super::online_softmax::Sought;
use super::panel::Panel;
use super::rows::Wide;
use crate::tiles::PANEL;
use attn_core::AttnShape;
use attn_core::dropout::Dropout;
use attn_core::mask::{Cover, Mask};
use attn_core::score::{ScoreMod, ScoreTile};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, product};
use std::ops::Range;

/// Keys whose cover is asked together inside a partial tile: the smaller, the fewer pairs are asked one by one.
const MASK_STEP: usize = 32;
/// Rows of a product between which rows of the next chunk are asked for: whole register tiles.
const STEP: usize = 16;

/// Times that [`Ahead::ask`] is called while a panel attends to some keys.
pub(super) fn turns(n_keys: usize, head_dim_v: usize) -> usize {
    n_keys.div_ceil(STEP) + head_dim_v.div_ceil(STEP)
}

/// The keys and values of a chunk.
pub(super) enum KeyRowsOf<'a> {
    Wide { k: Wide<'a>, v: Wide<'a> },
    Pairs(&'a mut NativeBf16),
}

/// Keys of a chunk that a panel meets.
pub(super) struct Keys<'a> {
    pub(super) ranges: &'a [Range<usize>],
    /// Keys of the chunk before the first of them.
    pub(super) skip: usize,
    /// What the scores of each key are multiplied with; empty is 1.
    pub(super) scale: &'a [f32],
    /// None of them lies outside of the panel's spans.
    pub(super) all_seen: bool,
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
pub(super) struct TileScratch<'a, 'k> {
    pub(super) scores: &'a mut [f32],
    pub(super) finite_v: &'a mut Vec<f32>,
    pub(super) ahead: &'a mut Ahead<'k>,
}

/// What all tiles of a block share.
pub(super) struct Tile<'a, M: ?Sized, C: ?Sized> {
    pub(super) spec: &'a Spec<'a, M, C>,
    /// `[keys of the sequence]`.
    pub(super) key_bias: Option<&'a [f32]>,
    pub(super) shape: AttnShape,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Tile<'_, M, C> {
    /// One panel against `keys`.
    #[inline(always)]
    pub(super) fn attend<S: Simd>(
        &self,
        simd: S,
        (p, panel): (usize, &mut Panel),
        keys: Keys<'_>,
        rows: &mut KeyRowsOf<'_>,
        scratch: TileScratch<'_, '_>,
    ) {
        let cover = if panel.sees_spans && keys.all_seen {
            Cover::Full
        } else {
            let mut covers = keys.ranges.iter().map(|range| panel.cover(self.spec.mask, range));
            let first = covers.next().unwrap_or(Cover::Empty);
            if covers.all(|cover| cover == first) { first } else { Cover::Partial }
        };
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
        scratch: TileScratch<'_, '_>,
        cover: Cover,
    ) {
        let n_keys = keys.len();
        let lanes = panel.n_lanes.next_multiple_of(S::f32s::LEN);
        let scores = &mut scratch.scores[..n_keys * PANEL];
        let mut sought = Sought::first(simd);
        let hidden = loop {
            for first in (0..n_keys).step_by(STEP) {
                scratch.ahead.ask();
                let n = STEP.min(n_keys - first);
                product(
                    simd,
                    [n, lanes, self.shape.head_dim],
                    Lhs { data: k.skip(first).data, row_stride: k.stride, col_stride: 1 },
                    Rhs { data: &panel.q, stride: PANEL },
                    TileMut { data: &mut scores[first * PANEL..], stride: PANEL },
                    Start::Zero,
                );
            }
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
            let [width, lanes, n_keys] = size;
            for first in (0..width).step_by(STEP) {
                scratch.ahead.ask();
                let n = STEP.min(width - first);
                let v = Wide { data: &v.data[first..], ..v };
                accumulate(simd, [n, lanes, n_keys], v, scores, &mut panel.acc[first * PANEL..]);
            }
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
                    let scores = &mut scores[top * PANEL + segment.lane..];
                    let n_rows = segment.rows.len();
                    if cover == Cover::Empty {
                        let rows = (0..step.len()).map(|key| key * PANEL..key * PANEL + n_rows);
                        rows.for_each(|row| scores[row].fill(f32::NEG_INFINITY));
                    } else {
                        mask.hide_tile(segment.head, segment.rows.clone(), step.clone(), scores, PANEL);
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
pub(super) fn accumulate_poisoned<S: Simd>(
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
