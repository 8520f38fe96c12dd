//! Low-rank compositions as attention over q, k and v.

use super::tensor::Tensor;
use crate::recomputed::{Recomputed, differentiable, store};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, Result, Target, TensorView, softmax_flops,
};

/// One head of a definition, f64, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Head64<'a> {
    /// `[n_q, head_dim]`.
    pub q: &'a [f64],
    /// `[n_kv, head_dim]`.
    pub k: &'a [f64],
    /// `[n_kv, head_dim_v]`.
    pub v: &'a [f64],
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values.
    pub head_dim_v: usize,
}

/// Softmax attention through few summaries of the keys.
pub trait LowRank: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// Summaries of a problem.
    fn rank(&self, shape: &AttnShape) -> usize;

    /// Softmax calls: through how many products of `n x rank` scores the output comes.
    const CALLS: u64;

    /// Accepts `n_q != n_kv`.
    const CROSS_LENGTHS: bool;

    /// Outputs are averages of the values.
    const CONVEX: bool;

    /// [`Profile::max_error`].
    fn max_error(&self) -> f64 {
        1e-5
    }

    /// Checks the options for a problem.
    ///
    /// # Errors
    /// [`AttnError`] naming the option.
    fn check(&self, shape: &AttnShape) -> Result<()>;

    /// The definition of one head.
    fn define(&self, head: Head64<'_>) -> Vec<f64>;
}

/// The computation itself, on f32.
pub(crate) trait Compose: LowRank {
    fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// Gradients by q, k and v.
    fn run_back(&self, qkv: [&Tensor; 3], by: &Tensor) -> Result<[Tensor; 3]>;
}

/// A [`LowRank`] variant as an [`Attention`]. Not causal: a summary mixes keys of all positions.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16. Time and memory are
/// linear in the length: the inputs are copied to f32.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::low_rank::{Linformer, LowRankAttention};
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = LowRankAttention::new(Linformer::default());
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankAttention<V> {
    /// What is computed.
    pub variant: V,
}

impl<V: LowRank> LowRankAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        if !V::CROSS_LENGTHS && s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        self.variant.check(s)
    }
}

fn is_empty(s: &AttnShape) -> bool {
    s.rows() == 0 || s.n_kv == 0
}

#[allow(private_bounds, reason = "which variants there are is closed")]
impl<V: Compose> Attention for LowRankAttention<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::SoftmaxApproximately,
            causality: Causality::Bidirectional,
            convex: V::CONVEX,
            key_order_free: false,
            cross_lengths: V::CROSS_LENGTHS,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: self.variant.max_error(),
            time: Growth::Linear,
            memory: Growth::Linear,
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let (rank, heads) = (self.variant.rank(s) as u64, (s.batch * s.n_heads_q) as u64);
        let pairs = rank * s.n_q.max(s.n_kv) as u64;
        let floats: usize = [s.q(), s.k(), s.v(), s.out()].iter().map(|a| a.iter().product::<usize>()).sum();
        Cost::of(s, dtype, heads * V::CALLS * softmax_flops(pairs, s), 4 * floats as u64)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        let s = x.shape();
        self.check(&s)?;
        x.check_out(&out)?;
        if is_empty(&s) {
            store(out, &vec![0.0; s.out().iter().product()]);
            return Ok(());
        }
        let got = self.variant.run(&Tensor::of(x.q()), &Tensor::of(x.k()), &Tensor::of(x.v()))?;
        store(out, &got.data);
        Ok(())
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        self.check(&s)?;
        if is_empty(&s) {
            return Ok(Reference { out: vec![0.0; s.out().iter().product()], lse: None });
        }
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = s.kv_head(head);
                let (q, k) = (x.q().head_f64(batch, head), x.k().head_f64(batch, kv));
                let v = x.v().head_f64(batch, kv);
                let (head_dim, head_dim_v) = (s.head_dim, s.head_dim_v);
                out.extend(self.variant.define(Head64 { q: &q, k: &k, v: &v, head_dim, head_dim_v }));
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

differentiable!(impl <V: Compose> for LowRankAttention<V>);

impl<V: Compose> Recomputed for LowRankAttention<V> {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        let s = x.shape();
        self.check(&s)?;
        attn_core::check_like("grad_out", grad_out.shape(), x.dtype(), x.q(), s.head_dim_v)?;
        let [q, k, v] = [x.q(), x.k(), x.v()].map(Tensor::of);
        let all = if is_empty(&s) {
            [s.q(), s.k(), s.v()].map(Tensor::zeros)
        } else {
            self.variant.run_back([&q, &k, &v], &Tensor::of(&grad_out))?
        };
        Ok(all.map(|grad| grad.data))
    }
}
