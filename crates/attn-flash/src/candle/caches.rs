//! Key/value caches on tensors, for decoding: a backward pass through what comes out is an error.

use crate::FlashCall;
use crate::cache::{BlockTable, KvCache, PagedKvCache, SequenceId};
use crate::engine::Problem;
use attn_core::TensorView;
use attn_core::candle::candle_core::{Result, Tensor};
use attn_core::candle::{AxisOrder, refuse_gradients, tensor_from, with_view};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;

impl KvCache {
    /// [`KvCache::append`] of `k (batch, n_heads_kv, n, head_dim)` and `v (batch, n_heads_kv, n, head_dim_v)`, rounded to the
    /// cache's storage type.
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; those of [`KvCache::append`].
    pub fn append_t(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        with_keys_and_values(k, v, |k, v| self.append(k, v))
    }
}

impl PagedKvCache {
    /// [`PagedKvCache::append`] of `k (1, n_heads_kv, n, head_dim)` and `v (1, n_heads_kv, n, head_dim_v)`, rounded to the
    /// cache's storage type.
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; those of [`PagedKvCache::append`].
    pub fn append_t(&mut self, sequence: SequenceId, k: &Tensor, v: &Tensor) -> Result<()> {
        with_keys_and_values(k, v, |k, v| self.append(sequence, k, v))
    }
}

impl<M: Mask, C: ScoreMod> FlashCall<'_, M, C> {
    /// `q (batch, n_heads_q, n_q, head_dim)` against all that `cache` holds -> `(batch, n_heads_q, n_q, head_dim_v)`, in the
    /// dtype of `q`. Causal calls let the last query stand at the last key.
    ///
    /// ```
    /// use attn_core::candle::candle_core::{Device, Result, Tensor};
    /// use attn_flash::Flash;
    /// use attn_flash::cache::{CacheKind, CacheShape, KvCache};
    ///
    /// # fn main() -> Result<()> {
    /// let shape = CacheShape { batch: 1, n_heads_kv: 2, head_dim: 8, head_dim_v: 8 };
    /// let mut cache = KvCache::new(shape, CacheKind::Int8)?;
    /// let prompt = Tensor::randn(0f32, 1.0, (1, 2, 5, 8), &Device::Cpu)?;
    /// cache.append_t(&prompt, &prompt)?;
    /// let q = Tensor::randn(0f32, 1.0, (1, 4, 1, 8), &Device::Cpu)?; // one token, four query heads
    /// let out = Flash::causal().call().attend_cache_t(&q, &cache)?;
    /// assert_eq!(out.dims(), [1, 4, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; queries that do not fit the cache.
    pub fn attend_cache_t(&self, q: &Tensor, cache: &KvCache) -> Result<Tensor> {
        let out = with_view("q", q, AxisOrder::Bhnd, |q| self.attended(cache.problem(q)?))?;
        refuse_gradients("flash from a cache", out, &[q])
    }

    /// [`FlashCall::attend_cache_t`] for the sequences of `table`, one a batch entry of `q`.
    ///
    /// # Errors
    /// As [`FlashCall::attend_cache_t`].
    pub fn attend_pages_t(&self, q: &Tensor, cache: &PagedKvCache, table: &BlockTable) -> Result<Tensor> {
        let out = with_view("q", q, AxisOrder::Bhnd, |q| self.attended(cache.problem(q, table)?))?;
        refuse_gradients("flash from pages", out, &[q])
    }

    fn attended(&self, problem: Problem<'_>) -> Result<Tensor> {
        let (dtype, shape) = (problem.q().dtype(), problem.shape().out());
        tensor_from(dtype, shape, AxisOrder::Bhnd, |out| self.forward(problem, out, None))
    }
}

fn with_keys_and_values(
    k: &Tensor,
    v: &Tensor,
    run: impl FnOnce(TensorView<'_>, TensorView<'_>) -> attn_core::Result<()>,
) -> Result<()> {
    let order = AxisOrder::Bhnd;
    with_view("k", k, order, |k| with_view("v", v, order, |v| Ok(run(k, v)?)))
}
