//! One bit a pair of the partial blocks, instead of a mask that is asked.

use super::{BlockMask, SharedMask};
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnShape, Result};
use std::ops::Range;
use std::sync::Arc;

/// The pairs of partial blocks: row-major in each block, in whole words a block.
pub(super) struct Bits {
    /// Finds blocks; without a mask inside.
    lists: BlockMask,
    /// `[entries]`: the first word of a partial block.
    first: Vec<usize>,
    pub(super) words: Vec<u64>,
}

impl Bits {
    /// Words of a block.
    pub(super) fn words_a_block(mask: &BlockMask) -> usize {
        (mask.sizes.q * mask.sizes.kv).div_ceil(64)
    }

    /// `words`: those of all partial blocks, in the order of the lists.
    pub(super) fn new(lists: BlockMask, words: Vec<u64>) -> Self {
        let n = Self::words_a_block(&lists);
        let mut next = 0;
        let first = lists.partial.iter().map(|partial| {
            let first = next;
            next += if *partial { n } else { 0 };
            first
        });
        Self { first: first.collect(), words, lists: BlockMask { inside: None, ..lists } }
    }

    fn bit(&self, entry: usize, i: usize, j: usize) -> bool {
        let sizes = self.lists.sizes;
        let bit = i % sizes.q * sizes.kv + j % sizes.kv;
        self.words[self.first[entry] + bit / 64] >> (bit % 64) & 1 == 1
    }
}

impl Mask for Bits {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.lists.check(shape)
    }

    fn sees(&self, p: Pair) -> bool {
        let (lists, head) = (&self.lists, Head { batch: p.batch, head: p.head });
        let entry = lists.find(lists.list(head), p.i / lists.sizes.q, p.j / lists.sizes.kv);
        entry.is_some_and(|entry| !lists.partial[entry] || self.bit(entry, p.i, p.j))
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let cover = self.lists.cover_of(head, rows, keys);
        // The lists know which blocks are there; their bits are asked one by one.
        if cover == Cover::Empty { Cover::Empty } else { Cover::Partial }
    }

    fn hide_tile(
        &self,
        head: Head,
        rows: Range<usize>,
        keys: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let (lists, list) = (&self.lists, self.lists.list(head));
        let mut found = (usize::MAX, usize::MAX, None);
        for (key, j) in keys.enumerate() {
            for (lane, i) in rows.clone().enumerate() {
                let block = (i / lists.sizes.q, j / lists.sizes.kv);
                if (found.0, found.1) != block {
                    found = (block.0, block.1, lists.find(list, block.0, block.1));
                }
                let seen = found.2.is_some_and(|entry| !lists.partial[entry] || self.bit(entry, i, j));
                if !seen {
                    scores[key * stride + lane] = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        self.lists.is_shared_by(batch, heads)
    }
}

impl BlockMask {
    /// The same pairs, those of partial blocks as one bit each: a mask that needs no other, to be stored or sent.
    ///
    /// Memory: `block_q * block_kv / 8` bytes a partial block.
    #[must_use]
    pub fn with_bits(&self) -> Self {
        if self.inside.is_none() {
            return self.clone();
        }
        let words = self.bits();
        let bits: SharedMask = Arc::new(Bits::new(self.clone(), words));
        Self { inside: Some(bits), ..self.clone() }
    }

    /// The bits of all partial blocks, in the order of the lists.
    pub(super) fn bits(&self) -> Vec<u64> {
        let per_block = Bits::words_a_block(self);
        let mut words = Vec::new();
        for list in 0..self.batch * self.heads {
            let group = self.shape.n_heads_q / self.heads.max(1);
            let head = Head { batch: list / self.heads, head: list % self.heads * group };
            for row in 0..self.n_block_rows() {
                for (block, _) in self.row(head, row).filter(|(_, partial)| *partial) {
                    let start = words.len();
                    words.resize(start + per_block, 0u64);
                    let keys = self.block_keys(block);
                    for i in self.block_rows(row) {
                        for j in keys.clone().filter(|&j| self.inside_sees(head.pair(i, j))) {
                            let bit = i % self.sizes.q * self.sizes.kv + j % self.sizes.kv;
                            words[start + bit / 64] |= 1 << (bit % 64);
                        }
                    }
                }
            }
        }
        words
    }
}
