//! A block of keys meets a block of queries: five products for each tile of both.
//!
//! Queries stand in the vector lanes of the tile; gradients have their own width in the lanes:
//!
//! ```text
//! S^T  = K Q^T     [keys, queries]            P^T, dR^T from S^T and dP^T, see `weights`
//! dP^T = V dO^T    [keys, queries]
//! dV  += W^T dO    [keys, head_dim_v]
//! dK  += dR^T Q    [keys, head_dim]
//! dQ  += dR K      [queries, head_dim]
//! ```
//!
//! The gradients of a span of keys stay in the second-level cache while all queries of the block pass by.

use super::Pass;
use super::blocks::{KeyBlock, RowBlock};
use super::queries::{Queries, QueryScratch, normalise};
use super::weights::{Extras, LANES, Tile, weigh, weigh_all};
use crate::engine::chunks::for_each_chunk;
use crate::engine::rows::Wide;
use attn_core::mask::{Cover, Mask};
use attn_core::score::{ScoreMod, ScoreTile};
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, product};
use std::ops::Range;

/// Keys whose cover is asked together inside a partial tile.
const MASK_STEP: usize = 32;

/// Lanes that a score mod takes at once.
const HALF: usize = 32;

/// A thread's scratch.
pub(super) struct Workspace {
    queries: QueryScratch,
    /// `[span, head_dim]` and `[span, head_dim_v]`, for keys that are not read in place.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Gradients of a span of keys.
    grad_k: Vec<f32>,
    grad_v: Vec<f32>,
    key_sums: Vec<f32>,
    /// `[LANES, head_dim]`.
    grad_q: Vec<f32>,
    tile: TileScratch,
    gathered: Gathered,
}

/// Scratch of one tile, `[block_kv, LANES]` each.
struct TileScratch {
    scores: Vec<f32>,
    grads: Vec<f32>,
    /// Empty until needed.
    slopes: Vec<f32>,
    factors: Vec<f32>,
    /// Rows without those that are not finite.
    finite: Vec<f32>,
}

/// Keys that do not lie side by side, and their gradients; empty until needed.
#[derive(Default)]
struct Gathered {
    k: Vec<f32>,
    v: Vec<f32>,
    grad_k: Vec<f32>,
    grad_v: Vec<f32>,
    key_sums: Vec<f32>,
}

impl Workspace {
    pub(super) fn new<M: ?Sized, C: ?Sized>(pass: &Pass<'_, M, C>) -> Self {
        let (shape, tiles) = (pass.problem.shape(), pass.tiles);
        let zeros = |rows: usize, width: usize| vec![0.0; rows * width];
        let span = tiles.span.min(shape.n_kv);
        Self {
            queries: QueryScratch::new(shape.head_dim, shape.head_dim_v),
            // Untouched pages of these cost nothing when keys are read in place.
            k: zeros(span, shape.head_dim),
            v: zeros(span, shape.head_dim_v),
            grad_k: zeros(span, shape.head_dim),
            grad_v: zeros(span, shape.head_dim_v),
            key_sums: zeros(span, 1),
            grad_q: zeros(LANES, shape.head_dim),
            tile: TileScratch {
                scores: zeros(tiles.block_kv, LANES),
                grads: zeros(tiles.block_kv, LANES),
                slopes: Vec::new(),
                factors: Vec::new(),
                finite: Vec::new(),
            },
            gathered: Gathered::default(),
        }
    }
}

/// The kernel.
pub(super) struct Meeting<'a, 'b, M: ?Sized, C: ?Sized> {
    pub(super) pass: &'a Pass<'a, M, C>,
    pub(super) keys: &'a mut KeyBlock<'b>,
    pub(super) rows: &'a mut RowBlock<'b>,
    pub(super) workspace: &'a mut Workspace,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for Meeting<'_, '_, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { pass, keys, rows, workspace } = self;
        let (problem, spec, shape) = (pass.problem, pass.spec, pass.problem.shape());
        let (d, d_v) = (shape.head_dim, shape.head_dim_v);
        let n_kv = problem.kv_range(keys.sequence).len();
        let (k_rows, v_rows) = problem.kv_rows(keys.sequence, keys.kv_head);
        let Workspace { queries, k: wide_k, v: wide_v, grad_k, grad_v, key_sums, grad_q, tile, gathered } =
            workspace;

        for first in keys.keys.clone().step_by(pass.tiles.span) {
            let span = first..(first + pass.tiles.span).min(keys.keys.end);
            let k = match &spec.qk_norm {
                None => k_rows.wide(std::slice::from_ref(&span), wide_k),
                Some(norm) => {
                    k_rows.piece(span.clone()).copy_to(wide_k);
                    normalise(&mut wide_k[..span.len() * d], d, norm.k());
                    Wide { data: wide_k, stride: d }
                }
            };
            let v = v_rows.wide(std::slice::from_ref(&span), wide_v);
            let mut met = false;
            for row in rows.rows.clone().step_by(LANES) {
                let block = row..(row + LANES).min(rows.rows.end);
                let mut spans = spec.mask.spans(rows.head, block.clone(), n_kv);
                spans.iter_mut().for_each(|s| *s = s.start.max(span.start)..s.end.min(span.end));
                spans.retain(|s| !s.is_empty());
                if spans.is_empty() {
                    continue;
                }
                if !met {
                    met = true;
                    grad_k[..span.len() * d].fill(0.0);
                    grad_v[..span.len() * d_v].fill(0.0);
                    key_sums.fill(0.0);
                }
                let at = row - rows.rows.start;
                let state = [rows.lse, rows.delta].map(|numbers| &numbers[at..at + block.len()]);
                let queries = Queries::load(simd, pass, rows.head, block.clone(), state, queries);
                let grad_q = &mut grad_q[..block.len() * d];
                grad_q.fill(0.0);
                for_each_chunk(&spans, pass.tiles.block_kv, |ranges| {
                    let keys = Keys { ranges, bias: keys.bias };
                    if let [range] = ranges {
                        let (at, n) = (range.start - span.start, range.len());
                        let grads = Grads {
                            q: grad_q,
                            k: &mut grad_k[at * d..][..n * d],
                            v: &mut grad_v[at * d_v..][..n * d_v],
                            key_sums: pass.sum_keys.then(|| &mut key_sums[at..at + n]),
                        };
                        return pass.meet(simd, &queries, keys, [k.skip(at), v.skip(at)], grads, tile);
                    }
                    let places = || ranges.iter().cloned().flatten().map(|j| j - span.start).enumerate();
                    gathered.gather(places(), [k, v], [d, d_v]);
                    let grads = Grads {
                        q: grad_q,
                        k: &mut gathered.grad_k,
                        v: &mut gathered.grad_v,
                        key_sums: pass.sum_keys.then_some(&mut gathered.key_sums),
                    };
                    let kv = [Wide { data: &gathered.k, stride: d }, Wide { data: &gathered.v, stride: d_v }];
                    pass.meet(simd, &queries, keys, kv, grads, tile);
                    scatter(places(), &gathered.grad_k, grad_k, d);
                    scatter(places(), &gathered.grad_v, grad_v, d_v);
                    scatter(places(), &gathered.key_sums, key_sums, 1);
                });
                rows.grad_q.add(at, grad_q);
            }
            if met {
                let at = span.start - keys.keys.start;
                keys.grad_k.add(at, &grad_k[..span.len() * d]);
                keys.grad_v.add(at, &grad_v[..span.len() * d_v]);
                for (sum, x) in keys.key_sums.iter_mut().skip(at).zip(&key_sums[..span.len()]) {
                    *sum += x;
                }
            }
        }
    }
}

impl Gathered {
    /// Copies the rows at `places` side by side, and sets their gradients to zero.
    fn gather(
        &mut self,
        places: impl Iterator<Item = (usize, usize)> + Clone,
        rows: [Wide<'_>; 2],
        widths: [usize; 2],
    ) {
        let n = places.clone().count();
        for ((wide, width), copy) in rows.into_iter().zip(widths).zip([&mut self.k, &mut self.v]) {
            copy.resize(n * width, 0.0);
            for (to, from) in places.clone() {
                copy[to * width..][..width].copy_from_slice(wide.row(from, width));
            }
        }
        for (grads, width) in
            [(&mut self.grad_k, widths[0]), (&mut self.grad_v, widths[1]), (&mut self.key_sums, 1)]
        {
            grads.clear();
            grads.resize(n * width, 0.0);
        }
    }
}

fn scatter(places: impl Iterator<Item = (usize, usize)>, from: &[f32], to: &mut [f32], width: usize) {
    for (x, place) in places {
        let sum = to[place * width..][..width].iter_mut();
        sum.zip(&from[x * width..][..width]).for_each(|(sum, x)| *sum += x);
    }
}

/// Keys of a tile.
#[derive(Clone, Copy)]
struct Keys<'a> {
    ranges: &'a [Range<usize>],
    /// `[keys of the sequence]`.
    bias: Option<&'a [f32]>,
}

impl Keys<'_> {
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

/// What a tile adds to.
struct Grads<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    key_sums: Option<&'a mut [f32]>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Pass<'_, M, C> {
    #[inline(always)]
    fn meet<S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        kv: [Wide<'_>; 2],
        grads: Grads<'_>,
        scratch: &mut TileScratch,
    ) {
        let cover =
            |range: &Range<usize>| self.spec.mask.cover(queries.head, queries.rows.clone(), range.clone());
        let mut covers = keys.ranges.iter().map(cover);
        let first = covers.next().unwrap_or(Cover::Empty);
        let cover = if covers.all(|cover| cover == first) { first } else { Cover::Partial };
        if cover != Cover::Empty {
            simd.vectorize(
                #[inline(always)]
                || self.meet_seen(simd, queries, keys, kv, grads, scratch, cover),
            );
        }
    }

    #[inline(always)]
    #[expect(
        clippy::too_many_arguments,
        reason = "one call of `meet`, split for the sake of code generation"
    )]
    fn meet_seen<S: Simd>(
        &self,
        simd: S,
        queries: &Queries<'_>,
        keys: Keys<'_>,
        [k, v]: [Wide<'_>; 2],
        grads: Grads<'_>,
        scratch: &mut TileScratch,
        cover: Cover,
    ) {
        let (spec, shape) = (self.spec, self.problem.shape());
        let (d, d_v, n_keys, n_rows) = (shape.head_dim, shape.head_dim_v, keys.len(), queries.rows.len());
        let lanes = n_rows.next_multiple_of(S::f32s::LEN);
        let TileScratch { scores, grads: tile_grads, slopes, factors, finite } = scratch;
        let (scores, tile_grads) = (&mut scores[..n_keys * LANES], &mut tile_grads[..n_keys * LANES]);
        let lanes_of = |data| Rhs { data, stride: LANES };

        let c = TileMut { data: scores, stride: LANES };
        product(simd, [n_keys, lanes, d], by_rows(k), lanes_of(queries.q_t), c, Start::Zero);
        let plain = spec.score_mod.is_identity();
        if !plain {
            self.modify(scores, queries, keys, slopes);
        }
        if let Some(bias) = keys.bias {
            for (at, j) in keys.rows() {
                scores[at * LANES..][..LANES].iter_mut().for_each(|s| *s += bias[j]);
            }
        }
        let hidden = cover == Cover::Partial && self.hide(scores, queries, keys);
        let c = TileMut { data: tile_grads, stride: LANES };
        product(simd, [n_keys, lanes, d_v], by_rows(v), lanes_of(queries.grad_out_t), c, Start::Zero);

        let careful = hidden || !plain || keys.bias.is_some() || spec.dropout.is_some() || queries.some_dead;
        let tile = Tile { scores, grads: tile_grads };
        if plain && spec.dropout.is_none() && grads.key_sums.is_none() {
            match careful {
                false => weigh::<S, false>(simd, tile, lanes, &queries.state, spec.softmax_scale),
                true => weigh::<S, true>(simd, tile, lanes, &queries.state, spec.softmax_scale),
            }
        } else {
            if spec.dropout.is_some() {
                self.drop(queries, keys, factors);
            }
            let extras = Extras {
                slopes: (!plain).then_some(&**slopes),
                factors: spec.dropout.is_some().then_some(&**factors),
                key_sums: grads.key_sums,
            };
            weigh_all(simd, tile, lanes, &queries.state, spec.softmax_scale, extras);
        }

        // A weight of 0 times NaN or infinity would leak what the pair must not see.
        let poisoned = careful && !(queries.finite && (0..n_keys).all(|key| all_finite(k.row(key, d))));
        let mut add = |[m, n, depth]: [usize; 3], a: Lhs<'_>, b: Wide<'_>, c: &mut [f32]| {
            if poisoned {
                return add_poisoned(simd, [m, n, depth], a, b, c, finite);
            }
            let c = TileMut { data: c, stride: n };
            product(simd, [m, n, depth], a, Rhs { data: b.data, stride: b.stride }, c, Start::Keep);
        };
        let by_keys = |data| Lhs { data, row_stride: LANES, col_stride: 1 };
        add([n_keys, d_v, n_rows], by_keys(scores), queries.grad_out, grads.v);
        add([n_keys, d, n_rows], by_keys(tile_grads), queries.q, grads.k);
        let by_queries = Lhs { data: tile_grads, row_stride: 1, col_stride: LANES };
        add([n_rows, d, n_keys], by_queries, k, grads.q);
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
                for (j, row) in step.zip(at + first - range.start..) {
                    let scores = &mut scores[row * LANES..][..rows.len()];
                    match cover {
                        Cover::Empty => scores.fill(f32::NEG_INFINITY),
                        _ => mask.hide(head, rows.clone(), j, scores),
                    }
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

fn by_rows(rows: Wide<'_>) -> Lhs<'_> {
    Lhs { data: rows.data, row_stride: rows.stride, col_stride: 1 }
}

/// `C += A B` where some rows of B are NaN or infinite: they reach only rows of C whose number in A is not 0.
#[cold]
#[inline(never)]
fn add_poisoned<S: Simd>(
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
