//! Routing Transformer: every cluster takes its nearest queries and its nearest keys, and attends among them.
//!
//! With centroids `mu_c` for each head, and `top_w` the `w` tokens of highest score, ties to the lower index:
//!
//! ```text
//! Q_c = top_w of (q_i / |q_i|) . mu_c          K_c = top_w of (k_j / |k_j|) . mu_c
//! o_ci = softmax attention of q_i over the memory keys of cluster c and the keys of K_c
//! out_i = (sum of o_ci over clusters that picked i and showed it a key) / (their number + mean_eps)
//! ```
//!
//! A query that no cluster picked, or that saw nothing, gives zeros. With one cluster and a window of all tokens it is dense
//! attention.
//!
//! - `shared_qk`: keys are the queries, scaled to unit length (the keys given are not read); the score of a token with itself is a
//!   large negative constant.
//! - Memory keys and values, some for each head and cluster, are seen by every query of the cluster.
//! - Centroids follow the tokens by [`Routing::update_means`]; without any given, they are drawn with a seed.
//!
//! **Not strictly causal**, also with the causal mask: no later key is attended, but which tokens a cluster takes depends on all
//! of them.
//!
//! Cost: `2 (n_q + n_kv) num_clusters head_dim` FLOPs for the scores, and `num_clusters window^2` pairs; with the default of half
//! as many clusters as `sqrt(n)`, both grow as `n^1.5`. Memory `O(n)`.
//!
//! Source: Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021.
//! Averaging and memory keys: the routing-transformer package, whose `mean_eps` is 1e-5.

mod backward;
mod definition;
mod forward;
mod groups;
mod inputs;
mod means;
mod nearest;

pub use inputs::RoutingInputs;

use crate::profile::USUAL;
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv, QkvGrads,
    Result, Saved, Target, TensorView, softmax_flops,
};
pub use backward::RoutingGrads;

/// Attention inside clusters of near tokens; see the module's formulas.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Clusters; `None` takes half of `sqrt(n)`, or the number of the centroids given.
    pub num_clusters: Option<usize>,
    /// Queries, and keys, that a cluster takes, at most all of them; `None` takes `n / num_clusters`.
    pub window: Option<usize>,
    /// No key after the query is attended. Not strict: see the module.
    pub causal: bool,
    /// Whether keys are the queries, scaled to unit length; the keys given are then not read.
    pub shared_qk: bool,
    /// With `shared_qk`, the score of a token with itself.
    pub self_logit: f32,
    /// Added to the number of clusters that a query's outputs are divided by.
    pub mean_eps: f32,
    /// What centroids are drawn with where none are given.
    pub seed: u64,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for Routing {
    /// Half of `sqrt(n)` clusters that take `n / num_clusters` tokens each, queries and keys apart.
    fn default() -> Self {
        Self {
            num_clusters: None,
            window: None,
            causal: false,
            shared_qk: false,
            self_logit: -5e4,
            mean_eps: 0.0,
            seed: 0,
            softmax_scale: None,
        }
    }
}

impl Routing {
    /// The name in the registry.
    pub const NAME: &'static str = "routing";

    /// Clusters at these lengths, if the centroids do not say.
    fn clusters(&self, shape: &AttnShape) -> usize {
        let n = shape.n_q.max(shape.n_kv) as f64;
        self.num_clusters.unwrap_or_else(|| (n.sqrt() / 2.0).round().max(1.0) as usize)
    }

    /// Queries and keys that each of `clusters` takes.
    fn windows(&self, shape: &AttnShape, clusters: usize) -> [usize; 2] {
        [shape.n_q, shape.n_kv].map(|n| self.window.unwrap_or(n.div_ceil(clusters.max(1))).min(n))
    }

    /// Attends with further inputs.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for settings or tensors that do not fit; nothing has then been written.
    pub fn forward_with(&self, x: Qkv<'_>, inputs: &RoutingInputs<'_>, out: OutMut<'_>) -> Result<()> {
        x.check_out(&out)?;
        let checked = inputs.check(self, &x)?;
        forward::run(self, x, &checked, out, false).map(drop)
    }

    /// As [`Routing::forward_with`], keeping what [`Routing::backward_with`] needs.
    ///
    /// # Errors
    /// As [`Routing::forward_with`].
    pub fn forward_saving_with(
        &self,
        x: Qkv<'_>,
        inputs: &RoutingInputs<'_>,
        out: OutMut<'_>,
    ) -> Result<Saved> {
        x.check_out(&out)?;
        let checked = inputs.check(self, &x)?;
        Ok(Saved::new(forward::run(self, x, &checked, out, true)?))
    }

    /// Gradients of q, k, v and of the memory keys and values. The choice of tokens has none.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming what does not fit; nothing has then been written.
    pub fn backward_with(
        &self,
        x: Qkv<'_>,
        inputs: &RoutingInputs<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: RoutingGrads<'_>,
    ) -> Result<()> {
        let checked = inputs.check(self, &x)?;
        attn_core::check_like("grad_out", grad_out.shape(), grad_out.dtype(), x.q(), x.shape().head_dim_v)?;
        grads.check(&x, &checked)?;
        backward::Backward { config: self, x, inputs: &checked, grad_out, kept: saved.get()? }.run(grads)
    }

    /// Which queries, and which keys, each cluster takes: `[batch, n_heads_q, num_clusters, window]` each, ascending, -1 where
    /// there are fewer.
    ///
    /// # Errors
    /// As [`Routing::forward_with`].
    pub fn select(&self, x: &Qkv<'_>, inputs: &RoutingInputs<'_>) -> Result<[Vec<i32>; 2]> {
        let checked = inputs.check(self, x)?;
        let shape = x.shape();
        let heads = (0..shape.batch).flat_map(|b| (0..shape.n_heads_q).map(move |h| [b, h]));
        let mut all = [Vec::new(), Vec::new()];
        for at in heads {
            let lists = checked.lists(self, x, at);
            all.iter_mut().zip(lists).for_each(|(all, list)| all.extend(list));
        }
        Ok(all)
    }

    /// The definition in f64 over the same choices.
    ///
    /// # Errors
    /// As [`Routing::forward_with`].
    pub fn definition_with(&self, x: &Qkv<'_>, inputs: &RoutingInputs<'_>) -> Result<Reference> {
        let checked = inputs.check(self, x)?;
        Ok(definition::definition(self, x, &checked))
    }
}

impl Attention for Routing {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn profile(&self) -> Profile {
        Profile {
            target: Target::SoftmaxApproximately,
            causality: if self.causal { Causality::Masked } else { Causality::Bidirectional },
            convex: self.mean_eps == 0.0,
            key_order_free: !self.causal && !self.shared_qk,
            cross_lengths: !self.shared_qk,
            max_error: 6e-6,
            time: match (self.num_clusters, self.window) {
                (None, _) => Growth::SubQuadratic,
                (Some(_), Some(_)) => Growth::Linear,
                (Some(_), None) => Growth::Quadratic,
            },
            ..USUAL
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let (heads, clusters) = (crate::heads(shape), self.clusters(shape));
        let [window_q, window_k] = self.windows(shape, clusters);
        let pairs = heads * (clusters * window_q * window_k) as u64;
        let sides = if self.shared_qk { shape.n_q } else { shape.n_q + shape.n_kv };
        let scores = heads * 2 * (sides * clusters * shape.head_dim) as u64;
        let widths = shape.head_dim + shape.head_dim_v;
        let slots = clusters * (window_q + window_k);
        // Gathered rows and results; rows of unit length, lists, places.
        let floats = slots * (widths + 4) + sides * shape.head_dim + shape.n_q * (shape.head_dim_v + 2);
        let bytes = forward::entries(shape) as u64 * 4 * floats as u64;
        Cost::of(shape, dtype, softmax_flops(pairs, shape) + scores, bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.forward_with(x, &RoutingInputs::default(), out)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.definition_with(x, &RoutingInputs::default())
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl Differentiable for Routing {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.forward_saving_with(x, &RoutingInputs::default(), out)
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        _out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let grads = RoutingGrads { qkv: grads, mem_key: None, mem_value: None };
        self.backward_with(x, &RoutingInputs::default(), saved, grad_out, grads)
    }
}
