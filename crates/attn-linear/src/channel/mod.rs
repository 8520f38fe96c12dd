//! Cross-covariance attention: channels attend to channels.
//!
//! ```text
//! q^_c = q_c / max(|q_c|, 1e-12)  along the length, k^ likewise
//! A = softmax over c' of  temperature q^_c . k^_c'             [width, width]
//! o_t[c] = sum_c' A[c, c'] v_t[c']
//! ```
//!
//! Not causal, and of equally many queries, keys and heads of both. Widths other than `head_dim_v` are repeated or cut: queries
//! and keys start over from their first channel.
//!
//! Source: Ali et al. 2021 (XCiT: Cross-Covariance Image Transformers), equation 4.

mod cells;
mod registry;

use crate::recomputed::{Recomputed, differentiable};
use crate::scan::{ScanState, Tokens, absorb, backward, forward, workspace_bytes};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, Result, Target, TensorView, View,
};
use cells::{Apply, Gram};
pub(crate) use registry::entries;

/// Cross-covariance attention, see the [module](self).
#[derive(Debug, Clone, PartialEq)]
pub struct Xca {
    /// Multiplies the inner products of channels: one for all heads, or one a head.
    pub temperature: Vec<f32>,
}

impl Default for Xca {
    fn default() -> Self {
        Self { temperature: vec![1.0] }
    }
}

/// Gradients by all inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct XcaGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By the temperature of each head.
    pub temperature: Vec<f32>,
}

const LEAST_NORM: f32 = 1e-12;

/// What a head's channels are to one another.
struct Weights {
    gram: Gram,
    /// Lengths of channels.
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    /// Cosines, and their softmax, `[batch * heads, width, width]`.
    cosines: Vec<f32>,
    weights: Vec<f32>,
}

impl Xca {
    fn temperature_of(&self, head: usize) -> f32 {
        self.temperature[head % self.temperature.len()]
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        if s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        if s.n_heads_q != s.n_heads_kv {
            let expected = format!("{} (as many as q has)", s.n_heads_q);
            return Err(AttnError::shape("k", "n_heads_kv", s.n_heads_kv, expected));
        }
        let heads = self.temperature.len();
        if heads != 1 && heads != s.n_heads_q {
            return Err(AttnError::shape("temperature", "heads", heads, format!("1 or {}", s.n_heads_q)));
        }
        match self.temperature.iter().find(|t| !t.is_finite()) {
            Some(t) => Err(AttnError::value("temperature", t, "a finite number")),
            None => Ok(()),
        }
    }

    fn weights(&self, x: &Qkv<'_>) -> Result<Weights> {
        let s = x.shape();
        let width = s.head_dim_v;
        let gram = Gram { width };
        let mut state = ScanState::new(&gram, s.batch, s.n_heads_q);
        absorb(&gram, &Tokens::of_any_width(&[("q", *x.q()), ("k", *x.k())])?, &mut state)?;
        let norm = |part| -> Vec<f32> { state.part(part).iter().map(|x| x.sqrt().max(LEAST_NORM)).collect() };
        let (q_norm, k_norm, mut cosines) = (norm(1), norm(2), state.part(0));
        let mut weights = cosines.clone();
        let rows = cosines.chunks_exact_mut(width).zip(weights.chunks_exact_mut(width)).enumerate();
        for (at, (cosines, weights)) in rows {
            let head = at / width;
            let norms = &k_norm[head * width..][..width];
            cosines.iter_mut().zip(norms).for_each(|(g, k)| *g = *g / q_norm[at] / k);
            let temperature = self.temperature_of(head % s.n_heads_q);
            weights.iter_mut().zip(&*cosines).for_each(|(w, g)| *w = temperature * g);
            let max = weights.iter().fold(f32::NEG_INFINITY, |m, w| m.max(*w));
            weights.iter_mut().for_each(|w| *w = (*w - max).exp());
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        Ok(Weights { gram, q_norm, k_norm, cosines, weights })
    }

    /// The state of [`Apply`]: the weights of each head, transposed.
    fn applied(s: &AttnShape, weights: &[f32]) -> Result<(Apply, ScanState)> {
        let apply = Apply { width: s.head_dim_v };
        let mut state = ScanState::new(&apply, s.batch, s.n_heads_q);
        state.set_part(0, "weights", &crate::named::transpose(weights, s.head_dim_v, s.head_dim_v))?;
        Ok((apply, state))
    }

    /// Gradients by all inputs, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients(&self, x: &Qkv<'_>, grad_out: &TensorView<'_>) -> Result<XcaGrads> {
        let s = x.shape();
        self.check(&s)?;
        let width = s.head_dim_v;
        let Weights { gram, q_norm, k_norm, cosines, weights } = self.weights(x)?;
        let (apply, state) = Self::applied(&s, &weights)?;
        let values = Tokens::new(&apply, &[("v", *x.v())])?;
        let by_values = backward(&apply, &values, Some(&state), grad_out, None)?;
        let mut by = crate::named::transpose(&by_values.state.part(0), width, width);
        let mut temperature = vec![0.0; s.n_heads_q];
        let (mut by_qq, mut by_kk) = (vec![0.0; q_norm.len()], vec![0.0; k_norm.len()]);
        for (at, by) in by.chunks_exact_mut(width).enumerate() {
            let (head, memory) = (at / width % s.n_heads_q, at / width);
            let (w, g) = (&weights[at * width..][..width], &cosines[at * width..][..width]);
            let mean: f32 = by.iter().zip(w).map(|(b, w)| b * w).sum();
            for c in 0..width {
                // By temperature * cosine, by the cosine, by the product of the channels.
                let by_logit = w[c] * (by[c] - mean);
                temperature[head] += by_logit * g[c];
                let by_cosine = by_logit * self.temperature_of(head);
                let (q, k) = (q_norm[at], k_norm[memory * width + c]);
                // |q|^2 by |q|: one over 2 |q|.
                by_qq[at] -= by_cosine * g[c] / (2.0 * q * q);
                by_kk[memory * width + c] -= by_cosine * g[c] / (2.0 * k * k);
                by[c] = by_cosine / q / k;
            }
        }
        let mut grad_state = ScanState::no_grad(&gram, s.batch, s.n_heads_q);
        for (part, data) in [by, by_qq, by_kk].iter().enumerate() {
            grad_state.set_part(part, "grad", data)?;
        }
        let zeros = vec![0.0f32; s.batch * s.n_heads_q * s.n_q];
        let zeros = View::contiguous("grad_out", &zeros, [s.batch, s.n_heads_q, s.n_q, 1])?;
        let keys = Tokens::of_any_width(&[("q", *x.q()), ("k", *x.k())])?;
        let mut by_keys = backward(&gram, &keys, None, &zeros.into(), Some(&grad_state))?.inputs.into_iter();
        let (q, k) = (by_keys.next().unwrap_or_default(), by_keys.next().unwrap_or_default());
        let v = by_values.inputs.into_iter().next().unwrap_or_default();
        Ok(XcaGrads { q, k, v, temperature })
    }
}

impl Attention for Xca {
    fn name(&self) -> &'static str {
        "xca"
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: Causality::Bidirectional,
            convex: false,
            key_order_free: false,
            cross_lengths: false,
            grouped_heads: false,
            dtypes: &DType::ALL,
            max_error: 1e-5,
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let (heads, width) = ((s.batch * s.n_heads_q) as u64, s.head_dim_v as u64);
        let flops = heads * s.n_q as u64 * (4 * width * width + 4 * width);
        let threads = heads.min(rayon::current_num_threads() as u64);
        let bytes =
            threads * workspace_bytes(&Gram { width: s.head_dim_v }, s.n_q) + 20 * heads * width * width;
        Cost::of(s, dtype, flops, bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        let s = x.shape();
        self.check(&s)?;
        x.check_out(&out)?;
        let (apply, mut state) = Self::applied(&s, &self.weights(&x)?.weights)?;
        forward(&apply, &Tokens::new(&apply, &[("v", *x.v())])?, out, Some(&mut state))
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        self.check(&s)?;
        let (d, width) = (s.head_dim, s.head_dim_v);
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let [q, k] = [x.q(), x.k()].map(|x| x.head_f64(batch, head));
                let v = x.v().head_f64(batch, head);
                let unit = |x: &[f64], c: usize| -> Vec<f64> {
                    let column: Vec<f64> = x.iter().skip(c % d).step_by(d).copied().collect();
                    let norm = column.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::from(LEAST_NORM));
                    column.iter().map(|x| x / norm).collect()
                };
                let columns = |x: &[f64]| -> Vec<Vec<f64>> { (0..width).map(|c| unit(x, c)).collect() };
                let (q, k) = (columns(&q), columns(&k));
                let weights: Vec<Vec<f64>> = q
                    .iter()
                    .map(|q| {
                        let dot = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                        let logit = |k| (f64::from(self.temperature_of(head)) * dot(k)).exp();
                        let row: Vec<f64> = k.iter().map(logit).collect();
                        let sum: f64 = row.iter().sum();
                        row.iter().map(|w| w / sum).collect()
                    })
                    .collect();
                for v in v.chunks_exact(width) {
                    out.extend(weights.iter().map(|w| w.iter().zip(v).map(|(w, v)| w * v).sum::<f64>()));
                }
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

differentiable!(impl for Xca);

impl Recomputed for Xca {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        let all = self.gradients(&x, &grad_out)?;
        Ok([all.q, all.k, all.v])
    }
}
