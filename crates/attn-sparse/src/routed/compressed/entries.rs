//! Entries of keys and values themselves, where no learned compression is given: means, growing at the end.

use super::{CompressedAttention, Entries};
use crate::routed::index_channels::IndexKeys;
use crate::routed::rows::rows_f32;
use attn_core::{Result, StreamShape, TensorView, View};
use attn_flash::cache::{CacheKind, KvCache};

/// Entries of all heads, and the indexer's keys.
pub(super) struct EntryMeans {
    pub(super) cache: KvCache,
    pub(super) index: Option<IndexKeys>,
    shape: StreamShape,
    /// Sums of keys and values of the last complete window and of the one that has begun, a head each.
    sums: Vec<[Vec<f32>; 4]>,
    /// Tokens appended.
    len: usize,
}

impl EntryMeans {
    pub(super) fn new(attention: &CompressedAttention, shape: &StreamShape) -> Result<Self> {
        attention.check()?;
        let index = match attention.entries {
            Entries::Heavy => None,
            Entries::Sparse { index_dim, .. } => Some(IndexKeys::new(index_dim, shape)?),
        };
        let [k, v] = [shape.head_dim, shape.head_dim_v];
        let sums = || [k, v, k, v].map(|width| vec![0.0; width]);
        Ok(Self {
            cache: KvCache::new((*shape).into(), CacheKind::F32)?,
            index,
            shape: *shape,
            sums: (0..shape.batch * shape.n_heads_kv).map(|_| sums()).collect(),
            len: 0,
        })
    }

    /// Appends tokens.
    pub(super) fn append(
        &mut self,
        attention: &CompressedAttention,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<()> {
        let (s, m, n) = (self.shape, attention.rate, k.shape()[2]);
        let n_new = (self.len + n) / m - self.len / m;
        let [mut new_k, mut new_v] =
            [s.head_dim, s.head_dim_v].map(|w| Vec::with_capacity(self.sums.len() * n_new * w));
        for (head, sums) in self.sums.iter_mut().enumerate() {
            let (batch, kv_head) = (head / s.n_heads_kv, head % s.n_heads_kv);
            let (k, v) = (rows_f32(k, batch, kv_head, 0..n), rows_f32(v, batch, kv_head, 0..n));
            for (i, (k, v)) in k.chunks_exact(s.head_dim).zip(v.chunks_exact(s.head_dim_v)).enumerate() {
                let [last_k, last_v, sum_k, sum_v] = sums;
                sum_k.iter_mut().zip(k).for_each(|(sum, x)| *sum += x);
                sum_v.iter_mut().zip(v).for_each(|(sum, x)| *sum += x);
                let n_tokens = self.len + i + 1;
                if !n_tokens.is_multiple_of(m) {
                    continue;
                }
                let twice = attention.is_sparse() && n_tokens > m;
                let mean = 1.0 / if twice { 2 * m } else { m } as f32;
                let entry = |last: &[f32], sum: &[f32]| -> Vec<f32> {
                    let before = |x: &f32| if twice { *x } else { 0.0 };
                    last.iter().zip(sum).map(|(last, sum)| (before(last) + sum) * mean).collect()
                };
                let (entry_k, entry_v) = (entry(last_k, sum_k), entry(last_v, sum_v));
                if let Some(index) = &mut self.index {
                    index.push(head, &entry_k);
                }
                new_k.extend(entry_k);
                new_v.extend(entry_v);
                std::mem::swap(last_k, sum_k);
                std::mem::swap(last_v, sum_v);
                sum_k.fill(0.0);
                sum_v.fill(0.0);
            }
        }
        self.len += n;
        let axes = |width| [s.batch, s.n_heads_kv, n_new, width];
        self.cache.append(
            View::contiguous("k", &new_k, axes(s.head_dim))?,
            View::contiguous("v", &new_v, axes(s.head_dim_v))?,
        )
    }

    pub(super) fn bytes(&self) -> usize {
        let sums = self.sums.len() * 8 * (self.shape.head_dim + self.shape.head_dim_v);
        self.cache.bytes() + sums + self.index.as_ref().map_or(0, IndexKeys::bytes)
    }
}

impl CompressedAttention {
    /// Adds the gradients of such entries to those of their tokens: `grad [heads * n, width]`.
    pub(super) fn means_backward(&self, heads: usize, grad_entries: &[f32], grad: &mut [f32], width: usize) {
        let n = grad.len() / (heads * width).max(1);
        let (m, entries) = (self.rate, n / self.rate);
        for (at, grad_entry) in grad_entries.chunks_exact(width).enumerate() {
            let (head, entry) = (at / entries, at % entries);
            let first = if self.is_sparse() { entry.saturating_sub(1) } else { entry } * m;
            let tokens = (entry + 1) * m - first;
            let rows = grad[(head * n + first) * width..][..tokens * width].chunks_exact_mut(width);
            for row in rows {
                row.iter_mut().zip(grad_entry).for_each(|(to, x)| *to += x / tokens as f32);
            }
        }
    }
}
