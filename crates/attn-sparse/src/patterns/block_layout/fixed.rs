//! Local windows of blocks, and the last blocks of every window for all.

use super::{BlockLayout, SeenBlocks};
use attn_core::{AttnError, Growth, Result};

/// Windows of `num_local_blocks` blocks that see each other; `num_global_blocks` blocks of every window, its last ones in the
/// first pattern, the ones before in the next, are seen by all (by later rows, if causal). Of a last window that is shorter,
/// they are the same blocks, but at most the last ones there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedLayout {
    /// Positions of a block.
    pub block: usize,
    /// Blocks of a local window.
    pub num_local_blocks: usize,
    /// Blocks that stand for a window.
    pub num_global_blocks: usize,
    /// Head `h` has pattern `h` modulo this.
    pub num_different_global_patterns: usize,
    /// Rows of global blocks see everything; bidirectional layouts alone.
    pub horizontal_global_attention: bool,
    /// Heads differ; otherwise all have that of head 0.
    pub different_layout_per_head: bool,
    /// Nothing after the diagonal.
    pub causal: bool,
}

impl FixedLayout {
    /// First global block of a window, from the window's start.
    fn place(&self, head: usize) -> usize {
        let pattern = head % self.num_different_global_patterns;
        self.num_local_blocks - (1 + pattern) * self.num_global_blocks
    }

    /// Start of the run of a last, shorter window; it may reach back into the window before.
    fn last_globals(&self, head: usize, n_blocks: usize) -> Option<usize> {
        let whole = n_blocks / self.num_local_blocks * self.num_local_blocks;
        let most = n_blocks.saturating_sub(self.num_global_blocks);
        (whole < n_blocks).then(|| (whole + self.place(head)).min(most))
    }

    /// Starts of the runs of global blocks.
    fn globals(&self, head: usize, n_blocks: usize) -> impl Iterator<Item = usize> + use<> {
        let (local, place) = (self.num_local_blocks, self.place(head));
        let last = self.last_globals(head, n_blocks);
        (0..n_blocks / local).map(move |window| window * local + place).chain(last)
    }
}

impl FixedLayout {
    /// Global blocks below `block`.
    fn globals_below(&self, head: usize, block: usize, n_blocks: usize) -> usize {
        let (local, place, g) = (self.num_local_blocks, self.place(head), self.num_global_blocks);
        let whole = n_blocks / local;
        let of_windows = |block: usize| match block / local {
            window if window >= whole => whole * g,
            window => window * g + (block % local).saturating_sub(place).min(g),
        };
        // Of the last run, what is not in the run of the window before.
        let last = self.last_globals(head, n_blocks);
        let new = |b: &usize| *b < block && of_windows(b + 1) == of_windows(*b);
        of_windows(block) + last.map_or(0, |start| (start..(start + g).min(n_blocks)).filter(new).count())
    }
}

impl BlockLayout for FixedLayout {
    const NAME: &'static str = "block-layout-fixed";

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
        let g = self.num_global_blocks;
        if self.horizontal_global_attention
            && self.globals(head, n_blocks).any(|first| (first..first + g).contains(&row))
        {
            return (0..n_blocks).collect();
        }
        let window = row / self.num_local_blocks * self.num_local_blocks;
        // Later windows give a causal row nothing.
        let end = if self.causal { row + 1 } else { n_blocks };
        let globals = self.globals(head, n_blocks).take_while(|first| *first < end);
        (window..window + self.num_local_blocks).chain(globals.flat_map(|first| first..first + g)).collect()
    }

    /// By arithmetic: rows see blocks of every window.
    fn seen(&self, head: usize, row: usize, n_blocks: usize) -> SeenBlocks {
        let is_global =
            |block| self.globals_below(head, block + 1, n_blocks) > self.globals_below(head, block, n_blocks);
        if self.horizontal_global_attention && is_global(row) {
            return SeenBlocks { blocks: n_blocks, diagonal: true, last: true };
        }
        let start = row / self.num_local_blocks * self.num_local_blocks;
        let end = (start + self.num_local_blocks).min(if self.causal { row + 1 } else { n_blocks });
        let below = |block| self.globals_below(head, block, n_blocks);
        let later = if self.causal { 0 } else { below(n_blocks) - below(end) };
        let last = end == n_blocks || !self.causal && is_global(n_blocks - 1);
        SeenBlocks { blocks: end - start + below(start) + later, diagonal: true, last }
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("block", self.block),
            ("num_local_blocks", self.num_local_blocks),
            ("num_global_blocks", self.num_global_blocks),
            ("num_different_global_patterns", self.num_different_global_patterns),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(AttnError::value(*name, 0, "at least 1"));
        }
        let patterns = self.num_local_blocks / self.num_global_blocks;
        if !self.num_local_blocks.is_multiple_of(self.num_global_blocks) {
            let expected = format!("a divisor of the {} local blocks", self.num_local_blocks);
            return Err(AttnError::value("num_global_blocks", self.num_global_blocks, expected));
        }
        if self.num_different_global_patterns > patterns {
            let expected = format!("at most {patterns}, local blocks by global blocks");
            let found = self.num_different_global_patterns;
            return Err(AttnError::value("num_different_global_patterns", found, expected));
        }
        if self.num_different_global_patterns > 1 && !self.different_layout_per_head {
            let expected = "1 without `different_layout_per_head`";
            let found = self.num_different_global_patterns;
            return Err(AttnError::value("num_different_global_patterns", found, expected));
        }
        horizontal(self.horizontal_global_attention, self.causal)
    }

    /// Every row sees blocks of every window.
    fn growth(&self) -> Growth {
        Growth::Quadratic
    }
}

/// Rows of global blocks that see everything would see later blocks.
pub(super) fn horizontal(horizontal: bool, causal: bool) -> Result<()> {
    if horizontal && causal {
        return Err(AttnError::value("horizontal_global_attention", true, "false with `causal=true`"));
    }
    Ok(())
}
