//! Block masks as FlexAttention writes them: counts and padded lists of partial and of full blocks, by rows and by columns.
//!
//! For each list of batch entries and heads, `indices [block rows, block columns]` holds in row `r` the columns of its
//! blocks, ascending, `counts[r]` of them; what stands behind is 0. Unlike in [`BlockMask`], a ragged last block counts as
//! partial, as positions past the end do as masked.
//!
//! Source: Dong et al., "Flex Attention", 2024 (PyTorch's `BlockMask`).

use super::BlockMask;
use attn_core::mask::Head;

/// Blocks of each row, or of each column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaddedLists {
    /// `[batch lists, head lists, rows]`.
    pub counts: Vec<i32>,
    /// `[batch lists, head lists, rows, columns]`.
    pub indices: Vec<i32>,
}

impl PaddedLists {
    fn new(lists: usize, rows: usize, columns: usize) -> Self {
        Self { counts: vec![0; lists * rows], indices: vec![0; lists * rows * columns] }
    }

    fn push(&mut self, row: usize, columns: usize, column: usize) {
        let count = &mut self.counts[row];
        self.indices[row * columns + *count as usize] = column as i32;
        *count += 1;
    }
}

/// The four lists. Memory `O(lists * block rows * block columns)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlexLists {
    /// `kv_num_blocks`, `kv_indices`: partial blocks of each block of queries.
    pub partial: PaddedLists,
    /// `full_kv_num_blocks`, `full_kv_indices`.
    pub full: PaddedLists,
    /// `q_num_blocks`, `q_indices`: partial blocks of each block of keys.
    pub partial_by_key: PaddedLists,
    /// `full_q_num_blocks`, `full_q_indices`.
    pub full_by_key: PaddedLists,
}

impl BlockMask {
    /// The mask in FlexAttention's form.
    pub fn flex_lists(&self) -> FlexLists {
        let (rows, columns) = (self.n_block_rows(), self.n_block_cols());
        let lists = self.batch() * self.heads();
        let by_row = || PaddedLists::new(lists, rows, columns);
        let by_column = || PaddedLists::new(lists, columns, rows);
        let mut all = FlexLists {
            partial: by_row(),
            full: by_row(),
            partial_by_key: by_column(),
            full_by_key: by_column(),
        };
        let heads_of_list = self.shape().n_heads_q / self.heads().max(1);
        for list in 0..lists {
            let head = Head { batch: list / self.heads(), head: list % self.heads() * heads_of_list };
            for row in 0..rows {
                for (column, partial) in self.row(head, row) {
                    let sizes = (self.block_rows(row).len(), self.block_keys(column).len());
                    let (to, by_key) = match partial || sizes != (self.sizes().q, self.sizes().kv) {
                        true => (&mut all.partial, &mut all.partial_by_key),
                        false => (&mut all.full, &mut all.full_by_key),
                    };
                    to.push(list * rows + row, columns, column);
                    by_key.push(list * columns + column, rows, row);
                }
            }
        }
        all
    }
}
