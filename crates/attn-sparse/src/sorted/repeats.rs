//! How often several rounds of chunks meet the same pair.

/// The chunks of all tokens in all rounds: token `t` of batch entry `e` stands in chunk
/// `chunks[(e * rounds + r) * n + t]` of round `r`.
///
/// A chunk is met by itself and by the next one; the first chunk of a round meets the last chunk of the round before it, the
/// first of all meets the last of all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Repeats<'a> {
    pub(super) n: usize,
    pub(super) n_rounds: usize,
    pub(super) n_chunks: usize,
    /// Of queries.
    pub(super) q: &'a [u32],
    /// Of keys.
    pub(super) k: &'a [u32],
    /// Buckets of queries and keys, laid out as the chunks, where a pair is met only inside one bucket.
    pub(super) buckets: Option<[&'a [i32]; 2]>,
}

impl Repeats<'_> {
    /// How many times query `i` and key `j` of a batch entry meet.
    pub(super) fn count(&self, entry: usize, i: usize, j: usize) -> u32 {
        let at = |round: usize, token: usize| (entry * self.n_rounds + round) * self.n + token;
        let mut count = 0;
        for round in 0..self.n_rounds {
            let (chunk_q, chunk_k) = (self.q[at(round, i)], self.k[at(round, j)]);
            let same_bucket =
                self.buckets.is_none_or(|[of_q, of_k]| of_q[at(round, i)] == of_k[at(round, j)]);
            if same_bucket {
                count += u32::from(chunk_q == chunk_k) + u32::from(chunk_q == chunk_k + 1);
            }
            // Buckets of different rounds are different ones.
            let wraps = self.buckets.is_none() || self.n_rounds == 1 && same_bucket;
            if chunk_q == 0 && wraps && self.n_rounds * self.n_chunks > 1 {
                let before = (round + self.n_rounds - 1) % self.n_rounds;
                count += u32::from(self.k[at(before, j)] as usize == self.n_chunks - 1);
            }
        }
        count
    }
}
