//! Compressed blocks: means of overlapping stretches of keys and values.

use super::Nsa;
use crate::routed::key_panels::KeyPanels;
use crate::routed::rows::rows_f32;
use attn_core::{Result, StreamShape, TensorView, View};
use std::collections::VecDeque;

/// Compressed keys and values of a batch, growing at the end.
#[derive(Debug)]
pub(super) struct Compressed {
    batch: usize,
    n_heads: usize,
    widths: [usize; 2],
    heads: Vec<CompressedHead>,
    /// Keys appended.
    len: usize,
}

/// One key/value head.
#[derive(Debug)]
pub(super) struct CompressedHead {
    /// For scores.
    pub(super) panels: KeyPanels<f32>,
    /// Row-major.
    k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// Sums of keys and values of the blocks that have begun and not ended, the first one in front.
    open: VecDeque<(Vec<f32>, Vec<f32>)>,
}

impl Compressed {
    pub(super) fn new(shape: &StreamShape) -> Self {
        let head = || CompressedHead {
            panels: KeyPanels::new(shape.head_dim),
            k: Vec::new(),
            v: Vec::new(),
            open: VecDeque::new(),
        };
        Self {
            batch: shape.batch,
            n_heads: shape.n_heads_kv,
            widths: [shape.head_dim, shape.head_dim_v],
            heads: (0..shape.batch * shape.n_heads_kv).map(|_| head()).collect(),
            len: 0,
        }
    }

    /// Blocks that were made elsewhere.
    pub(super) fn given(shape: &StreamShape, k: &TensorView<'_>, v: &TensorView<'_>) -> Self {
        let mut all = Self::new(shape);
        for (at, head) in all.heads.iter_mut().enumerate() {
            let (batch, kv_head, n) = (at / all.n_heads, at % all.n_heads, k.shape()[2]);
            head.k = rows_f32(k, batch, kv_head, 0..n);
            head.v = rows_f32(v, batch, kv_head, 0..n);
            let rows = head.k.chunks_exact(all.widths[0]);
            rows.for_each(|row| head.panels.push(row.iter().copied()));
        }
        all
    }

    /// Appends blocks that were made elsewhere, of `n` more keys.
    pub(super) fn append_given(&mut self, k: &TensorView<'_>, v: &TensorView<'_>, n: usize) {
        let width = self.widths[0];
        for (at, head) in self.heads.iter_mut().enumerate() {
            let (batch, kv_head, blocks) = (at / self.n_heads, at % self.n_heads, k.shape()[2]);
            let rows = rows_f32(k, batch, kv_head, 0..blocks);
            rows.chunks_exact(width).for_each(|row| head.panels.push(row.iter().copied()));
            head.k.extend(rows);
            head.v.extend(rows_f32(v, batch, kv_head, 0..blocks));
        }
        self.len += n;
    }

    /// Keys appended.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends keys and values.
    pub(super) fn append(&mut self, nsa: &Nsa, k: &TensorView<'_>, v: &TensorView<'_>) {
        let ([width, width_v], n) = (self.widths, k.shape()[2]);
        let mean = 1.0 / nsa.compress_len as f32;
        for (at, head) in self.heads.iter_mut().enumerate() {
            let (batch, kv_head) = (at / self.n_heads, at % self.n_heads);
            let (k, v) = (rows_f32(k, batch, kv_head, 0..n), rows_f32(v, batch, kv_head, 0..n));
            for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width_v)).enumerate() {
                let position = self.len + i;
                if position.is_multiple_of(nsa.compress_stride) {
                    head.open.push_back((vec![0.0; width], vec![0.0; width_v]));
                }
                for (sum_k, sum_v) in &mut head.open {
                    sum_k.iter_mut().zip(k).for_each(|(sum, x)| *sum += x);
                    sum_v.iter_mut().zip(v).for_each(|(sum, x)| *sum += x);
                }
                if nsa.n_complete(position + 1) > nsa.n_complete(position)
                    && let Some((sum_k, sum_v)) = head.open.pop_front()
                {
                    head.k.extend(sum_k.iter().map(|x| x * mean));
                    head.v.extend(sum_v.iter().map(|x| x * mean));
                    head.panels.push(sum_k.iter().map(|x| x * mean));
                }
            }
        }
        self.len += n;
    }

    /// Blocks held, of each head.
    pub(super) fn n_blocks(&self) -> usize {
        self.heads.first().map_or(0, |head| head.panels.len())
    }

    pub(super) fn head(&self, batch: usize, kv_head: usize) -> &CompressedHead {
        &self.heads[batch * self.n_heads + kv_head]
    }

    /// Keys or values of all heads, row-major.
    pub(super) fn rows(&self) -> (Vec<f32>, Vec<f32>) {
        let k = self.heads.iter().flat_map(|head| head.k.iter().copied()).collect();
        (k, self.heads.iter().flat_map(|head| head.v.iter().copied()).collect())
    }

    /// What [`Compressed::rows`] gives as tensors.
    pub(super) fn views<'a>(
        &self,
        (k, v): &'a (Vec<f32>, Vec<f32>),
    ) -> Result<(View<'a, f32>, View<'a, f32>)> {
        let axes = |width| [self.batch, self.n_heads, self.n_blocks(), width];
        let [width, width_v] = self.widths;
        Ok((
            View::contiguous("k_compress", k, axes(width))?,
            View::contiguous("v_compress", v, axes(width_v))?,
        ))
    }

    pub(super) fn bytes(&self) -> usize {
        let open = |head: &CompressedHead| head.open.len() * (self.widths[0] + self.widths[1]);
        let floats = |head: &CompressedHead| head.k.capacity() + head.v.capacity() + open(head);
        self.heads.iter().map(|head| head.panels.bytes() + 4 * floats(head)).sum()
    }
}

impl Nsa {
    /// Adds the gradients of means to those of the rows they are means of: `grad [heads * n, width]`.
    pub(super) fn mean_backward(&self, heads: usize, grad_means: &[f32], grad: &mut [f32], width: usize) {
        let (blocks, n) = (grad_means.len() / (heads * width).max(1), grad.len() / (heads * width).max(1));
        let mean = 1.0 / self.compress_len as f32;
        for (at, grad_mean) in grad_means.chunks_exact(width).enumerate() {
            let (head, first) = (at / blocks, at % blocks * self.compress_stride);
            if at % blocks >= self.n_complete(n) {
                continue;
            }
            for row in grad[(head * n + first) * width..][..self.compress_len * width].chunks_exact_mut(width)
            {
                row.iter_mut().zip(grad_mean).for_each(|(to, x)| *to += x * mean);
            }
        }
    }
}
