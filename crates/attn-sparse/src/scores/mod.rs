//! Score stages: cheap products that say which pairs are worth attending.
//!
//! | stage | score |
//! |---|---|
//! | [`BlockMeans`], [`pooled_rows`] | the mean of a block of queries times the mean of a block of keys |
//! | [`QuerySums`] | sums of the true probabilities of a few queries, by key and by distance |
//! | [`antidiagonal_sums`] | probabilities of every `stride`-th antidiagonal, summed over blocks |
//! | [`TileMaxima`] | the largest score of each query in a block of keys |
//!
//! All products run on the tile kernel of `attn_core`; nothing of size `n_q * n_kv` is kept.

mod antidiagonal;
mod head_rows;
mod means;
mod pooled;
mod query_sums;
#[cfg(test)]
mod tests;
mod tile_maxima;

pub(crate) use antidiagonal::{Strided, antidiagonal_sums};
pub(crate) use head_rows::HeadRows;
pub(crate) use means::BlockMeans;
pub(crate) use pooled::{Turned, pooled_rows};
pub(crate) use query_sums::QuerySums;
pub(crate) use tile_maxima::TileMaxima;

/// Queries in the vector lanes: two vectors of AVX-512, four of AVX2.
pub(crate) const PANEL: usize = 32;
