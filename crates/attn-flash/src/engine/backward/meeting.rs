//! A block of keys meets a block of queries.
//!
//! The rows and gradients of a span of keys stay in the second-level cache while all queries of the block pass by, some
//! lanes at a time; these meet the keys they see tile by tile (`tile`). Keys that do not lie side by side are gathered
//! first, and their gradients scattered.

use super::Pass;
use super::blocks::{KeyBlock, RowBlock};
use super::queries::{Queries, QueryScratch, normalise};
use super::tile::{Grads, Keys, TileScratch};
use super::weights::LANES;
use crate::engine::chunks::{SHORT, for_each_chunk};
use crate::engine::rows::Wide;
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdOp};

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
            tile: TileScratch::new(tiles.block_kv),
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
                    k_rows.copy_to(std::slice::from_ref(&span), wide_k);
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
                for_each_chunk(&spans, pass.tiles.block_kv, SHORT, |ranges| {
                    let bias = keys.bias;
                    if let [range] = ranges {
                        let (at, n) = (range.start - span.start, range.len());
                        let grads = Grads {
                            q: grad_q,
                            k: &mut grad_k[at * d..][..n * d],
                            v: &mut grad_v[at * d_v..][..n * d_v],
                            key_sums: pass.sum_keys.then(|| &mut key_sums[at..at + n]),
                        };
                        let keys = Keys { ranges, k: k.skip(at), v: v.skip(at), bias };
                        return pass.meet(simd, &queries, keys, grads, tile);
                    }
                    let places = || ranges.iter().cloned().flatten().map(|j| j - span.start).enumerate();
                    gathered.gather(places(), [k, v], [d, d_v]);
                    let grads = Grads {
                        q: grad_q,
                        k: &mut gathered.grad_k,
                        v: &mut gathered.grad_v,
                        key_sums: pass.sum_keys.then_some(&mut gathered.key_sums),
                    };
                    let (k, v) =
                        (Wide { data: &gathered.k, stride: d }, Wide { data: &gathered.v, stride: d_v });
                    pass.meet(simd, &queries, Keys { ranges, k, v, bias }, grads, tile);
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
