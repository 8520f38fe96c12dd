//! The gradient of a bias: for each of its elements, the sum of `ds` over the pairs whose score reads it.
//!
//! A pass of its own over the scores, only if somebody asks for it. The order of the sums depends on the problem alone: a
//! small table gets private sums for each of a fixed number of shares of the rows, which are added up in order; for a large
//! tensor, whose elements have few terms, the tiles of some blocks are computed side by side and added one after the other.

use super::Pass;
use super::queries::{Queries, QueryScratch, normalise};
use super::tile::{Keys, TileScratch};
use super::weights::LANES;
use crate::engine::chunks::{SHORT, for_each_chunk};
use crate::engine::rows::Wide;
use attn_core::mask::{Head, Mask};
use attn_core::parallel::for_each_task;
use attn_core::score::{BiasIndex, ScoreMod};
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Elements of a table of which every share has its own sums.
const SMALL: usize = 1 << 16;
/// How many shares.
const SHARES: usize = 32;
/// Blocks whose tiles are kept at once.
const SIDE_BY_SIDE: usize = 16;

/// Some queries of a head.
struct Block<'a> {
    head: Head,
    rows: Range<usize>,
    lse: &'a [f32],
    delta: &'a [f32],
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Pass<'_, M, C> {
    /// Writes `grad [elements]`.
    pub(super) fn bias_gradient(&self, state: [&[f32]; 2], index: &dyn BiasIndex, grad: &mut [f32]) {
        let (isa, blocks) = (Isa::current(), self.blocks(state));
        grad.fill(0.0);
        if grad.len() <= SMALL {
            let n = blocks.len().div_ceil(SHARES).max(1);
            let mut shares = vec![vec![0.0f64; grad.len()]; blocks.len().div_ceil(n)];
            for_each_task(
                shares.iter_mut().zip(blocks.chunks(n)),
                || Scratch::new(self),
                |scratch, (sums, blocks)| {
                    for block in blocks {
                        let add = |ranges: &[Range<usize>], tile: &[f32]| {
                            each_pair(block, ranges, tile, |pair, ds| {
                                sums[index.index(pair)] += f64::from(ds)
                            });
                        };
                        isa.run(Tiles { pass: self, block, scratch, visit: add });
                    }
                },
            );
            for (element, grad) in grad.iter_mut().enumerate() {
                *grad = shares.iter().map(|sums| sums[element]).sum::<f64>() as f32;
            }
            return;
        }
        type Kept = Vec<(Vec<Range<usize>>, Vec<f32>)>;
        for blocks in blocks.chunks(SIDE_BY_SIDE) {
            let mut kept: Vec<Kept> = vec![Vec::new(); blocks.len()];
            for_each_task(
                kept.iter_mut().zip(blocks),
                || Scratch::new(self),
                |scratch, (kept, block)| {
                    let keep =
                        |ranges: &[Range<usize>], tile: &[f32]| kept.push((ranges.to_vec(), tile.to_vec()));
                    isa.run(Tiles { pass: self, block, scratch, visit: keep });
                },
            );
            for (kept, block) in kept.iter().zip(blocks) {
                for (ranges, tile) in kept {
                    each_pair(block, ranges, tile, |pair, ds| grad[index.index(pair)] += ds);
                }
            }
        }
    }

    fn blocks<'s>(&self, [lse, delta]: [&'s [f32]; 2]) -> Vec<Block<'s>> {
        let (problem, shape) = (self.problem, self.problem.shape());
        let mut blocks = Vec::new();
        for sequence in 0..problem.n_sequences() {
            let range = problem.q_range(sequence);
            for head in 0..shape.n_heads_q {
                let first = (problem.batch_of(sequence) * shape.n_heads_q + head) * shape.n_q + range.start;
                for row in (0..range.len()).step_by(LANES) {
                    let rows = row..(row + LANES).min(range.len());
                    let [lse, delta] = [lse, delta].map(|numbers| &numbers[first + row..][..rows.len()]);
                    blocks.push(Block { head: Head { batch: sequence, head }, rows, lse, delta });
                }
            }
        }
        blocks
    }
}

/// Calls `visit` with every pair of a tile `[keys, LANES]` and its number.
#[inline(always)]
fn each_pair(
    block: &Block<'_>,
    ranges: &[Range<usize>],
    tile: &[f32],
    mut visit: impl FnMut(attn_core::mask::Pair, f32),
) {
    for (j, row) in ranges.iter().cloned().flatten().zip(tile.chunks_exact(LANES)) {
        for (i, &x) in block.rows.clone().zip(row) {
            visit(block.head.pair(i, j), x);
        }
    }
}

struct Scratch {
    queries: QueryScratch,
    /// `[block_kv, head_dim]` and `[block_kv, head_dim_v]`.
    k: Vec<f32>,
    v: Vec<f32>,
    tile: TileScratch,
}

impl Scratch {
    fn new<M: ?Sized, C: ?Sized>(pass: &Pass<'_, M, C>) -> Self {
        let (shape, block_kv) = (pass.problem.shape(), pass.tiles.block_kv);
        Self {
            queries: QueryScratch::new(shape.head_dim, shape.head_dim_v),
            k: vec![0.0; block_kv * shape.head_dim],
            v: vec![0.0; block_kv * shape.head_dim_v],
            tile: TileScratch::new(block_kv),
        }
    }
}

/// Calls `visit` with the key ranges and the gradients of the scores, `[keys, LANES]`, of every tile of a block.
struct Tiles<'a, M: ?Sized, C: ?Sized, V> {
    pass: &'a Pass<'a, M, C>,
    block: &'a Block<'a>,
    scratch: &'a mut Scratch,
    visit: V,
}

impl<M, C, V> SimdOp for Tiles<'_, M, C, V>
where
    M: Mask + ?Sized,
    C: ScoreMod + ?Sized,
    V: FnMut(&[Range<usize>], &[f32]),
{
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { pass, block, scratch, mut visit } = self;
        let (problem, shape, head) = (pass.problem, pass.problem.shape(), block.head);
        let kv_head = shape.kv_head(head.head);
        let (k_rows, v_rows) = problem.kv_rows(head.batch, kv_head);
        let bias = pass.key_bias(head.batch, kv_head);
        let Scratch { queries, k, v, tile } = scratch;
        let queries = Queries::load(simd, pass, head, block.rows.clone(), [block.lse, block.delta], queries);
        let n_kv = problem.kv_range(head.batch).len();
        let spans = pass.spec.mask.spans(head, block.rows.clone(), n_kv);
        for_each_chunk(&spans, pass.tiles.block_kv, SHORT, |ranges| {
            let k = match &pass.spec.qk_norm {
                None => k_rows.wide(ranges, k),
                Some(norm) => {
                    let n = k_rows.copy_to(ranges, k);
                    normalise(&mut k[..n * shape.head_dim], shape.head_dim, norm.k());
                    Wide { data: k, stride: shape.head_dim }
                }
            };
            let keys = Keys { ranges, k, v: v_rows.wide(ranges, v), bias };
            if let Some(tile) = pass.score_gradients(simd, &queries, keys, tile) {
                visit(ranges, tile);
            }
        });
    }
}
