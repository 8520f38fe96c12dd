//! Layouts of blocks: which blocks of keys a block of queries sees, as options say.
//!
//! | layout | a block row `r` of `m` sees |
//! |---|---|
//! | [`FixedLayout`] | its local window of blocks, and the last blocks of every window |
//! | [`VariableLayout`] | its local window (of lengths from a list), chosen global blocks, random blocks |
//! | [`BigBirdLayout`] | neighbours, the first blocks, random blocks; the first block rows see everything |
//! | [`LongformerLayout`] | neighbours, chosen global blocks; those see everything |
//! | [`LocalLayout`] | neighbours |
//! | [`BigBird`](super::BigBird) | neighbours, the first and last blocks, random blocks; first and last rows see everything |
//!
//! Causal ("unidirectional") layouts keep blocks up to the diagonal, and the diagonal block is causal inside. Block rows are
//! blocks of positions `p = i + n_kv - n_q`; a stream keeps every position. Bidirectional layouts need `n_q = n_kv`.
//!
//! Memory is that of the list of blocks.
//!
//! Random blocks come from a seed and depend on the seed, the head and the block row alone (and on the number of blocks where
//! later ones may be drawn): the choice is part of the layout.
//!
//! Source: the sparsity configurations of DeepSpeed's sparse attention (Microsoft, 2020), after Child et al. 2019, Beltagy
//! et al. 2020 and Zaheer et al. 2020.

mod fixed;
mod local;
mod random;
mod variable;

use crate::Pattern;
use crate::block_mask::{BlockMask, BlockSizes, Builder};
use crate::patterns::grid;
use attn_core::mask::{Align, Band};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
pub use fixed::FixedLayout;
pub use local::{BigBirdLayout, LocalLayout, LongformerLayout};
pub(super) use random::draw;
use std::sync::Arc;
pub use variable::{GlobalBlocks, VariableLayout};

/// A layout of blocks, row by row.
pub trait BlockLayout: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// Positions of a block.
    fn block(&self) -> usize;

    /// Blocks up to the diagonal alone, causal inside it.
    fn causal(&self) -> bool;

    /// Whether each query head has a layout of its own.
    fn per_head(&self) -> bool {
        false
    }

    /// The blocks that block row `row` of `n_blocks` sees, in any order, for head `head` (0 if all are alike). Repeated ones
    /// count once; of a causal layout, later ones are dropped. Only asked of options that [`BlockLayout::check`] accepts.
    fn row(&self, head: usize, row: usize, n_blocks: usize) -> Vec<usize>;

    /// How many different blocks [`BlockLayout::row`] gives, without the later ones of a causal layout.
    fn seen(&self, head: usize, row: usize, n_blocks: usize) -> SeenBlocks {
        let mut blocks = self.row(head, row, n_blocks);
        blocks.retain(|col| *col < n_blocks && (!self.causal() || *col <= row));
        blocks.sort_unstable();
        blocks.dedup();
        let has = |block: usize| blocks.binary_search(&block).is_ok();
        SeenBlocks { blocks: blocks.len(), diagonal: has(row), last: has(n_blocks - 1) }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`AttnError::Value`] naming the option.
    fn check(&self) -> Result<()> {
        if self.block() == 0 { Err(AttnError::value("block", 0, "at least 1")) } else { Ok(()) }
    }

    /// How time and the list of blocks grow with the length.
    fn growth(&self) -> Growth {
        Growth::Linear
    }
}

/// The blocks of a row, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenBlocks {
    /// All of them.
    pub blocks: usize,
    /// Whether the row's own is among them.
    pub diagonal: bool,
    /// Whether the last one of all is among them.
    pub last: bool,
}

/// Positions of the queries on the key axis, those before the first key left out.
fn positions(shape: &AttnShape) -> std::ops::Range<usize> {
    shape.n_kv.saturating_sub(shape.n_q)..shape.n_kv
}

/// Lists of heads: one for all, or one for each.
fn lists(layout: &impl BlockLayout, shape: &AttnShape) -> usize {
    if layout.per_head() { shape.n_heads_q.max(1) } else { 1 }
}

/// The layout as a mask. Queries that do not start at a block are listed one by one.
fn block_mask(layout: &impl BlockLayout, shape: &AttnShape) -> Result<BlockMask> {
    layout.check()?;
    if !layout.causal() {
        grid::same_lengths(shape)?;
    }
    let (block, offset) = (layout.block(), Align::BottomRight.offset(shape.n_q, shape.n_kv));
    let aligned = offset >= 0 && (offset as usize).is_multiple_of(block);
    let sizes = BlockSizes { q: if aligned { block } else { 1 }, kv: block };
    let builder = Builder::new(shape, sizes).per_head(lists(layout, shape));
    let builder = match layout.causal() {
        true => builder.inside(Arc::new(Band::causal(shape, Align::BottomRight))),
        false => builder,
    };
    let n_blocks = shape.n_kv.div_ceil(block);
    builder.from_rows(|_, head, row| {
        let Some(p) = (row * sizes.q).checked_add_signed(offset) else { return Vec::new() };
        let row = p / block;
        let mut blocks = layout.row(head, row, n_blocks);
        blocks.retain(|col| *col < n_blocks && (!layout.causal() || *col <= row));
        blocks
    })
}

/// Visible pairs, counted block row by block row.
fn pairs(layout: &impl BlockLayout, shape: &AttnShape) -> u64 {
    let (block, rows) = (layout.block(), positions(shape));
    if layout.check().is_err() || rows.is_empty() {
        return 0;
    }
    let (lists, n_blocks) = (lists(layout, shape), shape.n_kv.div_ceil(block));
    let missing = n_blocks * block - shape.n_kv;
    let mut sum = 0;
    for list in 0..lists {
        for row in rows.start / block..=(rows.end - 1) / block {
            let own = rows.start.max(row * block)..rows.end.min((row + 1) * block);
            let SeenBlocks { blocks, diagonal, last } = layout.seen(list, row, n_blocks);
            let keys = blocks * block - if last { missing } else { 0 };
            sum += (own.len() * keys) as u64;
            if layout.causal() && diagonal {
                // Position p sees p - row * block + 1 keys of its own block, not all.
                let whole = ((row + 1) * block).min(shape.n_kv);
                sum -= own.map(|p| (whole - p - 1) as u64).sum::<u64>();
            }
        }
    }
    sum * (shape.batch * shape.n_heads_q / lists) as u64
}

impl<L: BlockLayout> Pattern for L {
    type Mask = BlockMask;

    const NAME: &'static str = L::NAME;

    fn mask(&self, shape: &AttnShape) -> Result<BlockMask> {
        block_mask(self, shape)
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        pairs(self, shape)
    }

    fn is_causal(&self) -> bool {
        self.causal()
    }

    fn kept(&self) -> Option<Kept> {
        Some(Kept { sinks: 0, last: None })
    }

    fn cross_lengths(&self) -> bool {
        self.causal()
    }

    fn growth(&self) -> Growth {
        BlockLayout::growth(self)
    }

    fn memory(&self) -> Growth {
        BlockLayout::growth(self)
    }
}
