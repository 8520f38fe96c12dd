//! A decider as an [`Attention`]: forward, log-sum-exp, gradients, streaming.

use crate::decider::{Decider, Decision};
use attn_core::exact::{Exact, Reference};
use attn_core::mask::Mask;
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnError, AttnShape, Cost, DType, Differentiable, Family, OutMut, Profile, Qkv, QkvGrads,
    Result, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, softmax_flops,
    softmax_scale_or_default,
};
use attn_flash::TileSizes;
use attn_flash::engine::{
    AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_any, attend_backward_any,
};
use attn_flash::stream::CachedStream;

/// Softmax attention over the pairs that a [`Decider`] (often a [`Pattern`](crate::Pattern)) chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseAttention<D> {
    /// Who sees whom.
    pub decider: D,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl<D: Decider> SparseAttention<D> {
    /// The decider with the default scale.
    pub fn new(decider: D) -> Self {
        Self { decider, softmax_scale: None }
    }

    /// Which pairs a call on `x` attends.
    ///
    /// # Errors
    /// Those of [`Decider::decide`].
    pub fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.decider.decide(x)
    }
}

/// What the engine computes for a decision.
pub(crate) fn spec<'a>(decision: &'a Decision, softmax_scale: f32, shape: &AttnShape) -> AnySpec<'a> {
    let mask: &(dyn Mask + 'a) = decision.mask();
    let tiles = decision.rows_apart().then(|| TileSizes::auto(shape).rows_apart());
    AnySpec { tiles, ..AnySpec::new(softmax_scale, mask, &Unchanged) }
}

impl<D: Decider> SparseAttention<D> {
    fn attend(&self, x: Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<Decision> {
        let shape = x.shape();
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        x.check_out(&out)?;
        let decision = self.decider.decide(&x)?;
        attend_any(Problem::batch(x), out, lse, &spec(&decision, softmax_scale, &shape))?;
        Ok(decision)
    }
}

impl<D: Decider> Attention for SparseAttention<D> {
    fn name(&self) -> &'static str {
        D::NAME
    }

    fn profile(&self) -> Profile {
        let promises = self.decider.promises();
        Profile {
            family: Family::Sparse,
            target: Target::SoftmaxOverChosen,
            causality: promises.causality,
            convex: true,
            key_order_free: promises.key_order_free,
            cross_lengths: promises.cross_lengths,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 4e-6,
            time: promises.time,
            memory: promises.memory,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let work = self.decider.work(shape);
        let flops = softmax_flops(work.pairs, shape) + work.decision_flops;
        let scratch = TileSizes::auto(shape).workspace_bytes(shape) * rayon::current_num_threads() as u64;
        Cost::of(shape, dtype, flops, scratch + work.decision_bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.attend(x, out, None).map(drop)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let decision = self.decider.decide(x)?;
        let softmax_scale = self.softmax_scale.map(f64::from);
        Exact { softmax_scale, mask: decision.mask(), ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.decider.promises().kept.map(|_| self as &dyn Streaming)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl<D: Decider> SoftmaxAttention for SparseAttention<D> {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.attend(x, out, Some(lse)).map(drop)
    }
}

/// What the backward pass needs: the log-sum-exps and the pairs that were chosen.
struct Chosen {
    lse: Vec<f32>,
    decision: Decision,
}

impl<D: Decider> Differentiable for SparseAttention<D> {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        let mut lse = vec![0.0; x.shape().rows()];
        let decision = self.attend(x, out, Some(&mut lse))?;
        Ok(Saved::new(Chosen { lse, decision }))
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
        let shape = x.shape();
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let Chosen { lse, decision } = saved.get()?;
        let spec = spec(decision, softmax_scale, &shape);
        let grad = OutputGrad { out: grad_out, lse: None };
        let grads = Grads::new(grads.q, grads.k, grads.v);
        attend_backward_any(Problem::batch(x), ForwardResult { out, lse }, grad, grads, &spec)
    }
}

impl<D: Decider> Streaming for SparseAttention<D> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        match self.decider.promises().kept {
            Some(kept) => match self.decider.stream(self.softmax_scale, shape) {
                Some(own) => own,
                None => CachedStream::start(self.clone(), shape, kept),
            },
            None => Err(AttnError::unsupported(D::NAME, "streaming in this configuration")),
        }
    }
}
