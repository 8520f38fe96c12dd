//! How a problem is cut: tuning, apart from what is computed.

use attn_core::{AttnError, AttnShape, Result};

/// Queries in the vector lanes of one panel: two vectors of AVX-512, four of AVX2, eight of NEON.
pub(crate) const PANEL: usize = 32;

/// Block sizes of the softmax engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileSizes {
    block_q: usize,
    block_kv: usize,
    /// Keys of the blocks that rows list, where each row has a list of its own.
    lists: Option<usize>,
}

impl TileSizes {
    /// `block_q` queries a task (a multiple of 32) against `block_kv` keys at a time.
    ///
    /// # Errors
    /// [`AttnError::Value`] if `block_q` is no positive multiple of 32 or `block_kv` is 0.
    pub fn new(block_q: usize, block_kv: usize) -> Result<Self> {
        if block_q == 0 || !block_q.is_multiple_of(PANEL) {
            return Err(AttnError::value("block_q", block_q, "a positive multiple of 32"));
        }
        if block_kv == 0 {
            return Err(AttnError::value("block_kv", block_kv, "at least 1"));
        }
        Ok(Self { block_q, block_kv, lists: None })
    }

    /// Measured choice: longer query blocks once K and V leave the second-level cache, so that each key block is
    /// read from memory less often; longer still once they leave the third, if enough blocks are left for many threads.
    pub fn auto(shape: &AttnShape) -> Self {
        let kv_bytes =
            shape.n_kv.saturating_mul(shape.head_dim.saturating_add(shape.head_dim_v)).saturating_mul(4);
        let queries = shape.batch.saturating_mul(shape.n_heads_q).saturating_mul(shape.n_q);
        let block_q = match kv_bytes {
            0..=0x8_0000 => 64,
            0x40_0001.. if queries >= 32 * 512 => 512,
            _ => 256,
        };
        Self { block_q, block_kv: 128, lists: None }
    }

    /// The same sizes, for masks whose rows see few keys each, and different ones: a row's result then depends on nothing but
    /// what it sees, to the last bit. A few rows are attended one by one, many cell of keys by cell of keys. Side by side,
    /// rows compute what any of them sees.
    pub fn rows_apart(self) -> Self {
        self.rows_apart_by(1)
    }

    /// [`TileSizes::rows_apart`] for rows that list whole blocks of `block` keys, of which the first one begins with key 0.
    pub fn rows_apart_by(self, block: usize) -> Self {
        Self { lists: Some(block), ..self }
    }

    /// Whether rows have lists of their own.
    pub(crate) fn are_rows_apart(&self) -> bool {
        self.lists.is_some()
    }

    /// Keys of the blocks that rows list, where each has a list of its own.
    pub(crate) fn block_of_lists(&self) -> Option<usize> {
        self.lists
    }

    /// The same with another number of queries a task.
    pub(crate) fn with_block_q(self, block_q: usize) -> Self {
        Self { block_q, ..self }
    }

    /// Queries of a task.
    pub fn block_q(&self) -> usize {
        self.block_q
    }

    /// Keys of a tile.
    pub fn block_kv(&self) -> usize {
        self.block_kv
    }

    /// Bytes of scratch a thread needs: transposed queries, outputs and statistics of a block, one tile of scores,
    /// and one block of widened keys and values.
    pub fn workspace_bytes(&self, shape: &AttnShape) -> u64 {
        let widths = shape.head_dim + shape.head_dim_v;
        let floats = self.block_q * (widths + 2) + self.block_kv * (PANEL + widths);
        4 * floats as u64
    }
}
