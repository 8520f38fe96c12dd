//! SpargeAttn: means of blocks stand for blocks whose rows are alike; the others are always attended.
//!
//! ```text
//! S_uv = softmax_scale * mean(q_u) . mean(k_v)        -inf for blocks v that are not alike or not visible
//! P_u. = softmax of S_u.
//! ```
//!
//! Row block `u` attends the blocks of largest `P_uv` as long as their sum stays within `cdf` (at least one), every block
//! of keys whose similarity is not above `similarity`, and all blocks if `u` itself is not alike. The similarity of a block is
//! the mean cosine of its pairs of rows. A `similarity` of 1 attends all. Not strictly causal: means are over whole blocks.
//!
//! Second stage, with `lambda`: a block is dropped again if, for every one of its queries, its largest score lies more
//! than `lambda` below the largest score of the chosen blocks before it: its weights are below `e^-lambda` of the row's
//! largest. The authors skip the value product of such tiles inside their kernel, keeping them in the normaliser; here the
//! block is not attended at all, which costs its score product once more and differs by less than
//! `e^-lambda` a key.
//!
//! Source: Zhang, Xiang, Huang, Wei, Xi, Zhu, Chen, "SpargeAttention: Accurate and Training-free Sparse Attention
//! Accelerating Any Model Inference", 2025.

use super::grid::{Grid, all_pairs, pooled_work, promises};
use super::minference::choose_by_means;
use crate::block_mask::BlockSizes;
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::{BlockMeans, HeadRows, TileMaxima};
use crate::select::{softmax, top_p_within};
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Qkv, Result, softmax_scale_or_default};

/// Blocks by the mass of their means, and all that are not alike inside. Time of the choice `O((n / block)^2)`; of
/// attention, by the data: at worst all blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpargeAttn {
    /// No key after the query is attended.
    pub causal: bool,
    /// Queries and keys of a block.
    pub sizes: BlockSizes,
    /// Blocks whose rows are not more alike than this are always attended.
    pub similarity: f32,
    /// The share of the mass, from 0 to 1.
    pub cdf: f64,
    /// How far below the largest score a block may lie; `None` leaves the second stage out.
    pub lambda: Option<f32>,
    /// Of the scores; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for SpargeAttn {
    /// Causal, 128 queries against 64 keys, the authors' thresholds, no second stage.
    fn default() -> Self {
        let sizes = BlockSizes { q: 128, kv: 64 };
        Self { causal: true, sizes, similarity: 0.6, cdf: 0.98, lambda: None, softmax_scale: None }
    }
}

impl SpargeAttn {
    fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.cdf) {
            return Err(AttnError::value("cdf", self.cdf, "from 0 to 1"));
        }
        if self.similarity.is_nan() {
            return Err(AttnError::value("similarity", self.similarity, "a number"));
        }
        match self.lambda {
            Some(lambda) if lambda.is_nan() || lambda < 0.0 => {
                Err(AttnError::value("lambda", lambda, "at least 0"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the mean of a block may stand for its rows; not if it is NaN.
    fn are_alike(&self, similarity: f32) -> bool {
        similarity > self.similarity
    }

    /// Drops listed blocks that lie below the running maximum by `lambda`.
    fn skip(
        &self,
        grid: &Grid,
        x: &Qkv<'_>,
        scale: f32,
        lambda: f32,
        lists: Vec<Vec<usize>>,
    ) -> Vec<Vec<usize>> {
        let (shape, isa, n_rows) = (grid.shape, Isa::current(), grid.n_rows());
        grid.choose(1, Vec::new, |maxima: &mut Vec<f32>, list, rows, kept| {
            let (batch, head) = (list / shape.n_heads_q, list % shape.n_heads_q);
            let q = HeadRows::of(x.q(), batch, head);
            let k = HeadRows::of(x.k(), batch, shape.kv_head(head));
            for (row, kept) in rows.zip(kept) {
                let queries = row * self.sizes.q..((row + 1) * self.sizes.q).min(shape.n_q);
                let blocks = &lists[list * n_rows + row];
                // [blocks, queries]
                isa.run(TileMaxima {
                    q,
                    k,
                    rows: queries.clone(),
                    blocks: (blocks, self.sizes.kv),
                    softmax_scale: scale,
                    causal: self.causal,
                    maxima,
                });
                let mut running = vec![f32::NEG_INFINITY; queries.len()];
                let of_blocks = maxima.chunks_exact(queries.len().max(1));
                for (block, tile) in blocks.iter().zip(of_blocks) {
                    running.iter_mut().zip(tile).for_each(|(running, tile)| *running = running.max(*tile));
                    // Written so that NaN keeps a block.
                    let below = |(tile, running): (&f32, &f32)| *tile < running - lambda;
                    if !tile.iter().zip(&running).all(below) {
                        kept.push(*block);
                    }
                }
            }
        })
    }
}

impl Decider for SpargeAttn {
    const NAME: &'static str = "spargeattn";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.check()?;
        let grid = Grid::new(x.shape(), self.sizes, self.causal)?;
        let scale = softmax_scale_or_default(self.softmax_scale, x.shape().head_dim)?;
        let isa = Isa::current();
        let (q, k) = (BlockMeans::of(isa, x.q(), self.sizes.q), BlockMeans::of(isa, x.k(), self.sizes.kv));
        let lists = choose_by_means(
            &grid,
            isa,
            (&q, &k),
            |row| grid.visible(row),
            |list, row, scores| {
                if !self.are_alike(q.similarity(list)[row]) {
                    return (0..scores.len()).collect();
                }
                let alike = k.similarity(grid.kv_list(list)).iter().map(|x| self.are_alike(*x));
                let mut always = Vec::new();
                for (block, (score, alike)) in scores.iter_mut().zip(alike).enumerate() {
                    *score *= scale;
                    if !alike {
                        *score = f32::NEG_INFINITY;
                        always.push(block);
                    }
                }
                let hidden: Vec<bool> = scores.iter().map(|score| *score == f32::NEG_INFINITY).collect();
                let mut weights = softmax(scores);
                for (weight, hidden) in weights.iter_mut().zip(hidden) {
                    *weight = if hidden { f32::NEG_INFINITY } else { *weight };
                }
                always.extend(top_p_within(&weights, self.cdf));
                always
            },
        );
        let lists = match self.lambda {
            Some(lambda) => self.skip(&grid, x, scale, lambda, sorted(lists)),
            None => lists,
        };
        grid.decision(&lists)
    }

    fn promises(&self) -> Promises {
        promises(self.causal, Growth::Quadratic, Growth::Quadratic)
    }

    /// At most: how many blocks are chosen depends on the numbers.
    fn work(&self, shape: &AttnShape) -> Work {
        let pairs = all_pairs(shape, self.causal);
        let mut work = pooled_work(shape, self.sizes, self.causal, pairs);
        if self.lambda.is_some() {
            work.decision_flops += 2 * pairs * shape.head_dim as u64;
        }
        work
    }
}

/// Each list ascending.
fn sorted(mut lists: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    lists.iter_mut().for_each(|list| list.sort_unstable());
    lists
}
