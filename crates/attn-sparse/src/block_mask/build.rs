//! How block masks are made: from lists, from a dense layout of blocks, or from any mask.

use super::lists::Lists;
use super::{BlockMask, BlockSizes, SharedMask};
use attn_core::mask::{Cover, Head};
use attn_core::parallel::for_each_task;
use attn_core::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Makes a [`BlockMask`].
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Align, Band};
/// use attn_sparse::{BlockSizes, Builder};
/// use std::sync::Arc;
///
/// let shape = AttnShape::square(1, 8, 64);
/// let causal = Arc::new(Band::causal(&shape, Align::BottomRight));
/// // Each block of two queries sees its own block, up to itself, and the first one.
/// let mask = Builder::new(&shape, BlockSizes::square(2)).inside(causal).from_rows(|_, _, row| vec![0, row])?;
/// assert_eq!((mask.n_blocks(), mask.n_pairs()), (7, 3 + 3 * (4 + 3)));
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Clone)]
pub struct Builder {
    shape: AttnShape,
    sizes: BlockSizes,
    batch: usize,
    heads: usize,
    inside: Option<SharedMask>,
}

/// Blocks of one row: which, and whether each is partial.
type Row = Vec<(u32, bool)>;

impl Builder {
    /// One list for all batch entries and heads, every listed block full.
    pub fn new(shape: &AttnShape, sizes: BlockSizes) -> Self {
        Self { shape: *shape, sizes, batch: 1, heads: 1, inside: None }
    }

    /// A list for each batch entry (unless the batch is 1, where it is the same).
    #[must_use]
    pub fn per_batch(self) -> Self {
        Self { batch: self.shape.batch.max(1), ..self }
    }

    /// A list for each of `heads` groups of consecutive query heads: `n_heads_q`, `n_heads_kv`, or another divisor.
    #[must_use]
    pub fn per_head(self, heads: usize) -> Self {
        Self { heads, ..self }
    }

    /// Listed blocks are seen where `mask` sees them. It has to see the same in all heads and batch entries that share a
    /// list: one that differs between them needs [`Builder::per_head`] or [`Builder::per_batch`].
    #[must_use]
    pub fn inside(self, mask: SharedMask) -> Self {
        Self { inside: Some(mask), ..self }
    }

    fn check(&self) -> Result<()> {
        self.sizes.check()?;
        if self.heads == 0 || !self.shape.n_heads_q.is_multiple_of(self.heads) {
            let expected = format!("a divisor of n_heads_q = {}", self.shape.n_heads_q);
            return Err(AttnError::value("heads of the block mask", self.heads, expected));
        }
        if u32::try_from(self.n_cols()).is_err() {
            return Err(AttnError::value("blocks of keys", self.n_cols(), "at most 4294967295"));
        }
        self.inside.as_ref().map_or(Ok(()), |inside| inside.check(&self.shape))
    }

    fn n_rows(&self) -> usize {
        self.shape.n_q.div_ceil(self.sizes.q)
    }

    fn n_cols(&self) -> usize {
        self.shape.n_kv.div_ceil(self.sizes.kv)
    }

    /// From a function that lists the blocks of `(batch entry, list of heads, block row)`, in any order; repeated ones
    /// count once. Blocks that the mask inside does not see are dropped, those it sees completely are full. Rows are
    /// asked for in parallel.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a block size of 0, a number of lists that does not divide the heads, or a block that
    /// does not exist.
    pub fn from_rows(&self, row: impl Fn(usize, usize, usize) -> Vec<usize> + Sync) -> Result<BlockMask> {
        self.try_from_rows(|batch, list, block_row| Ok(row(batch, list, block_row)))
    }

    /// [`Builder::from_rows`] where a row may fail.
    ///
    /// # Errors
    /// As [`Builder::from_rows`], and those of `row`.
    pub fn try_from_rows(
        &self,
        row: impl Fn(usize, usize, usize) -> Result<Vec<usize>> + Sync,
    ) -> Result<BlockMask> {
        self.assemble(|batch, list, block_row| {
            let mut blocks = row(batch, list, block_row)?;
            blocks.sort_unstable();
            blocks.dedup();
            if let Some(last) = blocks.last().filter(|last| **last >= self.n_cols()) {
                let expected = format!("below {} blocks of keys", self.n_cols());
                return Err(AttnError::value("block", *last, expected));
            }
            Ok(self.tagged(batch, list, block_row, blocks))
        })
    }

    /// From ascending lists `[batch lists, head lists, block rows]` of full blocks: nothing is sorted or asked. Only without a
    /// mask inside.
    ///
    /// # Errors
    /// As [`Builder::from_rows`]; [`AttnError::Shape`] for another number of lists.
    pub(crate) fn ascending_lists(&self, lists: Lists) -> Result<BlockMask> {
        self.check()?;
        debug_assert!(self.inside.is_none() && lists.iter().all(<[u32]>::is_sorted));
        let expected = self.batch * self.heads * self.n_rows();
        if lists.len() != expected {
            return Err(AttnError::shape("lists", "rows", lists.len(), expected));
        }
        let is_beyond = |last: &&u32| **last as usize >= self.n_cols();
        if let Some(last) = lists.iter().filter_map(<[u32]>::last).find(is_beyond) {
            return Err(AttnError::value("block", *last, format!("below {} blocks of keys", self.n_cols())));
        }
        let Lists { row_ptr, entries } = lists;
        let partial = vec![false; entries.len()];
        Ok(self.mask(row_ptr, entries, partial))
    }

    /// From a dense layout of blocks, row-major `[batch lists, head lists, block rows, block columns]`.
    ///
    /// # Errors
    /// As [`Builder::from_rows`]; [`AttnError::Shape`] for another number of elements.
    pub fn from_dense(&self, layout: &[bool]) -> Result<BlockMask> {
        self.check()?;
        let (rows, cols) = (self.n_rows(), self.n_cols());
        let expected = self.batch * self.heads * rows * cols;
        if layout.len() != expected {
            return Err(AttnError::shape("layout", "elements", layout.len(), expected));
        }
        self.from_rows(|batch, list, row| {
            let first = ((batch * self.heads + list) * rows + row) * cols;
            (0..cols).filter(|col| layout[first + col]).collect()
        })
    }

    /// From compressed rows: `row_ptr [lists * block rows + 1]` into `blocks`, lists in the order batch entry, head.
    ///
    /// # Errors
    /// As [`Builder::from_rows`]; [`AttnError::Shape`] or [`AttnError::Value`] for a malformed `row_ptr`, and for a block
    /// that a row lists twice.
    pub fn from_csr(&self, row_ptr: &[usize], blocks: &[usize]) -> Result<BlockMask> {
        self.check()?;
        let n_rows = self.n_rows();
        let expected = self.batch * self.heads * n_rows + 1;
        if row_ptr.len() != expected {
            return Err(AttnError::shape("row_ptr", "elements", row_ptr.len(), expected));
        }
        if row_ptr[0] != 0 || row_ptr[expected - 1] != blocks.len() || !row_ptr.is_sorted() {
            let found = format!("from {} to {}", row_ptr[0], row_ptr[expected - 1]);
            return Err(AttnError::value("row_ptr", found, format!("ascending from 0 to {}", blocks.len())));
        }
        self.try_from_rows(|batch, list, row| {
            let at = (batch * self.heads + list) * n_rows + row;
            let row = blocks[row_ptr[at]..row_ptr[at + 1]].to_vec();
            let mut sorted = row.clone();
            sorted.sort_unstable();
            match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                Some(twice) => Err(AttnError::value("block", format!("{} twice", twice[0]), "once in a row")),
                None => Ok(row),
            }
        })
    }

    /// The blocks in which the mask inside sees a pair: every block is asked for its cover, and where that is not known,
    /// pair by pair. Time grows with the blocks in the mask's spans.
    ///
    /// # Errors
    /// As [`Builder::from_rows`].
    pub fn from_inside(&self) -> Result<BlockMask> {
        let all = |batch: usize, list: usize, block_row: usize| {
            let Some(inside) = &self.inside else { return (0..self.n_cols()).collect() };
            let rows = self.rows_of(block_row);
            let spans = inside.spans(self.head(batch, list), rows, self.shape.n_kv);
            let blocks = |span: Range<usize>| {
                span.start / self.sizes.kv..span.end.div_ceil(self.sizes.kv).max(span.start / self.sizes.kv)
            };
            spans.into_iter().flat_map(blocks).collect()
        };
        self.from_rows(all)
    }

    /// The first query head that a list serves.
    fn head(&self, batch: usize, list: usize) -> Head {
        Head { batch, head: list * (self.shape.n_heads_q / self.heads) }
    }

    fn rows_of(&self, block_row: usize) -> Range<usize> {
        let first = block_row * self.sizes.q;
        first..(first + self.sizes.q).min(self.shape.n_q)
    }

    /// The blocks that are seen at all, each with whether it is partial.
    fn tagged(&self, batch: usize, list: usize, block_row: usize, blocks: Vec<usize>) -> Row {
        let Some(inside) = &self.inside else {
            return blocks.into_iter().map(|block| (block as u32, false)).collect();
        };
        let (head, rows) = (self.head(batch, list), self.rows_of(block_row));
        let mut row = Row::with_capacity(blocks.len());
        // Most often only the last block is partial: one question for all others.
        let others = match blocks.as_slice() {
            [first, .., before, _] => first * self.sizes.kv..(before + 1) * self.sizes.kv,
            _ => 0..0,
        };
        let mut full = 0;
        if !others.is_empty() && inside.cover(head, rows.clone(), others) == Cover::Full {
            full = blocks.len() - 1;
            row.extend(blocks[..full].iter().map(|block| (*block as u32, false)));
        }
        for &block in &blocks[full..] {
            let first = block * self.sizes.kv;
            let keys = first..(first + self.sizes.kv).min(self.shape.n_kv);
            let cover = match inside.cover(head, rows.clone(), keys.clone()) {
                Cover::Partial => {
                    let seen = |i: usize| keys.clone().filter(|&j| inside.sees(head.pair(i, j))).count();
                    match rows.clone().map(seen).sum::<usize>() {
                        0 => Cover::Empty,
                        n if n == rows.len() * keys.len() => Cover::Full,
                        _ => Cover::Partial,
                    }
                }
                known => known,
            };
            match cover {
                Cover::Empty => {}
                Cover::Full => row.push((block as u32, false)),
                Cover::Partial => row.push((block as u32, true)),
            }
        }
        row
    }

    /// Lists that have been checked.
    fn mask(&self, row_ptr: Vec<usize>, blocks: Vec<u32>, partial: Vec<bool>) -> BlockMask {
        BlockMask {
            shape: self.shape,
            sizes: self.sizes,
            batch: self.batch,
            heads: self.heads,
            row_ptr,
            blocks,
            partial,
            inside: self.inside.clone(),
        }
    }

    fn assemble(&self, row: impl Fn(usize, usize, usize) -> Result<Row> + Sync) -> Result<BlockMask> {
        self.check()?;
        let n_rows = self.n_rows();
        let mut rows: Vec<Result<Row>> = Vec::new();
        rows.resize_with(self.batch * self.heads * n_rows, || Ok(Row::new()));
        for_each_task(
            rows.iter_mut().enumerate(),
            || (),
            |(), (at, slot)| {
                let (list, block_row) = (at / n_rows, at % n_rows);
                *slot = row(list / self.heads, list % self.heads, block_row);
            },
        );
        let (mut row_ptr, mut blocks, mut partial) = (vec![0], Vec::new(), Vec::new());
        for row in rows {
            for (block, is_partial) in row? {
                blocks.push(block);
                partial.push(is_partial);
            }
            row_ptr.push(blocks.len());
        }
        Ok(self.mask(row_ptr, blocks, partial))
    }
}
