//! XAttention: antidiagonals of the score matrix say which blocks matter.
//!
//! Row block `u` attends its own block, then the others by falling estimated mass until a share `threshold` of the row's mass
//! is reached, one more (in the authors' code the running sum lags one block behind), and the first block. Without `causal`,
//! the fewest blocks that reach the share. The mass is summed over every `stride`-th antidiagonal. A `threshold` of 1 attends
//! all. Not strictly causal: a row block shares its choice.
//!
//! Source: Xu, Xiao, Huang, Guo, Han, "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025.

use super::grid::{Grid, all_pairs, promises};
use crate::block_mask::BlockSizes;
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::{HeadRows, PANEL, Strided, antidiagonal_sums};
use crate::select::{top_k_with, top_p, top_p_with};
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Qkv, Result, softmax_scale_or_default};

/// Blocks that hold a share of the estimated mass. Time of the choice `1 / (2 stride)` of exact attention; of
/// attention, by the data: at worst all blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct XAttention {
    /// No key after the query is attended.
    pub causal: bool,
    /// Queries, and keys, of a block; a multiple of `stride`.
    pub block: usize,
    /// Every so many antidiagonals one is summed.
    pub stride: usize,
    /// The share of the mass, from 0 to 1.
    pub threshold: f64,
    /// Divides the estimated scores.
    pub norm: f32,
    /// Of the scores; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for XAttention {
    /// Causal, blocks of 128, stride 16, threshold 0.9.
    fn default() -> Self {
        Self { causal: true, block: 128, stride: 16, threshold: 0.9, norm: 1.0, softmax_scale: None }
    }
}

impl XAttention {
    fn check(&self) -> Result<()> {
        if self.stride == 0 || self.block == 0 || !self.block.is_multiple_of(self.stride) {
            let expected = format!("a positive multiple of stride = {}", self.stride);
            return Err(AttnError::value("block", self.block, expected));
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            return Err(AttnError::value("threshold", self.threshold, "from 0 to 1"));
        }
        if !(self.norm.is_finite() && self.norm > 0.0) {
            return Err(AttnError::value("norm", self.norm, "a positive number"));
        }
        Ok(())
    }
}

impl Decider for XAttention {
    const NAME: &'static str = "xattention";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.check()?;
        let shape = x.shape();
        let grid = Grid::new(shape, BlockSizes::square(self.block), self.causal)?;
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let (isa, groups) = (Isa::current(), self.block / self.stride);
        let (n_cols, n_groups) = (grid.n_cols(), shape.n_q.div_ceil(self.stride));
        // As many whole blocks as fit into a panel, at least one.
        let rows_each = (PANEL / groups).max(1);
        let lists = grid.choose(rows_each, Vec::new, |sums: &mut Vec<f32>, list, rows, lists| {
            let (batch, head) = (list / shape.n_heads_q, list % shape.n_heads_q);
            let strided = Strided {
                q: HeadRows::of(x.q(), batch, head),
                k: HeadRows::of(x.k(), batch, shape.kv_head(head)),
                stride: self.stride,
                block: groups,
                scale: softmax_scale / (self.stride as f32 * self.norm),
                causal: self.causal,
            };
            let first = rows.start * groups;
            let end = (rows.end * groups).min(n_groups);
            sums.clear();
            sums.resize((end - first) * n_cols, 0.0);
            for panel in (first..end).step_by(PANEL) {
                let count = PANEL.min(end - panel);
                let sums = &mut sums[(panel - first) * n_cols..][..count * n_cols];
                isa.run(antidiagonal_sums(strided, panel, count, sums));
            }
            for (row, list) in rows.zip(lists) {
                let of_row = (row * groups - first)..((row + 1) * groups).min(n_groups) - first;
                let visible = grid.visible(row);
                let mut mass = vec![0.0; visible];
                for group in of_row {
                    mass.iter_mut().zip(&sums[group * n_cols..]).for_each(|(mass, sum)| *mass += sum);
                }
                *list = if self.causal {
                    let share = top_p_with(&mass, self.threshold, &grid.own(row).collect::<Vec<_>>());
                    // Of nothing there is no next one.
                    let more = usize::from(self.threshold > 0.0);
                    let mut blocks = top_k_with(&mass, share.len() + more, &share);
                    blocks.extend((visible > 0).then_some(0));
                    blocks
                } else {
                    top_p(&mass, self.threshold)
                };
            }
        });
        grid.decision(&lists)
    }

    fn promises(&self) -> Promises {
        promises(self.causal, Growth::Quadratic, Growth::Quadratic)
    }

    /// At most: how many blocks are chosen depends on the numbers.
    fn work(&self, shape: &AttnShape) -> Work {
        let pairs = all_pairs(shape, self.causal);
        let width = shape.head_dim as u64;
        Work {
            pairs,
            decision_flops: 2 * pairs * width / self.stride.max(1) as u64,
            decision_bytes: 16 * pairs / (self.block * self.block).max(1) as u64,
        }
    }
}
