//! Prefill: a cheap estimate of the scores chooses what long prompts attend.
//!
//! | variant | estimate | chosen |
//! |---|---|---|
//! | [`ExactTopK`] | the scores themselves | the `k` largest of each query |
//! | [`VerticalSlash`] | probabilities of the last queries | keys (columns) and distances (diagonals) |
//! | [`MInferenceBlockSparse`] | means of blocks | the `k` best blocks of keys of each block of queries |
//! | [`FlexPrefill`] | probabilities of the last block of queries | columns and diagonals of blocks, or blocks by their means |
//! | [`XAttention`] | every `stride`-th antidiagonal | the fewest blocks that hold a share of the mass |
//! | [`SpargeAttn`] | means of blocks of similar rows | blocks by mass, and all that are not alike inside |
//!
//! All but [`ExactTopK`] share a choice between queries, so that even their causal forms are **not strictly causal**: no later
//! key is attended, but which earlier ones are depends on later inputs. They serve prompts, not training or decoding.

mod exact_top_k;
mod flex_prefill;
mod grid;
mod minference;
mod sparge;
mod vertical_slash;
mod x_attention;

pub use exact_top_k::ExactTopK;
pub use flex_prefill::FlexPrefill;
pub use minference::MInferenceBlockSparse;
pub use sparge::SpargeAttn;
pub(crate) use vertical_slash::forward as attend_lines;
pub use vertical_slash::{Lines, VerticalSlash};
pub use x_attention::XAttention;
