//! Scans as attention over q, k and v: forward, stream, gradients.

use super::driver::{backward, forward, workspace_bytes};
use super::{Cell, ScanState, Tokens};
use crate::recomputed::{Recomputed, differentiable};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, Result, StreamShape, StreamState, Streaming, Target, TensorView,
};

/// What a scan makes of q, k and v alone: a cell with the constants of its configuration.
pub trait ScanVariant: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// Runs it; reads q, k and v in this order.
    type Cell: Cell + 'static;

    /// The cell for such heads.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that makes no sense.
    fn cell(&self, n_heads_q: usize, head_dim: usize, head_dim_v: usize) -> Result<Self::Cell>;

    /// The definition of one head in f64: `q [n, head_dim]`, `k [n, head_dim]`, `v [n, head_dim_v]` to `[n, head_dim_v]`.
    fn define(&self, head: HeadInputs<'_>) -> Vec<f64>;

    /// Floating-point operations a token and head.
    fn flops(&self, head_dim: usize, head_dim_v: usize) -> usize;

    /// Outputs are averages of the values seen.
    fn is_convex(&self) -> bool {
        false
    }

    /// [`Profile::max_error`].
    fn max_error(&self) -> f64 {
        4e-6
    }
}

/// One head in f64, row-major.
#[derive(Debug, Clone, Copy)]
pub struct HeadInputs<'a> {
    /// Which query head.
    pub head: usize,
    /// Query heads of the problem.
    pub n_heads_q: usize,
    /// `[n, head_dim]`.
    pub q: &'a [f64],
    /// `[n, head_dim]`.
    pub k: &'a [f64],
    /// `[n, head_dim_v]`.
    pub v: &'a [f64],
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values.
    pub head_dim_v: usize,
}

impl HeadInputs<'_> {
    /// Query, key and value of token `t` in value channel `c`: beyond `head_dim` queries and keys start over.
    pub fn channel(&self, t: usize, c: usize) -> [f64; 3] {
        let at = t * self.head_dim + c % self.head_dim;
        [self.q[at], self.k[at], self.v[t * self.head_dim_v + c]]
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.v.len() / self.head_dim_v
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.v.is_empty()
    }
}

/// A [`ScanVariant`] as an [`Attention`]: causal, of equally many queries and keys.
///
/// Shapes: `q [batch, n_heads_q, n, head_dim]`, `k [batch, n_heads_kv, n, head_dim]`, `v [batch, n_heads_kv, n, head_dim_v]`,
/// out `[batch, n_heads_q, n, head_dim_v]`; f32, bf16 or f16, any strides with a contiguous last axis. Time is linear in the
/// length, memory beyond inputs and output does not grow with it.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::{Hgrn, ScanAttention};
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = ScanAttention::new(Hgrn::default());
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ScanAttention<V> {
    /// What is computed.
    pub variant: V,
}

impl<V: ScanVariant> ScanAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    fn cell(&self, s: &AttnShape) -> Result<V::Cell> {
        if s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        self.variant.cell(s.n_heads_q, s.head_dim, s.head_dim_v)
    }
}

fn tokens<'a>(x: &Qkv<'a>) -> Result<Tokens<'a>> {
    Tokens::of_any_width(&[("q", *x.q()), ("k", *x.k()), ("v", *x.v())])
}

impl<V: ScanVariant> ScanAttention<V> {
    /// [`Attention::forward`] of sequences packed one behind the other: `cu_seqlens` are the prefix sums of their lengths, from 0 to
    /// all tokens. Each is a run of its own.
    ///
    /// # Errors
    /// As [`Attention::forward`]; [`AttnError::Value`] for sums that do not rise from 0 to the tokens.
    pub fn forward_packed(&self, x: Qkv<'_>, cu_seqlens: &[usize], out: OutMut<'_>) -> Result<()> {
        let cell = self.cell(&x.shape())?;
        x.check_out(&out)?;
        forward(&cell, &tokens(&x)?.packed(Some(cu_seqlens))?, out, None)
    }
}

impl<V: ScanVariant> Attention for ScanAttention<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: Causality::Strict,
            convex: self.variant.is_convex(),
            key_order_free: false,
            cross_lengths: false,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: self.variant.max_error(),
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let heads = (s.batch * s.n_heads_q) as u64;
        let flops = heads * (s.n_q * self.variant.flops(s.head_dim, s.head_dim_v)) as u64;
        let threads = heads.min(rayon::current_num_threads() as u64);
        let bytes = self.cell(s).map(|cell| threads * workspace_bytes(&cell, s.n_q)).unwrap_or(0);
        Cost::of(s, dtype, flops, bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        let cell = self.cell(&x.shape())?;
        x.check_out(&out)?;
        forward(&cell, &tokens(&x)?, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        self.cell(&s)?;
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = s.kv_head(head);
                let (q, k) = (x.q().head_f64(batch, head), x.k().head_f64(batch, kv));
                let v = x.v().head_f64(batch, kv);
                out.extend(self.variant.define(HeadInputs {
                    head,
                    n_heads_q: s.n_heads_q,
                    q: &q,
                    k: &k,
                    v: &v,
                    head_dim: s.head_dim,
                    head_dim_v: s.head_dim_v,
                }));
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        Some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

// The states before the pieces cost less to compute again than to keep.
differentiable!(impl <V: ScanVariant> for ScanAttention<V>);

impl<V: ScanVariant> Recomputed for ScanAttention<V> {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        let cell = self.cell(&x.shape())?;
        let all = backward(&cell, &tokens(&x)?, None, &grad_out, None)?;
        let mut all = all.inputs.into_iter();
        Ok(std::array::from_fn(|_| all.next().unwrap_or_default()))
    }
}

impl<V: ScanVariant> Streaming for ScanAttention<V> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let divides = shape.n_heads_kv > 0 && shape.n_heads_q.is_multiple_of(shape.n_heads_kv);
        if !divides {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let cell = self.variant.cell(shape.n_heads_q, shape.head_dim, shape.head_dim_v)?;
        let state = ScanState::new(&cell, shape.batch, shape.n_heads_q);
        Ok(Box::new(Stream { cell, shape, state }))
    }
}

struct Stream<C> {
    cell: C,
    shape: StreamShape,
    state: ScanState,
}

impl<C: Cell> StreamState for Stream<C> {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        forward(&self.cell, &tokens(&x)?, out, Some(&mut self.state))
    }

    fn len(&self) -> usize {
        self.state.position()
    }

    fn bytes(&self) -> usize {
        self.state.bytes()
    }
}
