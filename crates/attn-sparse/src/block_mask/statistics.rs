//! How much a block mask sees.

use super::BlockMask;
use attn_core::mask::Head;
use std::fmt;

/// The least, the mean and the most of some counts; zeros if there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spread {
    /// The least.
    pub min: u64,
    /// The mean.
    pub mean: f64,
    /// The most.
    pub max: u64,
}

impl Spread {
    fn of(counts: &[u64]) -> Self {
        let mean = counts.iter().map(|x| *x as f64).sum::<f64>() / counts.len().max(1) as f64;
        let (min, max) = (counts.iter().min(), counts.iter().max());
        Self { min: min.copied().unwrap_or(0), mean, max: max.copied().unwrap_or(0) }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}, {:.1} on average", self.min, self.max, self.mean)
    }
}

/// What [`BlockMask::statistics`] counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockStatistics {
    /// Pairs that are seen, over all heads of all batch entries.
    pub pairs: u64,
    /// Their share of all pairs.
    pub pair_density: f64,
    /// Listed blocks, over all lists.
    pub blocks: u64,
    /// Those of them that are partial.
    pub partial: u64,
    /// Share of the blocks that are listed.
    pub block_density: f64,
    /// Blocks that a block of queries sees, over all lists.
    pub blocks_per_row: Spread,
    /// Keys that a query sees, over all heads of all batch entries.
    pub keys_per_query: Spread,
}

impl fmt::Display for BlockStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pairs, blocks, partial, .. } = self;
        writeln!(f, "{pairs} pairs ({:.2} %)", 100.0 * self.pair_density)?;
        writeln!(f, "{blocks} blocks ({:.2} %), {partial} of them partial", 100.0 * self.block_density)?;
        writeln!(f, "a block of queries sees {} blocks", self.blocks_per_row)?;
        write!(f, "a query sees {} keys", self.keys_per_query)
    }
}

impl BlockMask {
    /// Counts pairs and blocks. Partial blocks are asked pair by pair.
    pub fn statistics(&self) -> BlockStatistics {
        let s = &self.shape;
        let per_query: Vec<u64> = (0..s.batch)
            .flat_map(|batch| (0..s.n_heads_q).map(move |head| Head { batch, head }))
            .flat_map(|head| (0..s.n_q).map(move |i| self.keys_of(head, i)))
            .collect();
        let per_row: Vec<u64> = self.row_ptr.windows(2).map(|row| (row[1] - row[0]) as u64).collect();
        let pairs = per_query.iter().sum();
        let share = |some: u64, all: f64| if all == 0.0 { 0.0 } else { some as f64 / all };
        let blocks = self.blocks.len() as u64;
        BlockStatistics {
            pairs,
            pair_density: share(pairs, per_query.len() as f64 * s.n_kv as f64),
            blocks,
            partial: self.partial.iter().filter(|partial| **partial).count() as u64,
            block_density: share(blocks, per_row.len() as f64 * self.n_block_cols() as f64),
            blocks_per_row: Spread::of(&per_row),
            keys_per_query: Spread::of(&per_query),
        }
    }

    /// How many keys query `i` sees.
    fn keys_of(&self, head: Head, i: usize) -> u64 {
        let seen = |(block, partial): (usize, bool)| {
            let keys = self.block_keys(block);
            match partial {
                true => keys.filter(|&j| self.inside_sees(head.pair(i, j))).count(),
                false => keys.len(),
            }
        };
        self.row(head, i / self.sizes.q).map(|entry| seen(entry) as u64).sum()
    }
}
