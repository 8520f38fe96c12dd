//! One call of exact attention with everything it may take besides q, k and v.

use crate::Flash;
use crate::engine::{ForwardResult, Grads, HalfProducts, OutputGrad, Problem, Spec, attend, attend_backward};
use attn_core::dropout::Dropout;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{And, BandPerBatch, Mask, Pair, Predicate, SeeAll};
use attn_core::qk_norm::QkNorm;
use attn_core::score::{ScoreFn, ScoreMod, SoftCap, Then, Unchanged};
use attn_core::{AttnShape, OutMut, Qkv, Result, softmax_scale_or_default};

/// [`Flash`] with masks, score mods and further tensors; made by [`Flash::call`].
///
/// Masks compose: a pair must be seen by the configured band and by every mask added. Score mods run one after the other,
/// behind the soft cap. Both may be closures; they are compiled into the kernel.
///
/// ```
/// use attn_core::{Qkv, View, ViewMut};
/// use attn_flash::Flash;
///
/// let (heads, n, d) = (2, 6, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let (mut out, mut lse) = (vec![0.0; x.len()], vec![0.0; heads * n]);
///
/// // Causal, every second key, scores that fade with the distance, a sink for each head.
/// let call = Flash::causal()
///     .call()
///     .mask_fn(|p| (p.i + p.j) % 2 == 0)
///     .score_fn(|s, p| s - 0.1 * p.i.abs_diff(p.j) as f32)
///     .sinks(&[0.0, 1.0]);
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// call.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into(), Some(&mut lse))?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct FlashCall<'a, M = SeeAll, C = Unchanged> {
    flash: Flash,
    mask: M,
    score_mod: C,
    key_bias: Option<&'a [f32]>,
    sinks: Option<&'a [f32]>,
    dropout: Option<Dropout<'a>>,
    qk_norm: Option<QkNorm<'a>>,
}

impl FlashCall<'_> {
    pub(crate) fn new(flash: Flash) -> Self {
        Self {
            flash,
            mask: SeeAll,
            score_mod: Unchanged,
            key_bias: None,
            sinks: None,
            dropout: None,
            qk_norm: None,
        }
    }
}

impl<'a, M: Mask, C: ScoreMod> FlashCall<'a, M, C> {
    /// A pair must also be seen by `mask`.
    pub fn mask<N: Mask>(self, mask: N) -> FlashCall<'a, And<M, N>, C> {
        let Self { flash, mask: first, score_mod, key_bias, sinks, dropout, qk_norm } = self;
        FlashCall { flash, mask: And(first, mask), score_mod, key_bias, sinks, dropout, qk_norm }
    }

    /// Scores also go through `score_mod`, behind the soft cap and the score mods added before.
    pub fn score_mod<D: ScoreMod>(self, score_mod: D) -> FlashCall<'a, M, Then<C, D>> {
        let Self { flash, mask, score_mod: first, key_bias, sinks, dropout, qk_norm } = self;
        FlashCall { flash, mask, score_mod: Then(first, score_mod), key_bias, sinks, dropout, qk_norm }
    }

    /// A pair must also satisfy `sees`: the user's own mask, compiled into the kernel.
    pub fn mask_fn<F: Fn(Pair) -> bool + Sync>(self, sees: F) -> FlashCall<'a, And<M, Predicate<F>>, C> {
        self.mask(Predicate(sees))
    }

    /// Scores also go through `score`, `(score, pair) -> score`, compiled into the kernel. For gradients use
    /// [`FlashCall::score_mod`] with an [`attn_core::score::ScoreFnWithDerivative`].
    pub fn score_fn<F>(self, score: F) -> FlashCall<'a, M, Then<C, ScoreFn<F>>>
    where
        F: Fn(f32, Pair) -> f32 + Sync,
    {
        self.score_mod(ScoreFn(score))
    }

    /// Added to the score of each key, `[n_kv]` or `[batch, n_heads_kv, n_kv]`.
    pub fn key_bias(self, key_bias: &'a [f32]) -> Self {
        Self { key_bias: Some(key_bias), ..self }
    }

    /// A logit for each query head that enters the normaliser and has no value, `[n_heads_q]`; neither scaled nor capped.
    /// The log-sum-exp includes it.
    ///
    /// Sources: Xiao et al. 2023; OpenAI 2025 (gpt-oss).
    pub fn sinks(self, sinks: &'a [f32]) -> Self {
        Self { sinks: Some(sinks), ..self }
    }

    /// Drops weights at random, after the normaliser; the log-sum-exp is without dropout.
    pub fn dropout(self, dropout: Dropout<'a>) -> Self {
        Self { dropout: Some(dropout), ..self }
    }

    /// Normalises queries and keys row by row before the product.
    pub fn qk_norm(self, qk_norm: QkNorm<'a>) -> Self {
        Self { qk_norm: Some(qk_norm), ..self }
    }

    /// How the forward pass multiplies bf16 and f16.
    pub fn half_products(self, half_products: HalfProducts) -> Self {
        Self { flash: Flash { half_products, ..self.flash }, ..self }
    }

    /// Attends `problem` and writes `out (batch, n_heads_q, n_q, head_dim_v)`, and `lse [batch, n_heads_q, n_q]` (natural
    /// log) if given. A `Qkv` is a problem; so are packed sequences, caches and pages, see [`Problem`].
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward<'p>(
        &self,
        problem: impl Into<Problem<'p>>,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let problem = problem.into();
        self.with_spec(&problem, |spec| attend(problem, out, lse, spec))
    }

    /// Writes the gradients of a loss, given those with respect to the output and the log-sum-exps that
    /// [`FlashCall::forward`] gave for the same problem; see [`attend_backward`].
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the argument that does not fit, or what has no gradient; nothing has then been
    /// written.
    pub fn backward<'p>(
        &self,
        problem: impl Into<Problem<'p>>,
        forward: ForwardResult<'_>,
        grad: OutputGrad<'_>,
        grads: Grads<'_>,
    ) -> Result<()> {
        let problem = problem.into();
        self.with_spec(&problem, |spec| attend_backward(problem, forward, grad, grads, spec))
    }

    /// The same call with borrowed masks and score mods, for adding to it.
    #[cfg(feature = "candle")]
    pub(crate) fn by_ref(&self) -> FlashCall<'a, &M, &C> {
        let Self { flash, mask, score_mod, key_bias, sinks, dropout, qk_norm } = self;
        FlashCall {
            flash: *flash,
            mask,
            score_mod,
            key_bias: *key_bias,
            sinks: *sinks,
            dropout: *dropout,
            qk_norm: *qk_norm,
        }
    }

    /// Where query 0 of each sequence stands on its key axis.
    #[cfg(feature = "candle")]
    pub(crate) fn offsets(&self, problem: &Problem<'_>) -> Vec<isize> {
        self.flash.offsets(problem)
    }

    /// Hands the kernel's specification of this call on `problem` to `run`.
    fn with_spec<R>(
        &self,
        problem: &Problem<'_>,
        run: impl FnOnce(&Spec<'_, And<Option<BandPerBatch>, &M>, Then<Option<SoftCap>, &C>>) -> Result<R>,
    ) -> Result<R> {
        let softmax_scale = softmax_scale_or_default(self.flash.softmax_scale, problem.shape().head_dim)?;
        let mask = And(self.flash.bands(problem)?, &self.mask);
        let score_mod = Then(self.flash.softcap()?, &self.score_mod);
        run(&Spec {
            key_bias: self.key_bias,
            sinks: self.sinks,
            dropout: self.dropout,
            qk_norm: self.qk_norm,
            tiles: self.flash.tiles,
            half_products: self.flash.half_products,
            ..Spec::new(softmax_scale, &mask, &score_mod)
        })
    }

    /// The definition of the same call in f64, slow on purpose.
    ///
    /// # Errors
    /// As [`FlashCall::forward`].
    pub fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let sinks: Option<Vec<f64>> = self.sinks.map(|s| s.iter().map(|x| f64::from(*x)).collect());
        let mask = And(self.flash.band(&x.shape()), &self.mask);
        let score_mod = Then(self.flash.softcap()?, &self.score_mod);
        let exact = Exact {
            softmax_scale: self.flash.softmax_scale.map(f64::from),
            mask: &mask,
            score_mod: &score_mod,
            key_bias: self.key_bias,
            sinks: sinks.as_deref(),
            dropout: self.dropout,
            qk_norm: self.qk_norm,
        };
        exact.all(x)
    }
}

impl Flash {
    /// A call with masks, score mods and further tensors besides this configuration.
    pub fn call(&self) -> FlashCall<'static> {
        FlashCall::new(*self)
    }

    /// Where query 0 of each sequence stands on its key axis.
    fn offsets(&self, problem: &Problem<'_>) -> Vec<isize> {
        let offset = |s| self.align.offset(problem.q_range(s).len(), problem.kv_range(s).len());
        (0..problem.n_sequences()).map(offset).collect()
    }

    /// The visible band of each sequence, or `None` if everything is visible.
    fn bands(&self, problem: &Problem<'_>) -> Result<Option<BandPerBatch>> {
        let shape = problem.shape();
        // An empty problem may have any number of sequences.
        let Some(band) = self.band(&shape).filter(|_| shape.rows() > 0) else { return Ok(None) };
        let offsets = self.offsets(problem);
        let sequences = AttnShape { batch: offsets.len(), ..shape };
        BandPerBatch::new(offsets, band.left, band.right, &sequences).map(Some)
    }
}
