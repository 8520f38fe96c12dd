//! BigBird: in blocks of `b` positions, a block row sees its neighbours, the first and the last blocks, and `r` random blocks
//! among the rest; the first and the last block rows see everything.
//!
//! Random blocks come from a seed, are drawn without repetition for every head and block row, and are part of the layout. A
//! causal form keeps what lies up to the diagonal: the first blocks are global there, the last ones are the future; random
//! blocks are drawn among earlier ones.
//!
//! Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020.

use super::block_layout::{BlockLayout, draw};

/// Window, global and random blocks. Time `O(n * block * (window + 2 * global + random))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BigBird {
    /// Positions of a block.
    pub block: usize,
    /// Random blocks of a row.
    pub num_random_blocks: usize,
    /// Blocks around a row's own, itself included: half of them, rounded down, on each side.
    pub num_window_blocks: usize,
    /// Blocks at each end that all see and that see all.
    pub num_global_blocks: usize,
    /// What random blocks are drawn with.
    pub seed: u64,
    /// Nothing after the diagonal.
    pub causal: bool,
}

impl BlockLayout for BigBird {
    const NAME: &'static str = "bigbird";

    fn block(&self) -> usize {
        self.block
    }

    fn causal(&self) -> bool {
        self.causal
    }

    fn per_head(&self) -> bool {
        self.num_random_blocks > 0
    }

    fn row(&self, head: usize, row: usize, n_blocks: usize) -> Vec<usize> {
        let (end, globals) = (if self.causal { row + 1 } else { n_blocks }, self.num_global_blocks);
        let last = if self.causal { end } else { n_blocks.saturating_sub(globals) };
        if row < globals || row >= last && !self.causal {
            return (0..end).collect();
        }
        let half = self.num_window_blocks / 2;
        let near = row.saturating_sub(half)..(row + half + 1).min(end);
        let mut blocks: Vec<usize> = (0..globals.min(end)).chain(near).chain(last..end).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let random = draw([self.seed, head as u64, row as u64], end, &blocks, self.num_random_blocks);
        blocks.extend(random);
        blocks
    }
}
