//! One tile: some keys and at most [`LANES`] queries, five products.
//!
//! Queries stand in the vector lanes of the tile; gradients have their own width in the lanes:
//!
//! ```text
//! S^T  = K Q^T     [keys, queries]            W^T, dR^T from S^T and dP^T, see `weights`
//! dP^T = V dO^T    [keys, queries]
//! dV  += W^T dO    [keys, head_dim_v]
//! dK  += dR^T Q    [keys, head_dim]
//! dQ  += dR K      [queries, head_dim]
//! ```

use super::Pass;
use super::queries::Queries;
use super::weights::{Extras, LANES, Tile, weigh, weigh_all};
use crate::engine::rows::Wide;
use attn_core::mask::{Cover, Mask};
use attn_core::score::{ScoreMod, ScoreTile};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, product};
use std::ops::Range;

/// Keys whose cover is asked together inside a partial tile.
const MASK_STEP: usize = 32;

/// Lanes that a score mod takes at once.
const HALF: usize = 32;

/// Scratch of one tile, `[block_kv, LANES]` each.
pub(super) struct TileScratch {
    scores: Vec<f32>,
    grads: Vec<f32>,
    /// Empty until needed.
    slopes: Vec<f32>,
    factors: Vec<f32>,
    /// Rows without those that are not finite.
    finite: Vec<f32>,
}

impl TileScratch {
    pub(super) fn new(block_kv: usize) -> Self {
        let zeros = || vec![0.0; block_kv * LANES];
        let (slopes, factors, finite) = (Vec::new(), Vec::new(), Vec::new());
        Self { scores: zeros(), grads: zeros(), slopes, factors, finite }
    }
}

/// What is to become of the gradients of scores.
enum Wanted<'a> {
    /// Gradients of what the scores were made of; and their sums over the queries, `[keys]`.
    Inputs { key_sums: Option<&'a mut [f32]> },
    /// The gradients behind the score mod, as they are.
    Scores,
}

/// Keys of a tile, and their rows.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) ranges: &'a [Range<usize>],
    pub(super) k: Wide<'a>,
    pub(super) v: Wide<'a>,
    /// `[keys of the sequence]`.
    pub(super) bias: Option<&'a [f32]>,
}

impl Keys<'_> {
    pub(super) fn len(&self) -> usize {
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
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pieces().flat_map(|(first, range)| (first..).zip(range.clone()))
    }
}

/// What a tile adds to.
pub(super) struct Grads<'a> {
    /// `[queries, head_dim]`.
    pub(super) q: &'a mut [f32],
    /// `[keys, head_dim]`.
    pub(super) k: &'a mut [f32],
    /// `[keys, head_dim_v]`.
    pub(super) v: &'a mut [f32],
    /// `[keys]`.
    pub(super) key_sums: Option<&'a mut [f32]>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Pass<'_, M, C> {
    /// Adds the gradients of one tile.
    #[inline(always)]
    pub(super) fn meet<S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        grads: Grads<'_>,
        scratch: &mut TileScratch,
    ) {
        let cover = self.cover(queries, keys);
        if cover != Cover::Empty {
            simd.vectorize(
                #[inline(always)]
                || {
                    let wanted = Wanted::Inputs { key_sums: grads.key_sums };
                    let careful = self.weigh(simd, queries, keys, wanted, scratch, cover);
                    let Grads { q, k, v, .. } = grads;
                    self.add_gradients(simd, queries, keys, [q, k, v], scratch, careful);
                },
            );
        }
    }

    /// The gradients of the scores of one tile behind the score mod, `[keys, LANES]`; `None` if no key is seen.
    #[inline(always)]
    pub(super) fn score_gradients<'s, S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        scratch: &'s mut TileScratch,
    ) -> Option<&'s [f32]> {
        let cover = self.cover(queries, keys);
        if cover == Cover::Empty {
            return None;
        }
        simd.vectorize(
            #[inline(always)]
            || self.weigh(simd, queries, keys, Wanted::Scores, scratch, cover),
        );
        Some(&scratch.grads[..keys.len() * LANES])
    }

    fn cover(&self, queries: &Queries<'_>, keys: Keys<'_>) -> Cover {
        let cover =
            |range: &Range<usize>| self.spec.mask.cover(queries.head, queries.rows.clone(), range.clone());
        let mut covers = keys.ranges.iter().map(cover);
        let first = covers.next().unwrap_or(Cover::Empty);
        if covers.all(|cover| cover == first) { first } else { Cover::Partial }
    }

    /// Fills the tile's weights and gradients of scores; tells whether some pairs may be hidden.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        wanted: Wanted<'_>,
        scratch: &mut TileScratch,
        cover: Cover,
    ) -> bool {
        let (spec, shape, n_keys) = (self.spec, self.problem.shape(), keys.len());
        let lanes = queries.rows.len().next_multiple_of(S::f32s::LEN);
        let TileScratch { scores, grads, slopes, factors, .. } = scratch;
        let (scores, grads) = (&mut scores[..n_keys * LANES], &mut grads[..n_keys * LANES]);
        score(simd, [n_keys, lanes, shape.head_dim], keys.k, queries.q_t, scores);
        let changed = !spec.score_mod.is_identity();
        if changed {
            self.modify(scores, queries, keys, slopes);
        }
        if let Some(bias) = keys.bias {
            for ((_, j), row) in keys.rows().zip(scores.as_chunks_mut::<LANES>().0) {
                row.iter_mut().for_each(|s| *s += bias[j]);
            }
        }
        let hidden = cover == Cover::Partial && self.hide(scores, queries, keys);
        score(simd, [n_keys, lanes, shape.head_dim_v], keys.v, queries.grad_out_t, grads);

        let dropped = spec.dropout.is_some();
        let careful = hidden || changed || keys.bias.is_some() || dropped || queries.some_dead;
        let tile = Tile { scores, grads };
        match wanted {
            Wanted::Inputs { key_sums: None } if !(changed || dropped) => match careful {
                false => weigh::<S, false>(simd, tile, lanes, &queries.state, spec.softmax_scale),
                true => weigh::<S, true>(simd, tile, lanes, &queries.state, spec.softmax_scale),
            },
            _ => {
                if dropped {
                    self.drop(queries, keys, factors);
                }
                let factors = dropped.then_some(&**factors);
                let (extras, scale) = match wanted {
                    Wanted::Inputs { key_sums } => {
                        let slopes = changed.then_some(&**slopes);
                        (Extras { slopes, factors, key_sums }, spec.softmax_scale)
                    }
                    Wanted::Scores => (Extras { factors, ..Extras::default() }, 1.0),
                };
                weigh_all(simd, tile, lanes, &queries.state, scale, extras);
            }
        }
        careful
    }

    /// From weights and gradients of scores to those of q, k and v.
    #[inline(always)]
    fn add_gradients<S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        [grad_q, grad_k, grad_v]: [&mut [f32]; 3],
        scratch: &mut TileScratch,
        careful: bool,
    ) {
        let shape = self.problem.shape();
        let (d, d_v, n_keys, n_rows) = (shape.head_dim, shape.head_dim_v, keys.len(), queries.rows.len());
        let TileScratch { scores: weights, grads, finite, .. } = scratch;
        // A weight of 0 times NaN or infinity would leak what the pair must not see.
        let poisoned = careful && !(queries.finite && (0..n_keys).all(|key| all_finite(keys.k.row(key, d))));
        let mut add = |[m, n, depth]: [usize; 3], a: Lhs<'_>, b: Wide<'_>, c: &mut [f32]| {
            if poisoned {
                return add_poisoned(simd, [m, n, depth], a, b, c, finite);
            }
            let c = TileMut { data: c, stride: n };
            product(simd, [m, n, depth], a, Rhs { data: b.data, stride: b.stride }, c, Start::Keep);
        };
        add(
            [n_keys, d_v, n_rows],
            Lhs { data: weights, row_stride: LANES, col_stride: 1 },
            queries.grad_out,
            grad_v,
        );
        add([n_keys, d, n_rows], Lhs { data: grads, row_stride: LANES, col_stride: 1 }, queries.q, grad_k);
        add([n_rows, d, n_keys], Lhs { data: grads, row_stride: 1, col_stride: LANES }, keys.k, grad_q);
    }

    /// Score mod; writes `softmax_scale` times its derivative to `slopes`.
    #[inline(always)]
    fn modify(&self, scores: &mut [f32], queries: &Queries<'_>, keys: Keys<'_>, slopes: &mut Vec<f32>) {
        let (score_mod, scale, head) = (self.spec.score_mod, self.spec.softmax_scale, queries.head);
        slopes.resize(self.tiles.block_kv * LANES, 0.0);
        for (at, j) in keys.rows() {
            let scores = scores[at * LANES..][..LANES].as_chunks_mut::<HALF>().0;
            let slopes = slopes[at * LANES..][..LANES].as_chunks_mut::<HALF>().0;
            let rows = queries.rows.clone().step_by(HALF);
            for ((scores, slopes), row) in scores.iter_mut().zip(slopes).zip(rows) {
                // On copies of known length: only so does the compiler use vectors.
                let n = HALF.min(queries.rows.end - row);
                let (old, mut new) = (*scores, [0.0; HALF]);
                let slope = |lane| scale * score_mod.derivative(old[lane], head.pair(row + lane, j));
                if n == HALF {
                    new.iter_mut().enumerate().for_each(|(lane, new)| *new = slope(lane));
                } else {
                    new.iter_mut().enumerate().take(n).for_each(|(lane, new)| *new = slope(lane));
                }
                *slopes = new;
                let (rows, keys) = (row..row + n, j..j + 1);
                score_mod.apply_tile(ScoreTile { head, rows, keys, scores: &mut scores[..n], stride: HALF });
            }
        }
    }

    /// Sets the scores of pairs that are not seen to -inf; tells whether there may be any.
    #[inline(always)]
    fn hide(&self, scores: &mut [f32], queries: &Queries<'_>, keys: Keys<'_>) -> bool {
        let (mask, head, rows) = (self.spec.mask, queries.head, &queries.rows);
        let mut hidden = false;
        for (at, range) in keys.pieces() {
            for first in range.clone().step_by(MASK_STEP) {
                let step = first..(first + MASK_STEP).min(range.end);
                let cover = mask.cover(head, rows.clone(), step.clone());
                if cover == Cover::Full {
                    continue;
                }
                hidden = true;
                let scores = &mut scores[(at + first - range.start) * LANES..];
                if cover == Cover::Empty {
                    let keys = (0..step.len()).map(|key| key * LANES..key * LANES + rows.len());
                    keys.for_each(|row| scores[row].fill(f32::NEG_INFINITY));
                } else {
                    mask.hide_tile(head, rows.clone(), step, scores, LANES);
                }
            }
        }
        hidden
    }

    /// What dropout multiplies weights with.
    #[inline(never)]
    fn drop(&self, queries: &Queries<'_>, keys: Keys<'_>, factors: &mut Vec<f32>) {
        factors.resize(self.tiles.block_kv * LANES, 0.0);
        if let Some(dropout) = &self.spec.dropout {
            for (at, j) in keys.rows() {
                let factors = &mut factors[at * LANES..][..queries.rows.len()];
                dropout.factors(queries.head, queries.rows.clone(), j, factors);
            }
        }
    }
}

/// `S^T = K Q^T` with `size = [keys, lanes, width]`: scores, or what replaces them for values.
#[inline(always)]
pub(super) fn score<S: Simd>(simd: S, size: [usize; 3], keys: Wide<'_>, lanes: &[f32], tile: &mut [f32]) {
    let a = Lhs { data: keys.data, row_stride: keys.stride, col_stride: 1 };
    let c = TileMut { data: tile, stride: LANES };
    product(simd, size, a, Rhs { data: lanes, stride: LANES }, c, Start::Zero);
}

/// `C += A B` where some rows of B are NaN or infinite: they reach only rows of C whose number in A is not 0.
#[cold]
#[inline(never)]
pub(super) fn add_poisoned<S: Simd>(
    simd: S,
    [m, n, depth]: [usize; 3],
    a: Lhs<'_>,
    b: Wide<'_>,
    c: &mut [f32],
    finite: &mut Vec<f32>,
) {
    finite.clear();
    finite.resize(depth * n, 0.0);
    for (p, copy) in finite.chunks_exact_mut(n).enumerate() {
        let row = b.row(p, n);
        if all_finite(row) {
            copy.copy_from_slice(row);
            continue;
        }
        for i in 0..m {
            let factor = a.data[i * a.row_stride + p * a.col_stride];
            if factor != 0.0 {
                c[i * n..][..n].iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x);
            }
        }
    }
    let c = TileMut { data: c, stride: n };
    product(simd, [m, n, depth], a, Rhs { data: finite, stride: n }, c, Start::Keep);
}
