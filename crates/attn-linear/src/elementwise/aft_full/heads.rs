//! Rows of one head after the other, and the gate of the queries.

use super::passes::Rows;
use crate::scan::Tokens;
use crate::scan::math::sigmoid;
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::MAX_LANES;
use attn_core::{AttnShape, Qkv, Result};

/// Rows of the heads, as wide as the values.
pub(super) struct Heads<'a> {
    pub(super) queries: Tokens<'a>,
    pub(super) keys: Tokens<'a>,
    pub(super) shape: AttnShape,
    pub(super) stride: usize,
}

impl<'a> Heads<'a> {
    pub(super) fn new(x: &Qkv<'a>) -> Result<Self> {
        let shape = x.shape();
        Ok(Self {
            queries: Tokens::of_any_width(&[("q", *x.q())])?,
            keys: Tokens::of_any_width(&[("k", *x.k()), ("v", *x.v())])?,
            shape,
            stride: shape.head_dim_v.next_multiple_of(MAX_LANES),
        })
    }

    pub(super) fn rows(&self, tokens: &Tokens<'_>, at: usize, head: (usize, usize), len: usize) -> Rows {
        let mut rows = Rows::new(len, self.stride);
        tokens.load(at, head, 0..len, (self.shape.head_dim_v, self.stride), &mut rows.data);
        rows
    }

    pub(super) fn query(&self, batch: usize, head: usize) -> Rows {
        self.rows(&self.queries, 0, (batch, head), self.shape.n_q)
    }

    pub(super) fn key_value(&self, batch: usize, head: usize) -> (Rows, Rows) {
        let n = self.shape.n_kv;
        (self.rows(&self.keys, 0, (batch, head), n), self.rows(&self.keys, 1, (batch, head), n))
    }

    /// Query heads that share a key/value head.
    pub(super) fn queries_of(&self, kv: usize) -> std::ops::Range<usize> {
        let group = self.shape.n_heads_q / self.shape.n_heads_kv;
        kv * group..(kv + 1) * group
    }

    pub(super) fn unpadded<'r>(&self, rows: &'r Rows) -> impl Iterator<Item = f32> + use<'r> {
        let width = self.shape.head_dim_v;
        rows.data.chunks_exact(self.stride).flat_map(move |row| &row[..width]).copied()
    }
}

/// `out = sigmoid(q) o x`.
pub(super) struct Gate<'a> {
    pub(super) q: &'a [f32],
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl SimdOp for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let len = S::f32s::LEN;
        let rows = self.q.chunks_exact(len).zip(self.x.chunks_exact(len));
        for ((q, x), out) in rows.zip(self.out.chunks_exact_mut(len)) {
            let [q, x] = [q, x].map(|row| S::f32s::from_slice(simd, row));
            (sigmoid(simd, q) * x).store_slice(out);
        }
    }
}

/// [`Gate`] backwards: `grad` becomes that by `x`.
pub(super) struct GateBack<'a> {
    pub(super) q: &'a [f32],
    pub(super) x: &'a [f32],
    pub(super) grad: &'a mut [f32],
    pub(super) by_q: &'a mut [f32],
}

impl SimdOp for GateBack<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let len = S::f32s::LEN;
        let rows = self.q.chunks_exact(len).zip(self.x.chunks_exact(len));
        let grads = self.grad.chunks_exact_mut(len).zip(self.by_q.chunks_exact_mut(len));
        for ((q, x), (grad, by_q)) in rows.zip(grads) {
            let [q, x, d] = [q, x, &*grad].map(|row| S::f32s::from_slice(simd, row));
            let s = sigmoid(simd, q);
            let by = d * s;
            by.store_slice(grad);
            (by * x * (S::f32s::splat(simd, 1.0) - s)).store_slice(by_q);
        }
    }
}
