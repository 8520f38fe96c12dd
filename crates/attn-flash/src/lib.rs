//! Exact softmax attention by tiles, at the machine's limit.
//!
//! - [`Flash`]: exact attention, the variant to call; [`FlashCall`]: with masks, score mods and further tensors.
//! - [`Naive`]: the same by the textbook, row by row: what to compare with.
//! - [`engine`]: the softmax engine underneath, with any mask and score function; attn-sparse and attn-hier drive it.
//! - [`FormulaMask`], [`FormulaScore`]: masks and score mods written as text.
//! - [`cache`]: contiguous and paged key/value caches in f32, bf16, f16 or int8.
//! - [`candle`]: tensors in and out, gradients through candle's graph, and the functions of candle-flash-attn (feature
//!   `candle`, on by default).
//! - [`stream`]: decoding with a key/value cache, for every variant of softmax attention.

pub mod cache;
mod call;
#[cfg(feature = "candle")]
pub mod candle;
pub mod engine;
mod flash;
mod naive;
mod registry;
pub mod stream;
mod tiles;

pub use call::FlashCall;
#[cfg(feature = "candle")]
pub use candle::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed,
};
pub use engine::HalfProducts;
pub use flash::Flash;
pub use naive::Naive;
pub use registry::{FormulaMask, FormulaScore, registry};
pub use tiles::TileSizes;

/// The snippets of the book's chapter on candle.
#[cfg(all(doctest, feature = "candle"))]
#[doc = include_str!("../../../docs/src/candle.md")]
struct CandleChapter;
