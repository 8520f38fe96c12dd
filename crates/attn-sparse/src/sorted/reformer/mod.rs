//! Reformer: tokens are hashed into buckets, sorted by bucket, and attend the chunk of the sorted order that they stand in
//! and the chunk before it; several rounds with different hashes are merged.
//!
//! For round `r` of `n_hashes`, with random rotations `R_r [head_dim, n_buckets / 2]`:
//!
//! ```text
//! bucket(x) = argmax [x R_r, -x R_r]                      several factors of buckets: one argmax each, as digits
//! order_r   = tokens by (bucket, position), cut into chunks of bucket_size
//! out_i     = sum_r e^(lse_ri - lse_i) sum_{j in chunk(i), chunk(i) - 1} e^(s_ij - lse_ri) v_j
//! lse_i     = ln sum_r e^lse_ri
//! ```
//!
//! The chunk before the first one of a round is the last one of the round before it; before the first of all comes the last of
//! all. Where buckets do not fill the last chunk of a round, it is shorter.
//!
//! - `shared_qk`, as in the paper: queries are also the keys, scaled to unit length (the keys given are not read), and the score of
//!   a token with itself is a large negative constant, so that it counts only where nothing else is seen.
//! - Otherwise queries and keys are hashed with the same rotations and sorted apart, and chunk `c` of queries attends chunks `c`
//!   and `c - 1` of keys (clusters of equal size, as in SMYRF, Daras et al. 2020).
//! - A pair that is met `c` times counts `c`-fold, as in the paper's implementation, or once: `-ln c` is added to its score. Once,
//!   the result is that of the paper's `N_ij`, which counts the rounds whose sets hold the pair: softmax over the union of all
//!   rounds' pairs. Pairs met through the wrap to the round before are in that union, and counted where they are met.
//!
//! **Not strictly causal**, also with the causal mask: no later key is attended, but which keys share a chunk depends on all
//! tokens of the sequence.
//!
//! Cost: `2 n_hashes n bucket_size` pairs, and `n n_hashes` hashes of `2 head_dim` FLOPs times half the sum of the factors of
//! `n_buckets`; memory `O(n)` for each hash.
//!
//! Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020. The hash: Andoni et al. 2015. Factors of
//! buckets: the authors' trax.

mod backward;
mod buckets;
mod chunks;
mod definition;
mod forward;
mod hashing;
mod order;

pub use hashing::Hashing;

use super::self_score::SelfScore;
use crate::profile::USUAL;
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv,
    QkvGrads, Result, Saved, SoftmaxAttention, Target, TensorView, check_lse, softmax_flops,
    softmax_scale_or_default,
};
use chunks::Unit;

/// Attention inside chunks of hashed and sorted tokens; see the module's formulas.
#[derive(Debug, Clone, PartialEq)]
pub struct Reformer {
    /// Tokens of a chunk.
    pub bucket_size: usize,
    /// Rounds.
    pub n_hashes: usize,
    /// Buckets of a round, as factors that are each even; empty chooses about `n / bucket_size`, in factors of at most 32.
    pub n_buckets: Vec<usize>,
    /// No key after the query is attended. Not strict: see the module.
    pub causal: bool,
    /// Whether tokens of one chunk see each other although their buckets differ.
    pub attend_across_buckets: bool,
    /// Whether a pair that several rounds meet counts several times.
    pub allow_duplicate_attention: bool,
    /// Whether keys are the queries, scaled to unit length; the keys given are then not read.
    pub shared_qk: bool,
    /// With `shared_qk`, the score of a token with itself.
    pub self_logit: f32,
    /// What rotations are drawn with.
    pub seed: u64,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for Reformer {
    /// Chunks of 64, 4 rounds, queries and keys apart.
    fn default() -> Self {
        Self {
            bucket_size: 64,
            n_hashes: 4,
            n_buckets: Vec::new(),
            causal: false,
            attend_across_buckets: true,
            allow_duplicate_attention: true,
            shared_qk: false,
            self_logit: -5e4,
            seed: 0,
            softmax_scale: None,
        }
    }
}

/// What the backward pass needs: the order of all rounds, and each round's log-sum-exps.
struct Rounds {
    units: Vec<Unit>,
    n_buckets: usize,
    self_score: SelfScore,
    /// `[batch * n_heads_q, n_hashes, n]`.
    lse: Vec<f32>,
}

impl Reformer {
    /// The name in the registry.
    pub const NAME: &'static str = "reformer-lsh";

    fn check(&self, x: &Qkv<'_>) -> Result<f32> {
        let shape = x.shape();
        if shape.n_q != shape.n_kv {
            return Err(AttnError::shape("k", "n_kv", shape.n_kv, format!("{} (n_q)", shape.n_q)));
        }
        if self.bucket_size == 0 || self.n_hashes == 0 {
            let name = if self.bucket_size == 0 { "bucket_size" } else { "n_hashes" };
            return Err(AttnError::value(name, 0, "at least 1"));
        }
        if let Some(odd) = self.n_buckets.iter().find(|f| **f == 0 || !f.is_multiple_of(2)) {
            return Err(AttnError::value("n_buckets", odd, "positive even factors"));
        }
        let slots = shape.n_q.div_ceil(self.bucket_size).checked_mul(self.bucket_size);
        let buckets = self.factors(shape.n_q).iter().try_fold(self.n_hashes, |all, f| all.checked_mul(*f));
        if slots.is_none_or(|n| n >= i32::MAX as usize) || buckets.is_none_or(|n| n >= i32::MAX as usize) {
            return Err(AttnError::shape("q", "n_q", shape.n_q, "fewer than 2^31 slots and buckets"));
        }
        if self.self_logit.is_nan() {
            return Err(AttnError::value("self_logit", self.self_logit, "a number"));
        }
        softmax_scale_or_default(self.softmax_scale, shape.head_dim)
    }

    /// Factors of the number of buckets at length `n`.
    fn factors(&self, n: usize) -> Vec<usize> {
        if !self.n_buckets.is_empty() {
            return self.n_buckets.clone();
        }
        let wanted = n.div_ceil(self.bucket_size.max(1)).max(2) as f64;
        let n_factors = (wanted.ln() / 32f64.ln() - 1e-9).ceil().max(1.0);
        let factor = wanted.powf(1.0 / n_factors) - 1e-9;
        vec![(factor / 2.0).ceil() as usize * 2; n_factors as usize]
    }

    /// Attends with hashes that are given or drawn; writes `out` and, if given, `lse [batch, n_heads_q, n]`.
    ///
    /// # Errors
    /// [`AttnError`] for `n_q != n_kv`, settings or tensors that do not fit; nothing has then been written.
    pub fn forward_with(
        &self,
        x: Qkv<'_>,
        hashing: Hashing<'_>,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.attend(x, hashing, out, lse, false).map(drop)
    }

    fn attend(
        &self,
        x: Qkv<'_>,
        hashing: Hashing<'_>,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
        keep: bool,
    ) -> Result<Rounds> {
        let softmax_scale = self.check(&x)?;
        x.check_out(&out)?;
        if let Some(lse) = &lse {
            check_lse(lse, &x.shape())?;
        }
        let hashing = hashing.resolve(self, &x)?;
        forward::Forward { config: self, x, softmax_scale, hashing, keep }.run(out, lse)
    }

    /// As [`Reformer::forward_with`], keeping what [`Differentiable::backward`] needs.
    ///
    /// # Errors
    /// As [`Reformer::forward_with`].
    pub fn forward_saving_with(&self, x: Qkv<'_>, hashing: Hashing<'_>, out: OutMut<'_>) -> Result<Saved> {
        Ok(Saved::new(self.attend(x, hashing, out, None, true)?))
    }

    /// The bucket of every token in every round, `[batch, heads, n_hashes, n]` of the heads of `q` or `k` as `rows`.
    ///
    /// # Errors
    /// As [`Reformer::forward_with`].
    pub fn buckets(&self, x: &Qkv<'_>, of_keys: bool, hashing: Hashing<'_>) -> Result<Vec<i32>> {
        self.check(x)?;
        let hashing = hashing.resolve(self, x)?;
        let rows = if of_keys { x.k() } else { x.q() };
        let [batch, heads, ..] = rows.shape();
        let at = (0..batch).flat_map(|b| (0..heads).map(move |h| [b, h]));
        Ok(at.flat_map(|at| hashing.buckets(rows, at, of_keys)).collect())
    }

    /// The definition in f64 over the same chunks.
    ///
    /// # Errors
    /// As [`Reformer::forward_with`].
    pub fn definition_with(&self, x: &Qkv<'_>, hashing: Hashing<'_>) -> Result<Reference> {
        let softmax_scale = f64::from(self.check(x)?);
        let hashing = hashing.resolve(self, x)?;
        Ok(definition::definition(self, x, softmax_scale, &hashing))
    }
}

impl Attention for Reformer {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn profile(&self) -> Profile {
        Profile {
            target: Target::SoftmaxApproximately,
            causality: if self.causal { Causality::Masked } else { Causality::Bidirectional },
            cross_lengths: false,
            max_error: 6e-6,
            time: Growth::Linearithmic,
            ..USUAL
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let (heads, n) = (crate::heads(shape), shape.n_q as u64);
        let (rounds, sides) = (self.n_hashes as u64, 2 - u64::from(self.shared_qk));
        let columns: usize = self.factors(shape.n_q).iter().map(|f| f / 2).sum();
        let pairs = heads * n * rounds * (2 * self.bucket_size).min(shape.n_kv) as u64;
        let hashes = heads * sides * n * rounds * 2 * (columns * shape.head_dim) as u64;
        let entries = forward::entries(shape) as u64;
        let widths = (shape.head_dim + shape.head_dim_v) as u64;
        // Buckets, orders and places; gathered rows; merged rows.
        let per_token = 4 * (3 * rounds * sides + 3 * widths + 3);
        Cost::of(shape, dtype, softmax_flops(pairs, shape) + hashes, entries * n * per_token)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.forward_with(x, Hashing::Drawn, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.definition_with(x, Hashing::Drawn)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl SoftmaxAttention for Reformer {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.forward_with(x, Hashing::Drawn, out, Some(lse))
    }
}

impl Differentiable for Reformer {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.forward_saving_with(x, Hashing::Drawn, out)
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let softmax_scale = self.check(&x)?;
        grads.check(&x)?;
        for (name, tensor) in [("out", &out), ("grad_out", &grad_out)] {
            attn_core::check_like(name, tensor.shape(), tensor.dtype(), x.q(), x.shape().head_dim_v)?;
        }
        let rounds = saved.get()?;
        backward::Backward { config: self, x, softmax_scale, out, grad_out, rounds }.run(grads)
    }
}
