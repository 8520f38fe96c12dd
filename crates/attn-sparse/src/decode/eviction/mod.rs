//! Eviction: a cache of keys and values that keeps, of every text, no more positions than a budget.
//!
//! An [`EvictionPolicy`] says what a cached position is worth and which ones must stay. It is used in two ways.
//!
//! **Token by token** ([`KvEviction`] as an [`Attention`], and as a stream). For each key/value head, with `S` the positions
//! held:
//!
//! ```text
//! A(t) = S_(t-1) + {t}                       the query at t attends what is held, and itself
//! S_t  = A(t) without what is worth least,   as long as more than `budget` positions are held
//! ```
//!
//! What a position is worth is learned from the weights of the queries so far over what they saw. So key `j` is seen by the
//! queries from `j` to its last one, the choice is strictly causal, the pieces in which a text comes do not matter, and
//! time is `O(n * budget)`, memory `O(budget)`.
//!
//! **After a prompt** ([`KvEviction::compress`], [`KvEviction::prefill`]). The prompt attends densely; then the weights of its
//! queries decide at once which positions survive, and the next queries see these ([`KvEviction::attend`]), or the stream
//! goes on from them token by token.
//!
//! Of equal positions the earlier one stays. Gradients flow through the pairs attended; the choice has none.
//!
//! Sources: Zhang et al., "H2O: Heavy-Hitter Oracle", 2023; Li et al., "SnapKV", 2024; Oren et al., "Transformers are
//! Multi-State RNNs" (TOVA), 2024; Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024; Devoto et
//! al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024; Park et al., "KeyDiff", 2025; Feng et
//! al., "Ada-KV", 2024; Xiao et al., "DuoAttention", 2025.

mod lifetimes;
mod mass;
mod policy;
mod row_product;
mod slots;
mod step;
mod stream;
#[cfg(test)]
mod tests;
mod worth;

use crate::attend::Call;
use crate::profile::USUAL;
use crate::{BlockSizes, Builder, Decision};
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Align, Band};
use attn_core::registry::output_like;
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnError, AttnShape, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv, QkvGrads,
    Result, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, band_pairs,
    check_lse, softmax_flops, softmax_scale_or_default,
};
use attn_flash::engine::{ForwardResult, Grads};
use lifetimes::Lifetimes;
pub use policy::{EvictionPolicy, Importance, Pooling, Share, pyramid_budgets};
pub use stream::EvictionStream;
pub use worth::Survivors;

/// Softmax attention over a cache that a policy holds down to a budget.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_sparse::{EvictionPolicy, KvEviction};
///
/// let prompt: Vec<f32> = (0..40 * 8).map(|x| (x as f32 * 0.7).sin()).collect();
/// let view = |shape| View::contiguous("x", &prompt[..shape_len(shape)], shape);
/// # fn shape_len(shape: [usize; 4]) -> usize { shape.iter().product() }
/// let x = Qkv::new(view([1, 1, 40, 8])?, view([1, 1, 40, 8])?, view([1, 1, 40, 8])?)?;
/// let eviction = KvEviction::new(EvictionPolicy::snap_kv(4, 5, 16));
/// let survivors = eviction.compress(&x)?;
/// assert_eq!(survivors.positions[0].len(), 16);
///
/// // The next query attends the survivors.
/// let next = Qkv::new(view([1, 1, 1, 8])?, *x.k(), *x.v())?;
/// let mut out = [0.0; 8];
/// eviction.attend(next, &survivors, ViewMut::contiguous("out", &mut out, [1, 1, 1, 8])?.into(), None)?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct KvEviction {
    /// What is kept.
    pub policy: EvictionPolicy,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl KvEviction {
    /// Its name in the registry.
    pub const NAME: &'static str = "kv-eviction";

    /// The policy with the default scale.
    pub fn new(policy: EvictionPolicy) -> Self {
        Self { policy, softmax_scale: None }
    }

    fn scale(&self, x: &Qkv<'_>) -> Result<f32> {
        softmax_scale_or_default(self.softmax_scale, x.shape().head_dim)
    }

    /// What survives of a prompt after dense causal attention, whose last query stands at its last key. There may be fewer
    /// queries than keys: then theirs are the weights that count.
    ///
    /// Time: `O(n_kv)` rows for the weights that the policy asks for (all queries for H2O, the last ones for SnapKV and TOVA,
    /// none for the others); memory `O(n_kv)`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for more queries than keys, or none where weights count; as [`EvictionPolicy::check`].
    pub fn compress(&self, x: &Qkv<'_>) -> Result<Survivors> {
        worth::survivors(&self.policy, x, self.scale(x)?)
    }

    /// The queries of `x`, which come after its keys, attend the survivors.
    ///
    /// # Errors
    /// [`AttnError`] if `out`, `lse` or the survivors do not fit; nothing has then been written.
    pub fn attend(
        &self,
        x: Qkv<'_>,
        survivors: &Survivors,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let (shape, softmax_scale) = (x.shape(), self.scale(&x)?);
        let (found, expected) = (survivors.positions.len(), shape.batch * shape.n_heads_kv);
        if found != expected {
            return Err(AttnError::shape("survivors", "batch * n_heads_kv", found, expected));
        }
        x.check_out(&out)?;
        if let Some(lse) = &lse {
            check_lse(lse, &shape)?;
        }
        if shape.rows() == 0 {
            return Ok(());
        }
        let sizes = BlockSizes { q: shape.n_q, kv: 1 };
        let builder = Builder::new(&shape, sizes).per_batch().per_head(shape.n_heads_kv);
        let kept =
            |batch: usize, head: usize, _| survivors.positions[batch * shape.n_heads_kv + head].clone();
        let decision = Decision::from(builder.from_rows(kept)?);
        Call { decision: &decision, softmax_scale, score_mod: &Unchanged, sinks: None }.forward(x, out, lse)
    }

    /// A prompt: dense causal attention, of which the policy's survivors start a stream.
    ///
    /// The stream goes on as if its mass came from the dense weights; the last queries of SnapKV count as so many of their
    /// mean.
    ///
    /// # Errors
    /// As [`KvEviction::compress`]; [`AttnError`] if `out` does not fit.
    pub fn prefill(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<EvictionStream> {
        let (shape, softmax_scale) = (x.shape(), self.scale(&x)?);
        x.check_out(&out)?;
        let mut stream = EvictionStream::start(&self.policy, softmax_scale, StreamShape::of(&x))?;
        let survivors = self.compress(&x)?;
        let causal = Band::causal(&shape, Align::BottomRight);
        let decision = Decision::new(causal);
        Call { decision: &decision, softmax_scale, score_mod: &Unchanged, sinks: None }
            .forward(x, out, None)?;
        stream.seed(&x, &survivors);
        Ok(stream)
    }

    /// Which pairs a call on `x` attends: key `j` from query `j` to the last that sees it.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        let mut out = output_like(x);
        Ok(Decision::new(self.run(x, out.as_out()?, None)?))
    }

    /// A stream over all of `x`, checked.
    fn start_over(&self, x: &Qkv<'_>, out: &OutMut<'_>, lse: Option<&[f32]>) -> Result<EvictionStream> {
        let s = x.shape();
        if s.n_q != s.n_kv {
            return Err(AttnError::shape(
                "k",
                "n_kv",
                s.n_kv,
                format!("{} (as n_q: every position asks)", s.n_q),
            ));
        }
        x.check_out(out)?;
        if let Some(lse) = lse {
            check_lse(lse, &s)?;
        }
        if s.n_heads_kv == 0 {
            let none = StreamShape { n_heads_q: 1, n_heads_kv: 1, batch: 0, ..StreamShape::of(x) };
            return EvictionStream::start(&self.policy, self.scale(x)?, none);
        }
        EvictionStream::start(&self.policy, self.scale(x)?, StreamShape::of(x))
    }

    /// Attends and remembers who saw whom.
    fn run(&self, x: &Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<Lifetimes> {
        let mut stream = self.start_over(x, &out, lse.as_deref())?;
        stream.remember_deaths();
        stream.walk(x, out, lse);
        Ok(Lifetimes::new(x.shape(), stream.into_deaths()))
    }
}

impl Attention for KvEviction {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn profile(&self) -> Profile {
        let dense = !self.policy.full_heads.is_empty();
        // Where weights count, a query has a say in what later ones see: its row is not all that it reaches.
        let target = match self.policy.importance {
            Importance::Recency | Importance::KeyNorm | Importance::KeyDifference => {
                Target::SoftmaxOverChosen
            }
            _ => Target::SoftmaxApproximately,
        };
        Profile {
            target,
            cross_lengths: false,
            time: if dense { Growth::Quadratic } else { Growth::Linear },
            memory: if dense { Growth::Linear } else { Growth::Constant },
            ..USUAL
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let causal = Band::causal(shape, Align::BottomRight);
        let group = shape.group_size() as u64;
        let (mut pairs, mut slots) = (0, 0);
        for head in 0..shape.n_heads_kv {
            let keeps_all = self.policy.keeps_all(head);
            let left = if keeps_all { None } else { Some(self.policy.budget) };
            pairs += group * band_pairs(shape, &Band { left, ..causal });
            slots +=
                if keeps_all { shape.n_kv } else { self.policy.budget.saturating_add(1).min(shape.n_kv) };
        }
        let batch = shape.batch as u64;
        let window = match self.policy.importance {
            Importance::WindowMass { window, .. } => window,
            _ => 0,
        };
        let floats = (shape.head_dim + shape.head_dim_v + shape.group_size() + window + 9) as u64;
        // The cosine of every key held, once a group.
        let learned = match self.policy.importance {
            Importance::KeyDifference => batch * pairs / group * 2 * shape.head_dim as u64,
            _ => 0,
        };
        let flops = softmax_flops(batch * pairs, shape) + learned;
        Cost::of(shape, dtype, flops, batch * slots as u64 * floats * 4)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.start_over(&x, &out, None)?.walk(&x, out, None);
        Ok(())
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let decision = self.decide(x)?;
        let softmax_scale = self.softmax_scale.map(f64::from);
        Exact { softmax_scale, mask: decision.mask(), ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        Some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl SoftmaxAttention for KvEviction {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.start_over(&x, &out, Some(lse))?.walk(&x, out, Some(lse));
        Ok(())
    }
}

/// What the backward pass needs.
struct Seen {
    lse: Vec<f32>,
    decision: Decision,
}

impl Differentiable for KvEviction {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        let mut lse = vec![0.0; x.shape().rows()];
        let decision = Decision::new(self.run(&x, out, Some(&mut lse))?);
        Ok(Saved::new(Seen { lse, decision }))
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
        let Seen { lse, decision } = saved.get()?;
        let call = Call { decision, softmax_scale: self.scale(&x)?, score_mod: &Unchanged, sinks: None };
        let grads = Grads::new(grads.q, grads.k, grads.v);
        call.backward(x, ForwardResult { out, lse }, grad_out, grads)
    }
}

impl Streaming for KvEviction {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        Ok(Box::new(EvictionStream::start(&self.policy, softmax_scale, shape)?))
    }
}
