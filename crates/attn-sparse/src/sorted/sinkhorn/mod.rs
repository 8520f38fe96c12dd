//! Sparse Sinkhorn attention: a bucket of queries attends its own bucket of keys, and mixtures of other buckets.
//!
//! With buckets of `m` consecutive tokens and weights `R` (row: what is mixed, column: a source bucket), slot `e` of mixture
//! `r` has the key and the value
//!
//! ```text
//! k~_re = sum_s R_rs k_se          v~_re = sum_s R_rs v_se
//! ```
//!
//! and a query of bucket `u` attends, in one softmax, the mixtures of its bucket and its own keys. A slot that only absent
//! tokens are mixed into (behind the end of the sequence) is hidden.
//!
//! | kind | mixtures | `R` |
//! |---|---|---|
//! | `Soft` | one a bucket | `e^L`, its logarithm normalised over columns and rows in turn, `iterations` times, rows last |
//! | `Causal` | `n_top` a bucket | of the sources before `u`: the largest softmax weight, then that of the rest, and so on |
//! | `SortCut` | `n_top` for all | as for `Causal`, over all buckets |
//!
//! The sort network, with `scale = 1/sqrt(head_dim)`:
//!
//! ```text
//! Soft      L_uv = scale / temperature * mean of q in u . mean of k in v
//! SortCut   L_v  = scale / temperature * mean of all q . mean of k in v
//! Causal    L_us = scale / temperature * a_u . b_s,  a_u = mean of q up to the first token of u,
//!                                                    b_s = sum over tokens t of s of the mean of k up to t
//! ```
//!
//! `Causal` has `n_top` further sources whose `L` is 0: a learned null key and value, in every slot. In the second half of its
//! heads (all of a single one) the first `m - 1` tokens stand in a group of their own, without mixtures, and buckets begin behind
//! them. (The authors rotate these heads by `m - 1`.) No query depends on a later token: **strictly causal**.
//!
//! Cost: `n m (1 + n_top)` pairs; mixing `2 (n / m) n (head_dim + head_dim_v)` FLOPs for `Soft`, and one row a slot otherwise;
//! logits `2 (n / m)^2 head_dim` FLOPs. With the default `m` about `sqrt(n)` all grow as `n^1.5` at most. Memory `O(n)` then, and
//! `(n / m)^2` for `Soft` in general.
//!
//! Source: Tay, Bahri, Yang, Metzler, Juan, "Sparse Sinkhorn Attention", ICML 2020; the kinds `Causal` and `SortCut` as the
//! sinkhorn-transformer package has them. `Soft` is without the paper's Gumbel noise.

mod backward;
mod definition;
mod forward;
mod groups;
mod layout;
mod mixture;
mod network;
mod pools;
mod soft;
mod top;

pub use backward::SinkhornGrads;

use crate::profile::USUAL;
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv,
    QkvGrads, Result, Saved, Target, TensorView, softmax_flops, softmax_scale_or_default,
};

/// Where mixtures come from; see the module's table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SinkhornKind {
    /// All buckets mixed, one mixture a bucket.
    #[default]
    Soft,
    /// Few earlier buckets for each bucket.
    Causal,
    /// Few buckets for all queries.
    SortCut,
}

/// Attention to the own bucket and to mixtures of others; see the module's formulas.
#[derive(Debug, Clone, PartialEq)]
pub struct Sinkhorn {
    /// Where mixtures come from.
    pub kind: SinkhornKind,
    /// Tokens of a bucket; `None` takes the power of two from `sqrt(n)` on, at least 16.
    pub bucket_size: Option<usize>,
    /// Mixtures of `Causal` and `SortCut`.
    pub n_top: usize,
    /// What logits of the sort network are divided by.
    pub temperature: f32,
    /// Normalisations of `Soft`.
    pub iterations: usize,
    /// Multiplies raw dot products of queries and keys; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for Sinkhorn {
    /// Soft, with the paper's 8 iterations and a temperature of 0.75.
    fn default() -> Self {
        Self {
            kind: SinkhornKind::Soft,
            bucket_size: None,
            n_top: 1,
            temperature: 0.75,
            iterations: 8,
            softmax_scale: None,
        }
    }
}

/// Further inputs of [`Sinkhorn`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SinkhornInputs<'a> {
    /// `R` instead of the network's, `[batch, n_heads_q, rows, sources]` with as many buckets as `n / bucket_size`, rounded up:
    /// `Soft` `[buckets, buckets]`; `Causal` `[buckets * n_top, n_top + buckets]`, the mixtures of a bucket one after another,
    /// null sources first; `SortCut` `[n_top, buckets]`.
    pub sort: Option<&'a [f32]>,
    /// The null key of each head, `[n_heads_q, head_dim]`; zeros if not given.
    pub null_key: Option<&'a [f32]>,
    /// The null value of each head, `[n_heads_q, head_dim_v]`; zeros if not given.
    pub null_value: Option<&'a [f32]>,
}

impl Sinkhorn {
    /// The name in the registry.
    pub const NAME: &'static str = "sinkhorn";

    /// Tokens of a bucket.
    fn size(&self, shape: &AttnShape) -> usize {
        let root = (shape.n_q as f64).sqrt().ceil() as usize;
        self.bucket_size.unwrap_or_else(|| root.next_power_of_two().max(16)).max(1)
    }

    /// Rows and columns of `R` for each head of a problem.
    pub fn sort_shape(&self, shape: &AttnShape) -> [usize; 2] {
        let buckets = shape.n_q.div_ceil(self.size(shape));
        match self.kind {
            SinkhornKind::Soft => [buckets, buckets],
            SinkhornKind::Causal => {
                let top = self.n_top.min(buckets);
                [buckets * top, buckets + top]
            }
            SinkhornKind::SortCut => [self.n_top.min(buckets), buckets],
        }
    }

    /// Mixtures that a bucket attends.
    fn mixtures(&self, shape: &AttnShape) -> usize {
        match self.kind {
            SinkhornKind::Soft => 1,
            _ => self.n_top.min(shape.n_q.div_ceil(self.size(shape))),
        }
    }

    fn check(&self, x: &Qkv<'_>, inputs: &SinkhornInputs<'_>) -> Result<f32> {
        let shape = x.shape();
        if shape.n_q != shape.n_kv {
            return Err(AttnError::shape("k", "n_kv", shape.n_kv, format!("{} (n_q)", shape.n_q)));
        }
        if self.bucket_size == Some(0) || self.n_top == 0 || self.iterations == 0 {
            let zero = [("bucket_size", self.bucket_size == Some(0)), ("n_top", self.n_top == 0)];
            let name = zero.into_iter().find(|(_, zero)| *zero).map_or("iterations", |(name, _)| name);
            return Err(AttnError::value(name, 0, "at least 1"));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(AttnError::value("temperature", self.temperature, "a positive number"));
        }
        let [rows, sources] = self.sort_shape(&shape);
        let keys = self.mixtures(&shape).saturating_add(1).saturating_mul(shape.n_q + self.size(&shape));
        if keys.max(rows.max(sources)) >= i32::MAX as usize {
            return Err(AttnError::shape("q", "n_q", shape.n_q, "fewer than 2^31 slots"));
        }
        let heads = shape.batch * shape.n_heads_q;
        let causal = self.kind == SinkhornKind::Causal;
        for (name, found, expected) in [
            ("sort", inputs.sort, heads * rows * sources),
            ("null_key", inputs.null_key, shape.n_heads_q * shape.head_dim),
            ("null_value", inputs.null_value, shape.n_heads_q * shape.head_dim_v),
        ] {
            let Some(found) = found else { continue };
            if found.len() != expected {
                return Err(AttnError::shape(name, "elements", found.len(), expected));
            }
            if name != "sort" && !causal {
                return Err(AttnError::unsupported(
                    Self::NAME,
                    format!("`{name}`: only the causal kind has one"),
                ));
            }
        }
        softmax_scale_or_default(self.softmax_scale, shape.head_dim)
    }

    /// Attends with further inputs.
    ///
    /// # Errors
    /// [`AttnError`] for settings or tensors that do not fit; nothing has then been written.
    pub fn forward_with(&self, x: Qkv<'_>, inputs: &SinkhornInputs<'_>, out: OutMut<'_>) -> Result<()> {
        let softmax_scale = self.check(&x, inputs)?;
        x.check_out(&out)?;
        forward::Forward { config: self, x, softmax_scale, inputs }.run(out, false).map(drop)
    }

    /// As [`Sinkhorn::forward_with`], keeping what [`Sinkhorn::backward_with`] needs.
    ///
    /// # Errors
    /// As [`Sinkhorn::forward_with`].
    pub fn forward_saving_with(
        &self,
        x: Qkv<'_>,
        inputs: &SinkhornInputs<'_>,
        out: OutMut<'_>,
    ) -> Result<Saved> {
        let softmax_scale = self.check(&x, inputs)?;
        x.check_out(&out)?;
        Ok(Saved::new(forward::Forward { config: self, x, softmax_scale, inputs }.run(out, true)?))
    }

    /// Gradients of all inputs, also through the weights `R`: to the tensor `sort` if it is given, else through the network to q
    /// and k. Which buckets are the largest has none.
    ///
    /// # Errors
    /// [`AttnError`] naming what does not fit; nothing has then been written.
    pub fn backward_with(
        &self,
        x: Qkv<'_>,
        inputs: &SinkhornInputs<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: SinkhornGrads<'_>,
    ) -> Result<()> {
        let softmax_scale = self.check(&x, inputs)?;
        for (name, tensor) in [("out", &out), ("grad_out", &grad_out)] {
            attn_core::check_like(name, tensor.shape(), tensor.dtype(), x.q(), x.shape().head_dim_v)?;
        }
        grads.check(&x, inputs)?;
        let lse = saved.get()?;
        backward::Backward { config: self, x, softmax_scale, inputs, out, grad_out, lse }.run(grads)
    }

    /// The weights `R` of the network, as [`SinkhornInputs::sort`] has them.
    ///
    /// # Errors
    /// As [`Sinkhorn::forward_with`].
    pub fn sort(&self, x: &Qkv<'_>) -> Result<Vec<f32>> {
        let softmax_scale = self.check(x, &SinkhornInputs::default())?;
        let inputs = &SinkhornInputs::default();
        let forward = forward::Forward { config: self, x: *x, softmax_scale, inputs };
        let shape = x.shape();
        let heads = (0..shape.batch).flat_map(|b| (0..shape.n_heads_q).map(move |h| [b, h]));
        Ok(heads.flat_map(|at| forward.weights(at).dense()).collect())
    }

    /// The definition in f64, over the weights `R` that [`Sinkhorn::forward_with`] uses.
    ///
    /// # Errors
    /// As [`Sinkhorn::forward_with`].
    pub fn definition_with(&self, x: &Qkv<'_>, inputs: &SinkhornInputs<'_>) -> Result<Reference> {
        let softmax_scale = self.check(x, inputs)?;
        Ok(definition::definition(&forward::Forward { config: self, x: *x, softmax_scale, inputs }))
    }
}

impl Attention for Sinkhorn {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn profile(&self) -> Profile {
        let causal = self.kind == SinkhornKind::Causal;
        let fixed = self.bucket_size.is_some();
        Profile {
            target: Target::Own,
            causality: if causal { Causality::Strict } else { Causality::Bidirectional },
            convex: false,
            cross_lengths: false,
            max_error: 1e-5,
            time: match self.kind {
                _ if !fixed => Growth::SubQuadratic,
                SinkhornKind::SortCut => Growth::Linear,
                _ => Growth::Quadratic,
            },
            memory: if fixed && self.kind == SinkhornKind::Soft { Growth::Quadratic } else { Growth::Linear },
            ..USUAL
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let (heads, n, size) = (crate::heads(shape), shape.n_q as u64, self.size(shape) as u64);
        let widths = (shape.head_dim + shape.head_dim_v) as u64;
        let (mixtures, [rows, sources]) =
            (self.mixtures(shape) as u64, self.sort_shape(shape).map(|n| n as u64));
        let pairs = heads * n * size * (1 + mixtures);
        let (per_source, kept) = match self.kind {
            SinkhornKind::Soft => (2 * size * widths + 2 * shape.head_dim as u64, 3 * rows * sources),
            SinkhornKind::Causal => (2 * shape.head_dim as u64 / mixtures.max(1), 4 * rows),
            SinkhornKind::SortCut => (2 * shape.head_dim as u64, 4 * rows),
        };
        let mixed = 2 * rows * size * widths;
        let sort = heads * (rows * sources * per_source + mixed + 2 * n * widths);
        let entries = forward::entries(shape) as u64;
        let gathered = 4 * entries * (n * (2 * widths + (1 + mixtures) * widths + 3) + kept);
        Cost::of(shape, dtype, softmax_flops(pairs, shape) + sort, gathered)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.forward_with(x, &SinkhornInputs::default(), out)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.definition_with(x, &SinkhornInputs::default())
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl Differentiable for Sinkhorn {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.forward_saving_with(x, &SinkhornInputs::default(), out)
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let grads = SinkhornGrads { qkv: grads, sort: None, null_key: None, null_value: None };
        self.backward_with(x, &SinkhornInputs::default(), out, saved, grad_out, grads)
    }
}
