//! AFT-full and AFT-local: attention whose weights are those of the key and of the pair of positions.
//!
//! ```text
//! o_i = sigmoid(q_i) o  sum_j e^(w_ij + k_j) v_j / sum_j e^(w_ij + k_j)          channel by channel, over the keys seen
//! ```
//!
//! With a window, `w_ij = 0` for `|i - j| >= window`: those pairs still see each other, through sums that are formed once, so
//! that time is `O(n window)` instead of `O(n^2)`. Weights are taken relative to the largest of each row and channel: no key
//! and no bias overflows. A bias of -inf hides a pair.
//!
//! With `head_dim_v > head_dim` queries and keys start over from their first channel.
//!
//! Source: Zhai et al. 2021 (An Attention Free Transformer), equations 2 and 5.

mod heads;
mod passes;
mod registry;
mod sums;

pub(crate) use registry::entries;

use crate::recomputed::{Recomputed, differentiable};
use crate::scan::Tokens;
use crate::scan::math::sigmoid64;
use attn_core::exact::Reference;
use attn_core::simd::Isa;
use attn_core::tile::MAX_LANES;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, Result, Target, TensorView,
};
use heads::{Gate, GateBack, Heads};
use passes::{Back, Means, Pairs, Rows, gradients, means};

/// AFT-full, or with a window AFT-local; see the [module](self). Without `causal` the numbers of queries and keys may differ.
///
/// ```
/// use attn_core::{Qkv, View, ViewMut};
/// use attn_linear::AftFull;
///
/// let (n, d) = (5, 8);
/// let x: Vec<f32> = (0..n * d).map(|i| (i as f32).sin()).collect();
/// let w: Vec<f32> = (0..n * n).map(|i| (i as f32).cos()).collect(); // learned, one number a pair of positions
/// let view = |name| View::contiguous(name, &x, [1, 1, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let aft = AftFull { causal: true, ..AftFull::default() };
/// aft.forward_biased(&qkv, Some((&w, &[n, n])), ViewMut::contiguous("out", &mut out, [1, 1, n, d])?.into())?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AftFull {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Pairs less than this far apart have a bias, the others none; `None` is all of them.
    pub window: Option<usize>,
    /// `w_ij = -slope |i - j|` where no biases are given.
    pub slope: f32,
}

impl Default for AftFull {
    fn default() -> Self {
        Self { causal: false, window: None, slope: 0.05 }
    }
}

/// Learned biases: numbers and axes, `(rows, columns)` or `(n_heads_q, rows, columns)` with at least as many rows as queries
/// and columns as keys; those of the first positions are read.
pub type Biases<'a> = (&'a [f32], &'a [usize]);

/// Gradients of [`AftFull`], each of its input's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct AftGrads {
    /// By `q`.
    pub q: Vec<f32>,
    /// By `k`.
    pub k: Vec<f32>,
    /// By `v`.
    pub v: Vec<f32>,
    /// By the biases; empty without.
    pub bias: Vec<f32>,
}

/// Biases, checked.
#[derive(Clone, Copy)]
enum Bias<'a> {
    Slope(f32),
    Given { data: &'a [f32], heads: usize, rows: usize, columns: usize },
}

impl<'a> Bias<'a> {
    fn of_head(&self, head: usize) -> usize {
        match self {
            Self::Slope(_) => 0,
            Self::Given { heads, rows, columns, .. } => head % heads * rows * columns,
        }
    }

    #[inline(always)]
    fn at(&self, head: usize, i: usize, j: usize) -> f32 {
        match self {
            Self::Slope(slope) => -slope * i.abs_diff(j) as f32,
            Self::Given { data, columns, .. } => data[self.of_head(head) + i * columns + j],
        }
    }

    fn of(aft: &AftFull, s: &AttnShape, given: Option<Biases<'a>>) -> Result<Self> {
        let Some((data, axes)) = given else { return Ok(Self::Slope(aft.slope)) };
        let (heads, rows, columns) = match *axes {
            [rows, columns] => (1, rows, columns),
            [heads, rows, columns] if heads == s.n_heads_q => (heads, rows, columns),
            _ => {
                let expected = format!("(rows, columns) or ({}, rows, columns)", s.n_heads_q);
                return Err(AttnError::value("bias' shape", format!("{axes:?}"), expected));
            }
        };
        for (axis, found, least) in [("rows", rows, s.n_q), ("columns", columns, s.n_kv)] {
            if found < least {
                return Err(AttnError::shape("bias", axis, found, format!("at least {least}")));
            }
        }
        if data.len() != heads * rows * columns {
            return Err(AttnError::shape("bias", "elements", data.len(), heads * rows * columns));
        }
        Ok(Self::Given { data, heads, rows, columns })
    }
}

impl AftFull {
    fn check(&self, s: &AttnShape) -> Result<()> {
        if self.causal && s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        if self.window == Some(0) {
            return Err(AttnError::value("window", 0, "at least 1"));
        }
        if !self.slope.is_finite() {
            return Err(AttnError::value("slope", self.slope, "a finite number"));
        }
        Ok(())
    }

    fn pairs<'a>(&self, s: &AttnShape, bias: Bias<'a>, head: usize) -> Pairs<'a> {
        Pairs { n_q: s.n_q, n_kv: s.n_kv, causal: self.causal, window: self.window, bias, head }
    }

    /// [`Attention::forward`] with learned biases.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward_biased(&self, x: &Qkv<'_>, bias: Option<Biases<'_>>, out: OutMut<'_>) -> Result<()> {
        let s = x.shape();
        self.check(&s)?;
        x.check_out(&out)?;
        let bias = Bias::of(self, &s, bias)?;
        let isa = Isa::current();
        let heads = Heads::new(x)?;
        let mut outs = out.into_cuts(vec![0..s.n_q; 1]).into_iter();
        for batch in 0..s.batch {
            for kv in 0..s.n_heads_kv {
                let (k, v) = heads.key_value(batch, kv);
                for head in heads.queries_of(kv) {
                    let q = heads.query(batch, head);
                    let Means { mean, .. } = means(isa, self.pairs(&s, bias, head), &k, &v, false);
                    let Some(mut out) = outs.next() else { continue };
                    let mut gated = Rows::new(s.n_q, heads.stride);
                    isa.run(Gate { q: &q.data, x: &mean.data, out: &mut gated.data });
                    for (i, row) in gated.data.chunks_exact(heads.stride).enumerate() {
                        out.store(i, row.iter().copied());
                    }
                }
            }
        }
        Ok(())
    }

    /// Gradients, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients(
        &self,
        x: &Qkv<'_>,
        given: Option<Biases<'_>>,
        grad_out: &TensorView<'_>,
    ) -> Result<AftGrads> {
        let s = x.shape();
        self.check(&s)?;
        let bias = Bias::of(self, &s, given)?;
        attn_core::check_like("grad_out", grad_out.shape(), grad_out.dtype(), x.q(), s.head_dim_v)?;
        let isa = Isa::current();
        let heads = Heads::new(x)?;
        let outer = Tokens::of_any_width(&[("grad_out", *grad_out)])?;
        let mut all = AftGrads {
            q: Vec::with_capacity(s.q().iter().product()),
            k: vec![0.0; s.batch * s.n_heads_kv * s.n_kv * s.head_dim_v],
            v: vec![0.0; s.v().iter().product()],
            bias: vec![0.0; given.map_or(0, |(data, _)| data.len())],
        };
        for batch in 0..s.batch {
            for kv in 0..s.n_heads_kv {
                let (k, v) = heads.key_value(batch, kv);
                for head in heads.queries_of(kv) {
                    let q = heads.query(batch, head);
                    let pairs = self.pairs(&s, bias, head);
                    let means = means(isa, pairs, &k, &v, true);
                    let mut grad = heads.rows(&outer, 0, (batch, head), s.n_q);
                    let mut by_q = Rows::new(s.n_q, heads.stride);
                    isa.run(GateBack {
                        q: &q.data,
                        x: &means.mean.data,
                        grad: &mut grad.data,
                        by_q: &mut by_q.data,
                    });
                    all.q.extend(heads.unpadded(&by_q));
                    let back = Back { pairs, k: &k, v: &v, means: &means, grad: &grad };
                    let by_bias = match bias {
                        Bias::Slope(_) => None,
                        Bias::Given { rows, columns, .. } => {
                            Some((&mut all.bias[bias.of_head(head)..][..rows * columns], columns))
                        }
                    };
                    let by = gradients(isa, &back, by_bias);
                    let at = (batch * s.n_heads_kv + kv) * s.n_kv * s.head_dim_v;
                    for (sum, rows) in [(&mut all.k, by.k), (&mut all.v, by.v)] {
                        sum[at..].iter_mut().zip(heads.unpadded(&rows)).for_each(|(sum, x)| *sum += x);
                    }
                }
            }
        }
        all.q = heads.queries.gather(0, s.head_dim_v, all.q);
        all.k = heads.keys.gather(0, s.head_dim_v, all.k);
        Ok(all)
    }
}

impl Attention for AftFull {
    fn name(&self) -> &'static str {
        if self.window.is_some() { "aft-local" } else { "aft-full" }
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: false,
            key_order_free: false,
            cross_lengths: !self.causal,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 4e-6,
            time: if self.window.is_some() { Growth::Linear } else { Growth::Quadratic },
            memory: Growth::Linear,
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let keys = self.window.map_or(s.n_kv, |window| s.n_kv.min(window.saturating_mul(2) + 1)) as u64;
        let heads = (s.batch * s.n_heads_q) as u64;
        let seen = if self.causal { keys.div_ceil(2) } else { keys };
        let flops = heads * s.n_q as u64 * (seen * 4 + 8) * s.head_dim_v as u64;
        let stride = s.head_dim_v.next_multiple_of(MAX_LANES) as u64;
        // Keys, values, queries, means and outputs of one head.
        let bytes = 4 * stride * (2 * s.n_kv as u64 + 3 * s.n_q as u64);
        Cost::of(s, dtype, flops, bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.forward_biased(&x, None, out)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        self.check(&s)?;
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = s.kv_head(head);
                let (q, k) = (x.q().head_f64(batch, head), x.k().head_f64(batch, kv));
                let v = x.v().head_f64(batch, kv);
                for i in 0..s.n_q {
                    let seen = if self.causal { i + 1 } else { s.n_kv };
                    for c in 0..s.head_dim_v {
                        let (mut num, mut den) = (0.0, 0.0);
                        for j in 0..seen {
                            let near = self.window.is_none_or(|window| i.abs_diff(j) < window);
                            let w = if near { -f64::from(self.slope) * i.abs_diff(j) as f64 } else { 0.0 };
                            let weight = (w + k[j * s.head_dim + c % s.head_dim]).exp();
                            num += weight * v[j * s.head_dim_v + c];
                            den += weight;
                        }
                        let mean = if seen == 0 { 0.0 } else { num / den };
                        out.push(sigmoid64(q[i * s.head_dim + c % s.head_dim]) * mean);
                    }
                }
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

differentiable!(impl for AftFull);

impl Recomputed for AftFull {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        let all = self.gradients(&x, None, &grad_out)?;
        Ok([all.q, all.k, all.v])
    }
}
