//! Local windows of given lengths, chosen global blocks, random blocks.

use super::fixed::horizontal;
use super::{BlockLayout, draw};
use attn_core::{AttnError, Result};
use std::ops::Range;

/// Blocks that all see, and that see all where the layout says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GlobalBlocks {
    /// First blocks of runs; a run of one block without `ends`.
    pub starts: Vec<usize>,
    /// Ends of the runs, exclusive; as many as `starts`, or none.
    pub ends: Vec<usize>,
}

impl GlobalBlocks {
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let end = |at: usize, start: usize| self.ends.get(at).copied().unwrap_or(start + 1);
        self.starts.iter().enumerate().map(move |(at, start)| *start..end(at, *start))
    }

    pub(super) fn contain(&self, block: usize) -> bool {
        self.runs().any(|run| run.contains(&block))
    }

    /// The blocks among the first `n`.
    pub(super) fn below(&self, n: usize) -> impl Iterator<Item = usize> + '_ {
        self.runs().flat_map(move |run| run.start..run.end.min(n))
    }

    pub(super) fn check(&self) -> Result<()> {
        if !self.ends.is_empty() && self.ends.len() != self.starts.len() {
            let expected = format!("{} as global_block_indices", self.starts.len());
            return Err(AttnError::value("global_block_end_indices", self.ends.len(), expected));
        }
        match self.runs().find(Range::is_empty) {
            Some(run) => {
                let expected = format!("above its start, {}", run.start);
                Err(AttnError::value("global_block_end_indices", run.end, expected))
            }
            None => Ok(()),
        }
    }
}

/// Windows of `local_window_blocks` blocks, the last length for all that follow; global blocks, seen by all (by later rows, if
/// causal) and seeing all if `horizontal_global_attention`; and random blocks, drawn among all blocks up to the diagonal, or
/// among all in a bidirectional layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VariableLayout {
    /// Positions of a block.
    pub block: usize,
    /// Random blocks of a row.
    pub num_random_blocks: usize,
    /// Blocks of the local windows, in their order.
    pub local_window_blocks: Vec<usize>,
    /// Blocks that all see.
    pub globals: GlobalBlocks,
    /// Rows of global blocks see everything; bidirectional layouts alone.
    pub horizontal_global_attention: bool,
    /// Heads draw their own random blocks.
    pub different_layout_per_head: bool,
    /// Nothing after the diagonal.
    pub causal: bool,
    /// What random blocks are drawn with.
    pub seed: u64,
}

impl VariableLayout {
    /// The local window of a row.
    fn window(&self, row: usize) -> Range<usize> {
        let (mut start, mut length) = (0, 1);
        for &blocks in &self.local_window_blocks {
            length = blocks;
            if row < start + blocks {
                return start..start + blocks;
            }
            start += blocks;
        }
        let start = start + (row - start) / length * length;
        start..start + length
    }
}

impl BlockLayout for VariableLayout {
    const NAME: &'static str = "block-layout-variable";

    fn block(&self) -> usize {
        self.block
    }

    fn causal(&self) -> bool {
        self.causal
    }

    fn per_head(&self) -> bool {
        self.different_layout_per_head
    }

    fn row(&self, head: usize, row: usize, n_blocks: usize) -> Vec<usize> {
        if self.horizontal_global_attention && self.globals.contain(row) {
            return (0..n_blocks).collect();
        }
        let among = if self.causal { row + 1 } else { n_blocks };
        let random = draw([self.seed, head as u64, row as u64], among, &[], self.num_random_blocks);
        random.into_iter().chain(self.window(row)).chain(self.globals.below(n_blocks)).collect()
    }

    fn check(&self) -> Result<()> {
        if self.block == 0 {
            return Err(AttnError::value("block", 0, "at least 1"));
        }
        if self.local_window_blocks.is_empty() || self.local_window_blocks.contains(&0) {
            let found = format!("{:?}", self.local_window_blocks);
            return Err(AttnError::value("local_window_blocks", found, "one or more lengths of at least 1"));
        }
        self.globals.check()?;
        horizontal(self.horizontal_global_attention, self.causal)
    }
}
