//! A block mask read from the side of the keys: which blocks of queries see a block of keys.

use super::BlockMask;
use attn_core::mask::Head;
use std::ops::Range;

/// The transpose of the lists of a [`BlockMask`]: `q_num_blocks` and `q_indices` of FlexAttention, compressed column by column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockColumns {
    batch: usize,
    heads: usize,
    n_heads_q: usize,
    n_cols: usize,
    /// `[lists * block columns + 1]`.
    col_ptr: Vec<usize>,
    /// Blocks of queries, ascending in each column.
    blocks: Vec<u32>,
    partial: Vec<bool>,
}

impl BlockColumns {
    /// The blocks of queries that see a block of keys, ascending, and whether each is partial.
    ///
    /// # Panics
    /// If there is no such block or head.
    pub fn column(&self, head: Head, block: usize) -> impl Iterator<Item = (usize, bool)> + '_ {
        assert!(block < self.n_cols, "block {block} of {}", self.n_cols);
        let batch = if self.batch == 1 { 0 } else { head.batch };
        let list = batch * self.heads + head.head * self.heads / self.n_heads_q.max(1);
        let entries = self.entries(list * self.n_cols + block);
        let (blocks, partial) = (&self.blocks[entries.clone()], &self.partial[entries]);
        blocks.iter().zip(partial).map(|(block, partial)| (*block as usize, *partial))
    }

    /// Blocks along the keys.
    pub fn n_block_cols(&self) -> usize {
        self.n_cols
    }

    fn entries(&self, column: usize) -> Range<usize> {
        self.col_ptr[column]..self.col_ptr[column + 1]
    }
}

impl BlockMask {
    /// The lists from the side of the keys. Time and memory: `O(entries + block columns)`.
    pub fn transpose(&self) -> BlockColumns {
        let (n_rows, n_cols, n_lists) = (self.n_block_rows(), self.n_block_cols(), self.batch * self.heads);
        let column = |list: usize, block: u32| list * n_cols + block as usize;
        let mut col_ptr = vec![0; n_lists * n_cols + 1];
        for list in 0..n_lists {
            for row in 0..n_rows {
                self.blocks[self.entries(list, row)].iter().for_each(|b| col_ptr[column(list, *b) + 1] += 1);
            }
        }
        (1..col_ptr.len()).for_each(|at| col_ptr[at] += col_ptr[at - 1]);
        let (mut next, n) = (col_ptr.clone(), self.blocks.len());
        let (mut blocks, mut partial) = (vec![0; n], vec![false; n]);
        for list in 0..n_lists {
            for row in 0..n_rows {
                for entry in self.entries(list, row) {
                    let place = &mut next[column(list, self.blocks[entry])];
                    (blocks[*place], partial[*place]) = (row as u32, self.partial[entry]);
                    *place += 1;
                }
            }
        }
        let n_heads_q = self.shape.n_heads_q;
        BlockColumns { batch: self.batch, heads: self.heads, n_heads_q, n_cols, col_ptr, blocks, partial }
    }
}
