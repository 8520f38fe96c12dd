//! Tokens sorted by bucket, and chunks of them.

use crate::sorted::slots::NOBODY;
use rayon::prelude::*;

/// The sorted order of one head in all rounds.
#[derive(Debug, Clone)]
pub(super) struct Orders {
    pub(super) n: usize,
    pub(super) chunk: usize,
    pub(super) n_rounds: usize,
    /// Token of each rank, `[n_rounds, n]`.
    pub(super) tokens: Vec<u32>,
    /// Rank of each token, `[n_rounds, n]`.
    pub(super) ranks: Vec<u32>,
    /// Bucket of each token, `[n_rounds, n]`.
    pub(super) buckets: Vec<i32>,
}

impl Orders {
    /// Sorts tokens by bucket, those of one bucket by position; `buckets [n_rounds, n]` below `n_buckets`.
    pub(super) fn new(buckets: Vec<i32>, n: usize, n_buckets: usize, chunk: usize) -> Self {
        let n_rounds = buckets.len().checked_div(n).unwrap_or(0);
        let (mut tokens, mut ranks) = (vec![0; buckets.len()], vec![0; buckets.len()]);
        let rounds = tokens.par_chunks_mut(n.max(1)).zip(ranks.par_chunks_mut(n.max(1)));
        rounds.zip(buckets.par_chunks(n.max(1))).for_each(|((tokens, ranks), buckets)| {
            let mut next = vec![0u32; n_buckets + 1];
            buckets.iter().for_each(|bucket| next[*bucket as usize + 1] += 1);
            (0..n_buckets).for_each(|bucket| next[bucket + 1] += next[bucket]);
            for (token, bucket) in buckets.iter().enumerate() {
                let rank = &mut next[*bucket as usize];
                tokens[*rank as usize] = token as u32;
                ranks[token] = *rank;
                *rank += 1;
            }
        });
        Self { n, chunk, n_rounds, tokens, ranks, buckets }
    }

    /// Chunks of a round.
    pub(super) fn n_chunks(&self) -> usize {
        self.n.div_ceil(self.chunk)
    }

    /// The token of a slot of a round: its rank, or nothing behind the last.
    #[inline(always)]
    pub(super) fn token(&self, round: usize, slot: usize) -> Option<usize> {
        (slot < self.n).then(|| self.tokens[round * self.n + slot] as usize)
    }

    /// The rank of a token.
    #[inline(always)]
    pub(super) fn rank(&self, round: usize, token: usize) -> usize {
        self.ranks[round * self.n + token] as usize
    }

    /// The round that the chunk before a round's first chunk belongs to; `None` if there is but one chunk.
    pub(super) fn before(&self, round: usize) -> Option<usize> {
        (self.n_rounds * self.n_chunks() > 1).then(|| (round + self.n_rounds - 1) % self.n_rounds)
    }

    /// Round and token of key row `row` of a round: the chunk before its first chunk, then its own chunks.
    #[inline(always)]
    pub(super) fn key(&self, round: usize, row: usize) -> Option<(usize, usize)> {
        let (of, slot) = match row.checked_sub(self.chunk) {
            Some(slot) => (round, slot),
            None => (self.before(round)?, (self.n_chunks() - 1) * self.chunk + row),
        };
        self.token(of, slot).map(|token| (of, token))
    }

    /// The position in each slot of a round, `[n_chunks * chunk]`.
    pub(super) fn positions(&self, round: usize) -> impl Iterator<Item = i32> + '_ {
        (0..self.n_chunks() * self.chunk)
            .map(move |slot| self.token(round, slot).map_or(NOBODY, |t| t as i32))
    }

    /// The position of each key row of a round, `[(n_chunks + 1) * chunk]`.
    pub(super) fn key_positions(&self, round: usize) -> impl Iterator<Item = i32> + '_ {
        (0..(self.n_chunks() + 1) * self.chunk)
            .map(move |row| self.key(round, row).map_or(NOBODY, |(_, t)| t as i32))
    }

    /// The bucket of a token, another number in every round.
    pub(super) fn label(&self, round: usize, token: usize, n_buckets: usize) -> i32 {
        self.buckets[round * self.n + token] + (round * n_buckets) as i32
    }

    /// The chunk of each token in all rounds, `[n_rounds, n]`.
    pub(super) fn chunks(&self) -> impl Iterator<Item = u32> + '_ {
        self.ranks.iter().map(|rank| rank / self.chunk as u32)
    }
}
