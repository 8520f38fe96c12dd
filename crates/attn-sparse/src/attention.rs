//! A decider as an [`Attention`]: forward, log-sum-exp, gradients, streaming.

use crate::attend::Call;
use crate::decider::{Decider, Decision};
use crate::memory::RememberingStream;
use crate::profile::USUAL;
use crate::score_rule::{Reads, ScoreRule, SharedScoreMod};
use attn_core::exact::{Exact, Reference};
use attn_core::score::{BiasIndex, Unchanged};
use attn_core::{
    Attention, AttnError, AttnShape, Cost, DType, Differentiable, OutMut, Profile, Qkv, QkvGrads, Result,
    Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, softmax_flops,
    softmax_scale_or_default,
};
use attn_flash::TileSizes;
use attn_flash::engine::{ForwardResult, Grads};
use attn_flash::stream::{CachedStream, Kept};
use std::sync::Arc;

/// Softmax attention over the pairs that a [`Decider`] (often a [`Pattern`](crate::Pattern)) chooses.
///
/// ```
/// use attn_core::Attention;
/// use attn_sparse::{ScoreRule, SlidingWindow, SparseAttention};
///
/// // A window of 128 keys, linear biases, and one learned sink logit for each of four heads.
/// let attention = SparseAttention::new(SlidingWindow::causal(128))
///     .with_score_rule(ScoreRule::alibi(None))
///     .with_sinks([0.5, -1.0, 0.0, 2.0]);
/// assert!(attention.as_streaming().is_some());
/// ```
#[derive(Debug, Clone)]
pub struct SparseAttention<D> {
    /// Stable kebab-case name; that of the decider unless it has another.
    pub name: &'static str,
    /// Who sees whom.
    pub decider: D,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// A logit that enters the normaliser of each row and has no value: one for all query heads, or one each. Minus
    /// infinity is none.
    pub sinks: Option<Arc<[f32]>>,
    /// What happens to scaled scores before the mask.
    pub score_rule: Option<ScoreRule>,
}

/// Gradients of everything that a [`SparseAttention`] can learn.
#[derive(Debug)]
pub struct SparseGrads<'a> {
    /// Of the three inputs.
    pub qkv: QkvGrads<'a>,
    /// Of [`SparseAttention::sinks`], as many.
    pub sinks: Option<&'a mut [f32]>,
    /// Of a tensor whose elements the score mod adds to scores, as its last step.
    pub bias: Option<BiasGrad<'a>>,
}

/// The gradient of a bias.
pub struct BiasGrad<'a> {
    /// Which element each pair reads.
    pub index: &'a dyn BiasIndex,
    /// As many elements as `index` has.
    pub grad: &'a mut [f32],
}

impl std::fmt::Debug for BiasGrad<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BiasGrad").field("elements", &self.grad.len()).finish_non_exhaustive()
    }
}

impl<D: Decider> SparseAttention<D> {
    /// The decider with the default scale.
    pub fn new(decider: D) -> Self {
        Self { name: D::NAME, decider, softmax_scale: None, sinks: None, score_rule: None }
    }

    /// The same under another name.
    #[must_use]
    pub fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    /// With a logit for all query heads, or one for each, that enters the normaliser and has no value.
    ///
    /// Source: gpt-oss (OpenAI 2025); a single 0 is softmax off by one (Miller 2023).
    #[must_use]
    pub fn with_sinks(self, sinks: impl Into<Arc<[f32]>>) -> Self {
        Self { sinks: Some(sinks.into()), ..self }
    }

    /// With a score mod.
    #[must_use]
    pub fn with_score_rule(self, rule: impl Into<ScoreRule>) -> Self {
        Self { score_rule: Some(rule.into()), ..self }
    }

    /// Which pairs a call on `x` attends.
    ///
    /// # Errors
    /// Those of [`Decider::decide`].
    pub fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.decider.decide(x)
    }

    /// The scale, the score mod and the sinks for a problem.
    fn settings(&self, shape: &AttnShape) -> Result<Settings> {
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let score_mod = match &self.score_rule {
            Some(rule) => rule.score_mod(shape)?,
            None => Arc::new(Unchanged),
        };
        score_mod.check(shape)?;
        let heads = shape.n_heads_q;
        let sinks = match self.sinks.as_deref() {
            None => None,
            Some([one]) => Some(vec![*one; heads]),
            Some(each) if each.len() == heads => Some(each.to_vec()),
            Some(other) => {
                let expected = format!("1 or {heads}");
                return Err(AttnError::shape("sinks", "n_heads_q", other.len(), expected));
            }
        };
        Ok(Settings { softmax_scale, score_mod, sinks })
    }

    fn attend(&self, x: Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<Decision> {
        let settings = self.settings(&x.shape())?;
        x.check_out(&out)?;
        let decision = self.decider.decide(&x)?;
        settings.call(&decision).forward(x, out, lse)?;
        Ok(decision)
    }

    /// [`Differentiable::backward`], and the gradients of sinks and of a bias that are asked for.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn backward_all(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: SparseGrads<'_>,
    ) -> Result<()> {
        let SparseGrads { qkv, sinks: grad_sinks, bias } = grads;
        qkv.check(&x)?;
        let settings = self.settings(&x.shape())?;
        let Chosen { lse, decision } = saved.get()?;
        let sinks_len = self.sinks.as_ref().map(|sinks| sinks.len());
        if let Some(grad) = &grad_sinks
            && Some(grad.len()) != sinks_len
        {
            let expected = sinks_len.map_or("no such gradient without sinks".into(), |n| n.to_string());
            return Err(AttnError::shape("grad_sinks", "elements", grad.len(), expected));
        }
        let mut by_head = grad_sinks.as_ref().map(|_| vec![0.0; x.shape().n_heads_q]);
        let all = Grads {
            sinks: by_head.as_deref_mut(),
            bias: bias.map(|bias| (bias.index, bias.grad)),
            ..Grads::new(qkv.q, qkv.k, qkv.v)
        };
        settings.call(decision).backward(x, ForwardResult { out, lse }, grad_out, all)?;
        match (grad_sinks, by_head) {
            (Some([one]), Some(by_head)) => *one = by_head.iter().sum(),
            (Some(each), Some(by_head)) => each.copy_from_slice(&by_head),
            _ => {}
        }
        Ok(())
    }

    /// Which rows a stream keeps; `None` if a score mod asks for places that a stream forgets.
    fn kept(&self) -> Option<Kept> {
        let reads = self.score_rule.as_ref().map_or(Reads::Score, ScoreRule::reads);
        self.decider.promises().kept.filter(|kept| match reads {
            Reads::Score => true,
            Reads::Distance => kept.sinks == 0,
            Reads::Places => false,
        })
    }

    fn is_plain(&self) -> bool {
        self.sinks.is_none() && self.score_rule.is_none()
    }
}

/// What a call computes besides its pairs.
struct Settings {
    softmax_scale: f32,
    score_mod: SharedScoreMod,
    sinks: Option<Vec<f32>>,
}

impl Settings {
    fn call<'a>(&'a self, decision: &'a Decision) -> Call<'a> {
        let Self { softmax_scale, score_mod, sinks } = self;
        Call { decision, softmax_scale: *softmax_scale, score_mod: &**score_mod, sinks: sinks.as_deref() }
    }
}

impl<D: Decider> Attention for SparseAttention<D> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn profile(&self) -> Profile {
        let promises = self.decider.promises();
        Profile {
            target: if self.is_plain() { Target::SoftmaxOverChosen } else { Target::Own },
            causality: promises.causality,
            convex: self.sinks.is_none(),
            key_order_free: promises.key_order_free && self.score_rule.is_none(),
            cross_lengths: promises.cross_lengths,
            time: promises.time,
            memory: promises.memory,
            ..USUAL
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
        let Settings { score_mod, sinks, .. } = self.settings(&x.shape())?;
        let sinks: Option<Vec<f64>> = sinks.map(|sinks| sinks.into_iter().map(f64::from).collect());
        Exact {
            softmax_scale: self.softmax_scale.map(f64::from),
            mask: decision.mask(),
            score_mod: &*score_mod,
            sinks: sinks.as_deref(),
            ..Exact::default()
        }
        .all(x)
    }

    /// Not with sinks: each part of a split row would count them.
    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        self.sinks.is_none().then_some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.kept().map(|_| self as &dyn Streaming)
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
        self.backward_all(x, out, saved, grad_out, SparseGrads { qkv: grads, sinks: None, bias: None })
    }
}

impl<D: Decider> Streaming for SparseAttention<D> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let Some(kept) = self.kept() else {
            return Err(AttnError::unsupported(self.name, "streaming in this configuration"));
        };
        match self.decider.memory(&shape) {
            Some(memory) => Ok(Box::new(RememberingStream::start(self.clone(), memory, shape)?)),
            None => CachedStream::start(self.clone(), shape, kept),
        }
    }
}

impl<D: Decider> SparseAttention<D> {
    /// Attends pairs that are decided already, by [`Decider::decide`] or a [`Memory`](crate::Memory) of a cache that the
    /// caller keeps.
    ///
    /// # Errors
    /// [`AttnError`] if the decision, `out` or `lse` do not fit `x`; nothing has then been written.
    pub fn attend_decided(
        &self,
        decision: &Decision,
        x: Qkv<'_>,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.settings(&x.shape())?.call(decision).forward(x, out, lse)
    }
}
