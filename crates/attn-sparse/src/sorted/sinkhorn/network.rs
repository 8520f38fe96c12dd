//! The sort network of a head: weights from pooled queries and keys, and their gradients.

use super::forward::Forward;
use super::layout::Buckets;
use super::mixture::Weights;
use super::pools::{Pools, pools};
use super::soft::Normalised;
use super::top::Top;
use super::{SinkhornKind, pools as pooling};
use rayon::prelude::*;

/// The network of one head.
pub(super) struct Network<'a> {
    forward: &'a Forward<'a>,
    buckets: Buckets,
    pools: Pools,
}

impl<'a> Network<'a> {
    pub(super) fn new(forward: &'a Forward<'a>, [batch, head]: [usize; 2]) -> Self {
        let shape = forward.x.shape();
        let buckets = Buckets::new(forward.config, &shape, head);
        let of_k = (forward.x.k(), [batch, shape.kv_head(head)]);
        let pools = pools(forward.config.kind, &buckets, (forward.x.q(), [batch, head]), of_k);
        Self { forward, buckets, pools }
    }

    fn width(&self) -> usize {
        self.forward.x.shape().head_dim
    }

    /// What multiplies dot products of pools.
    fn scale(&self) -> f64 {
        1.0 / (self.width() as f64).sqrt() / f64::from(self.forward.config.temperature)
    }

    fn top(&self) -> Top<'_> {
        let n_top = self.forward.config.mixtures(&self.forward.x.shape());
        let causal = self.forward.config.kind == SinkhornKind::Causal;
        let (n_null, scale) = (if causal { n_top } else { 0 }, self.scale());
        Top { pools: &self.pools, width: self.width(), scale, n_top, n_null, causal }
    }

    fn normalised(&self, keep: bool) -> Normalised {
        let (n, d) = (self.buckets.count, self.width());
        let mut logits = vec![0.0; n * n];
        logits.par_chunks_mut(n.max(1)).zip(self.pools.q.par_chunks(d)).for_each(|(logits, q)| {
            for (logit, k) in logits.iter_mut().zip(self.pools.k.chunks_exact(d)) {
                *logit = self.scale() * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
            }
        });
        Normalised::new(logits, n, self.forward.config.iterations, keep)
    }

    /// The weights.
    pub(super) fn weights(&self) -> Weights {
        let n = self.buckets.count;
        match self.forward.config.kind {
            SinkhornKind::Soft => Weights::from_dense(n, n, self.normalised(false).weights()),
            _ => {
                let top = self.top();
                Weights::one_each(n + top.n_null, top.choose())
            }
        }
    }

    /// Adds what gradients of the weights pass on to the queries and keys of the head. For `Soft` these are all weights, else the
    /// one of each row.
    pub(super) fn add_gradients(&self, of_weights: &[f32], to: [&mut [f32]; 2]) {
        let d = self.width();
        let grads = match self.forward.config.kind {
            SinkhornKind::Soft => {
                let n = self.buckets.count;
                let of_logits = self.normalised(true).gradients(of_weights);
                let scale = self.scale();
                let mut grads = Pools { q: vec![0.0; n * d], k: vec![0.0; n * d] };
                let sum = |to: &mut [f64], from: &[f64], logit: &dyn Fn(usize) -> f64| {
                    for (at, row) in from.chunks_exact(d).enumerate() {
                        let g = scale * logit(at);
                        to.iter_mut().zip(row).for_each(|(to, x)| *to += g * x);
                    }
                };
                grads.q.par_chunks_mut(d).enumerate().for_each(|(u, to)| {
                    sum(to, &self.pools.k, &|v| of_logits[u * n + v]);
                });
                grads.k.par_chunks_mut(d).enumerate().for_each(|(v, to)| {
                    sum(to, &self.pools.q, &|u| of_logits[u * n + v]);
                });
                grads
            }
            _ => self.top().gradients(of_weights),
        };
        pooling::add_gradients(self.forward.config.kind, &self.buckets, d, &grads, to);
    }
}
