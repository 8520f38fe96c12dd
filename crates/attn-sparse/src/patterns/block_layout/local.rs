//! Neighbouring blocks, alone or with global and random ones.

use super::variable::GlobalBlocks;
use super::{BlockLayout, draw};
use attn_core::Result;

/// Neighbouring blocks: alone, or as a part of the other two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalLayout {
    /// Positions of a block.
    pub block: usize,
    /// Blocks around a row's own, half on each side.
    pub num_sliding_window_blocks: usize,
    /// Nothing after the diagonal.
    pub causal: bool,
}

impl LocalLayout {
    /// The row's own block, and those on each side.
    fn neighbours(&self, row: usize) -> std::ops::Range<usize> {
        let side = self.num_sliding_window_blocks / 2;
        row.saturating_sub(side)..row + side + 1
    }
}

impl BlockLayout for LocalLayout {
    const NAME: &'static str = "block-layout-localslidingwindow";

    fn block(&self) -> usize {
        self.block
    }

    fn causal(&self) -> bool {
        self.causal
    }

    fn row(&self, _: usize, row: usize, _: usize) -> Vec<usize> {
        self.neighbours(row).collect()
    }
}

/// Neighbouring blocks, and global ones that all see and that see all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LongformerLayout {
    /// Neighbouring blocks.
    pub local: LocalLayout,
    /// Global blocks.
    pub globals: GlobalBlocks,
}

impl BlockLayout for LongformerLayout {
    const NAME: &'static str = "block-layout-bslongformer";

    fn block(&self) -> usize {
        self.local.block
    }

    fn causal(&self) -> bool {
        self.local.causal
    }

    fn row(&self, _: usize, row: usize, n_blocks: usize) -> Vec<usize> {
        if self.globals.contain(row) {
            return (0..n_blocks).collect();
        }
        self.local.neighbours(row).chain(self.globals.below(n_blocks)).collect()
    }

    fn check(&self) -> Result<()> {
        self.local.check()?;
        self.globals.check()
    }
}

/// Neighbouring blocks, the first blocks (which see all), and random ones, drawn among all blocks up to the diagonal, or among
/// all in a bidirectional layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BigBirdLayout {
    /// Neighbouring blocks.
    pub local: LocalLayout,
    /// Random blocks of a row.
    pub num_random_blocks: usize,
    /// First blocks that all see and that see all.
    pub num_global_blocks: usize,
    /// Heads draw their own random blocks.
    pub different_layout_per_head: bool,
    /// What random blocks are drawn with.
    pub seed: u64,
}

impl BlockLayout for BigBirdLayout {
    const NAME: &'static str = "block-layout-bigbird";

    fn block(&self) -> usize {
        self.local.block
    }

    fn causal(&self) -> bool {
        self.local.causal
    }

    fn per_head(&self) -> bool {
        self.different_layout_per_head
    }

    fn row(&self, head: usize, row: usize, n_blocks: usize) -> Vec<usize> {
        if row < self.num_global_blocks {
            return (0..n_blocks).collect();
        }
        let among = if self.local.causal { row + 1 } else { n_blocks };
        let random = draw([self.seed, head as u64, row as u64], among, &[], self.num_random_blocks);
        random.into_iter().chain(self.local.neighbours(row)).chain(0..self.num_global_blocks).collect()
    }
}
