//! Exact attention on candle tensors.
//!
//! - [`attn_core::candle::CandleAttention`]: `Flash::causal().forward_t(&q, &k, &v)`, and streams; for every variant.
//! - [`FlashTensors`]: a [`FlashCall`](crate::FlashCall) with tensors besides q, k and v: ALiBi slopes, a bias and sinks with
//!   gradients, packed sequences, the log-sum-exp.
//! - [`flash_attn`] and its family: the functions of candle-flash-attn 0.11, on the CPU and with gradients.
//! - [`KvCache::append_t`](crate::cache::KvCache::append_t), [`FlashCall::attend_cache_t`](crate::FlashCall::attend_cache_t)
//!   and their paged siblings: decoding from a cache of any storage type.
//!
//! A model that calls `candle_flash_attn::flash_attn(..)` changes one line:
//!
//! ```
//! use attn_flash as candle_flash_attn;
//! # use attn_core::candle::candle_core::{DType, Device, Result, Tensor};
//!
//! # fn main() -> Result<()> {
//! // (batch, length, heads, width), two query heads for each key/value head
//! let q = Tensor::randn(0f32, 1.0, (1, 12, 4, 16), &Device::Cpu)?.to_dtype(DType::BF16)?;
//! let k = Tensor::randn(0f32, 1.0, (1, 12, 2, 16), &Device::Cpu)?.to_dtype(DType::BF16)?;
//! let out = candle_flash_attn::flash_attn(&q, &k, &k, 0.25, true)?;
//! assert_eq!((out.dims(), out.dtype()), (q.dims(), DType::BF16));
//! # Ok(())
//! # }
//! ```

mod caches;
mod drop_in;
mod kernel;
mod numbers;
mod packed;
mod paged;
mod tensors;

pub use drop_in::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_windowed, flash_attn_windowed,
};
pub use paged::flash_attn_varlen_paged_windowed;
pub use tensors::FlashTensors;
