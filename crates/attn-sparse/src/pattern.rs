//! What all patterns share: softmax attention over the pairs that a mask leaves visible.
//!
//! ```text
//! out_i = sum_{j in A(i)} e^(s_ij - lse_i) v_j        lse_i = ln sum_{j in A(i)} e^(s_ij)
//! ```
//!
//! with `s_ij = softmax_scale * q_i . k_j` and `A(i)` the keys that query `i` sees. An empty `A(i)` gives a zero row and a
//! log-sum-exp of -inf.

use attn_core::exact::{Exact, Reference};
use attn_core::mask::Mask;
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, QkvGrads, Result, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView,
    softmax_flops, softmax_scale_or_default,
};
use attn_flash::TileSizes;
use attn_flash::engine::{ForwardResult, Grads, OutputGrad, Spec, attend, attend_backward};
use attn_flash::stream::{CachedStream, Kept};

/// A static pattern: a small decider whose output is a mask.
pub trait Pattern: Clone + Send + Sync + 'static {
    /// Its mask type.
    type Mask: Mask;

    /// Stable kebab-case name.
    const NAME: &'static str;

    /// The visible pairs of a problem.
    fn mask(&self, shape: &AttnShape) -> Self::Mask;

    /// Number of visible pairs in one head.
    fn pairs(&self, shape: &AttnShape) -> u64;

    /// Whether no query sees a later key.
    fn is_causal(&self) -> bool;

    /// Which rows a stream has to keep, for causal patterns.
    fn kept(&self) -> Kept;

    /// How time grows with the length.
    fn growth(&self) -> Growth;
}

/// A [`Pattern`] as an [`Attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseAttention<P> {
    /// Who sees whom.
    pub pattern: P,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl<P: Pattern> SparseAttention<P> {
    /// The pattern with the default scale.
    pub fn new(pattern: P) -> Self {
        Self { pattern, softmax_scale: None }
    }

    fn attend(&self, x: Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<()> {
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, x.shape().head_dim)?;
        let mask = self.pattern.mask(&x.shape());
        let spec = Spec::new(softmax_scale, &mask, &Unchanged);
        attend(x, out, lse, &spec)
    }
}

impl<P: Pattern> Attention for SparseAttention<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Sparse,
            target: Target::SoftmaxOverChosen,
            causality: if self.pattern.is_causal() { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: false,
            cross_lengths: true,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 4e-6,
            time: self.pattern.growth(),
            memory: Growth::Constant,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let flops = softmax_flops(self.pattern.pairs(shape), shape) * (shape.batch * shape.n_heads_q) as u64;
        let scratch = TileSizes::auto(shape).workspace_bytes(shape) * rayon::current_num_threads() as u64;
        Cost::of(shape, dtype, flops, scratch)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.attend(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let mask = self.pattern.mask(&x.shape());
        Exact { softmax_scale: self.softmax_scale.map(f64::from), mask: &mask, ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.pattern.is_causal() { Some(self) } else { None }
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl<P: Pattern> SoftmaxAttention for SparseAttention<P> {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.attend(x, out, Some(lse))
    }
}

impl<P: Pattern> Differentiable for SparseAttention<P> {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        let mut lse = vec![0.0; x.shape().rows()];
        self.attend(x, out, Some(&mut lse))?;
        Ok(Saved::new(lse))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, x.shape().head_dim)?;
        let mask = self.pattern.mask(&x.shape());
        let spec = Spec::new(softmax_scale, &mask, &Unchanged);
        let forward = ForwardResult { out, lse: saved.get::<Vec<f32>>()? };
        let grad = OutputGrad { out: grad_out, lse: None };
        attend_backward(x, forward, grad, Grads::new(grads.q, grads.k, grads.v), &spec)
    }
}

impl<P: Pattern> Streaming for SparseAttention<P> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        if !self.pattern.is_causal() {
            return Err(AttnError::unsupported(P::NAME, "streaming without `causal`"));
        }
        CachedStream::start(self.clone(), shape, self.pattern.kept())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChunkedCausal, SinkWindow, SlidingWindow};
    use attn_core::mask::Head;

    fn check<P: Pattern + std::fmt::Debug>(pattern: P) {
        let head = Head { batch: 0, head: 0 };
        for (n_q, n_kv) in [(0, 5), (1, 1), (5, 9), (9, 5), (16, 16), (40, 40)] {
            let shape = AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 4) };
            let mask = pattern.mask(&shape);
            let pairs = (0..n_q).flat_map(|i| (0..n_kv).map(move |j| (i, j)));
            let seen: Vec<_> = pairs.filter(|&(i, j)| mask.sees(head.pair(i, j))).collect();
            assert_eq!(pattern.pairs(&shape), seen.len() as u64, "{pattern:?} on {n_q} x {n_kv}");
            let later = seen.iter().filter(|(i, j)| j + n_q > i + n_kv).count();
            assert!(!pattern.is_causal() || later == 0, "{pattern:?} sees {later} later keys");
        }
    }

    #[test]
    fn counts_and_causality_are_those_of_the_mask() {
        for (left, right) in [(0, 0), (3, 0), (0, 2), (4, 4), (100, 100)] {
            check(SlidingWindow { left, right });
        }
        for (n_sinks, window) in [(0, 1), (4, 1), (4, 3), (2, 100), (100, 2)] {
            check(SinkWindow { n_sinks, window });
        }
        for chunk_len in [1, 3, 8, 100] {
            check(ChunkedCausal { chunk_len });
        }
    }
}
