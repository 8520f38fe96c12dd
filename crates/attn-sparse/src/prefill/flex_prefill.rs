//! FlexPrefill: each head chooses between lines and blocks by what its last queries attend.
//!
//! From the true probabilities `P` of the last `block` queries: their mean by key (columns) and by distance (diagonals), and
//! both summed over blocks. From the means of blocks: the estimate `softmax(mean(q_last) . mean(k_v))`.
//! If the root of the Jensen-Shannon divergence between the estimate and the true mass of blocks is
//!
//! - not below `tau`: the head takes columns and diagonals of blocks, as many of each as `gamma` asks for: the number of tokens
//!   whose largest entries sum to `gamma`, divided by `budget_tokens`, plus one, within `min_budget` and `max_budget`;
//! - below `tau`: `min_budget` of each, and the blocks `(u, v)` of largest `softmax_v(mean(q_u) . mean(k_v))` over *all* rows
//!   together, as long as their sum stays within `gamma` times the number of rows.
//!
//! The first column and the nearest diagonal are always among them. Always causal, for `n_q = n_kv`, not strictly: the last
//! queries choose for all. A diagonal of blocks has a whole distance of blocks: the distances of its tokens are those of two
//! neighbouring diagonals of blocks when the length is no multiple of `block`.
//!
//! Source: Lai, Lu, Luo, Ma, Zhou, "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
//! Inference", 2025. The authors divide token counts by 128 whatever their block size: that is `budget_tokens`.

use super::grid::{Grid, all_pairs, pooled_work, promises};
use super::minference::choose_by_means;
use crate::block_mask::BlockSizes;
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::{BlockMeans, HeadRows, QuerySums};
use crate::select::{ranked, softmax, top_k_with};
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Qkv, Result, softmax_scale_or_default};

/// Columns and diagonals of blocks, or single blocks, by head. Time of the choice `O(n block + (n / block)^2)`; of
/// attention, by the data: at worst all blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlexPrefill {
    /// Queries, and keys, of a block.
    pub block: usize,
    /// The share of the mass that columns, and diagonals, have to hold, from 0 to 1.
    pub gamma: f64,
    /// Heads whose estimate is closer than this choose single blocks.
    pub tau: f64,
    /// Fewest columns, and diagonals, of blocks.
    pub min_budget: usize,
    /// Most of them; `None` is no bound.
    pub max_budget: Option<usize>,
    /// Tokens for which the budget counts one block.
    pub budget_tokens: usize,
    /// Of the scores; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for FlexPrefill {
    /// Blocks of 128, gamma 0.9, tau 0.1, at least 8 columns and diagonals (1024 tokens), as in the paper.
    fn default() -> Self {
        Self {
            block: 128,
            gamma: 0.9,
            tau: 0.1,
            min_budget: 8,
            max_budget: None,
            budget_tokens: 128,
            softmax_scale: None,
        }
    }
}

/// What a head attends: blocks on these lines.
#[derive(Debug, Clone, Default)]
struct BlockLines {
    columns: Vec<usize>,
    /// Distances in blocks.
    diagonals: Vec<usize>,
    /// Whether single blocks come on top.
    by_means: bool,
}

impl FlexPrefill {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        for (name, share) in [("gamma", self.gamma), ("tau", self.tau)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(AttnError::value(name, share, "from 0 to 1"));
            }
        }
        for (name, least) in [("min_budget", self.min_budget), ("budget_tokens", self.budget_tokens)] {
            if least == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        if shape.n_q != shape.n_kv {
            return Err(AttnError::shape("k", "n_kv", shape.n_kv, format!("n_q = {}", shape.n_q)));
        }
        Ok(())
    }

    /// Lines of blocks for one head, from the probabilities of its last queries and the estimate of their blocks' mass.
    fn lines(&self, sums: &QuerySums, n_last: usize, estimate: &[f32]) -> BlockLines {
        let n_blocks = estimate.len();
        let mean = |sums: &[f32]| -> Vec<f32> { sums.iter().map(|sum| sum / n_last as f32).collect() };
        let (columns, diagonals) = (mean(&sums.columns), mean(&sums.diagonals));
        // Blocks of distances are counted from the far end of the axis, as the authors do.
        let far_first: Vec<f32> = diagonals.iter().rev().copied().collect();
        let of_blocks = |tokens: &[f32]| -> Vec<f32> {
            tokens.chunks(self.block).map(|block| block.iter().sum()).collect()
        };
        let (column_blocks, diagonal_blocks) = (of_blocks(&columns), of_blocks(&far_first));
        let by_means = jensen_shannon(estimate, &column_blocks).sqrt() < self.tau;
        let max_budget = self.max_budget.unwrap_or(n_blocks).min(n_blocks);
        let budget = |tokens: &[f32]| {
            let wanted = if by_means { 0 } else { covering(tokens, self.gamma) / self.budget_tokens + 1 };
            wanted.max(self.min_budget).min(max_budget).max(1)
        };
        let nearest = n_blocks - 1;
        BlockLines {
            columns: top_k_with(&column_blocks, budget(&columns), &[0]),
            diagonals: top_k_with(&diagonal_blocks, budget(&diagonals), &[nearest])
                .into_iter()
                .map(|block| nearest - block)
                .collect(),
            by_means,
        }
    }

    /// Single blocks of the heads that choose by means: `(row, block)` of largest probability, all rows together.
    fn single_blocks(
        &self,
        grid: &Grid,
        isa: Isa,
        means: (&BlockMeans, &BlockMeans),
        scale: f32,
        heads: &[BlockLines],
    ) -> Vec<Vec<usize>> {
        let (n_rows, n_cols) = (grid.n_rows(), grid.n_cols());
        let weights = std::sync::Mutex::new(vec![Vec::<(u32, u32, f32)>::new(); heads.len()]);
        // All blocks below this weight hold less than the share that is left out.
        let least = (1.0 - self.gamma) / n_cols.max(1) as f64;
        choose_by_means(
            grid,
            isa,
            means,
            |row| grid.visible(row),
            |list, row, scores| {
                if heads[list].by_means {
                    scores.iter_mut().for_each(|score| *score *= scale);
                    let row_weights = softmax(scores);
                    let entries =
                        row_weights.iter().enumerate().filter(|(_, weight)| f64::from(**weight) >= least);
                    let entries: Vec<_> =
                        entries.map(|(block, weight)| (row as u32, block as u32, *weight)).collect();
                    let mut all = weights.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    all[list].extend(entries);
                }
                Vec::new()
            },
        );
        let mut weights = weights.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut lists = vec![Vec::new(); heads.len() * n_rows];
        for (list, entries) in weights.iter_mut().enumerate() {
            // Rows came in whatever order they were done; of equal weights the lower row, then the lower block.
            entries.sort_unstable_by(|a, b| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1))));
            let (mut sum, most) = (0.0, self.gamma * n_rows as f64);
            for (row, block, weight) in entries.iter() {
                sum += f64::from(*weight);
                // A share of 1 takes all, whatever the rounding.
                if self.gamma < 1.0 && sum > most {
                    break;
                }
                lists[list * n_rows + *row as usize].push(*block as usize);
            }
        }
        lists
    }
}

/// Entries, largest first, that it takes to reach more than `share`: one more than stay within it; a
/// share of 1 takes all.
fn covering(weights: &[f32], share: f64) -> usize {
    if share >= 1.0 {
        return weights.len();
    }
    let mut sum = 0.0;
    let within = |weight: &f64| {
        sum += weight;
        sum <= share
    };
    ranked(weights).into_iter().map(|index| f64::from(weights[index])).take_while(within).count() + 1
}

/// The Jensen-Shannon divergence of two distributions, in nats; not negative.
fn jensen_shannon(p: &[f32], q: &[f32]) -> f64 {
    let term = |x: f64, m: f64| if x > 0.0 { x * (x / m).ln() } else { 0.0 };
    let both = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p), f64::from(*q));
        let m = (p + q) / 2.0;
        (term(p, m) + term(q, m)) / 2.0
    };
    p.iter().zip(q).map(both).sum::<f64>().max(0.0)
}

impl Decider for FlexPrefill {
    const NAME: &'static str = "flexprefill";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        let shape = x.shape();
        self.check(&shape)?;
        let grid = Grid::new(shape, BlockSizes::square(self.block), true)?;
        let scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let (isa, n_rows) = (Isa::current(), grid.n_rows());
        let mut heads = vec![BlockLines::default(); if n_rows == 0 { 0 } else { grid.n_lists() }];
        let means = (&BlockMeans::of(isa, x.q(), self.block), &BlockMeans::of(isa, x.k(), self.block));
        let last = shape.n_q.saturating_sub(self.block)..shape.n_q;
        let last_mean = BlockMeans::of(isa, &x.q().narrow(last.clone()), self.block);
        for_each_task(
            heads.iter_mut().enumerate(),
            || (),
            |(), (list, lines)| {
                let (batch, head) = (list / shape.n_heads_q, list % shape.n_heads_q);
                let q = HeadRows::of(x.q(), batch, head);
                let k = HeadRows::of(x.k(), batch, shape.kv_head(head));
                let sums = QuerySums::of(isa, q, k, last.clone(), scale);
                let query = last_mean.head(list);
                let score = |key: &[f32]| scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
                let scores: Vec<f32> =
                    means.1.head(grid.kv_list(list)).chunks_exact(shape.head_dim).map(score).collect();
                *lines = self.lines(&sums, last.len(), &softmax(&scores));
            },
        );
        let singles = if heads.iter().any(|lines| lines.by_means) {
            self.single_blocks(&grid, isa, means, scale, &heads)
        } else {
            Vec::new()
        };
        let lists = grid.choose(
            64,
            || (),
            |(), list, rows, lists| {
                let lines = &heads[list];
                for (row, blocks) in rows.zip(lists) {
                    blocks.extend(lines.columns.iter().filter(|column| **column <= row));
                    blocks.extend(lines.diagonals.iter().filter_map(|distance| row.checked_sub(*distance)));
                    blocks.extend(singles.get(list * n_rows + row).into_iter().flatten());
                    if row == 0 {
                        blocks.push(0);
                    }
                }
            },
        );
        grid.decision(&lists)
    }

    fn promises(&self) -> Promises {
        Promises { cross_lengths: false, ..promises(true, Growth::Quadratic, Growth::Quadratic) }
    }

    /// At most: how many blocks are chosen depends on the numbers.
    fn work(&self, shape: &AttnShape) -> Work {
        let mut work = pooled_work(shape, BlockSizes::square(self.block), true, all_pairs(shape, true));
        let last = (self.block * shape.head_dim) as u64;
        work.decision_flops += 4 * last * (crate::heads(shape) * shape.n_kv as u64);
        work
    }
}
