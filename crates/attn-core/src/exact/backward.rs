//! Gradients of exact attention, in f64.
//!
//! With `p`, `f` and `out` as in [`super`], `g_i` the gradient of `out_i` and `l_i` that of the log-sum-exp:
//!
//! ```text
//! dv_j    = sum_i f_ij p_ij g_i
//! dp_ij   = f_ij g_i . v_j
//! delta_i = sum_j p_ij dp_ij - l_i                (= g_i . out_i - l_i)
//! ds_ij   = p_ij (dp_ij - delta_i)                the gradient of the score, hence of whatever is added to it
//! dsink_h = sum_i -p_sink (delta_i)
//! dr_ij   = ds_ij score_mod'(r_ij)                with r = softmax_scale * q . k
//! dq_i    = softmax_scale sum_j dr_ij k_j         dk_j = softmax_scale sum_i dr_ij q_i
//! ```
//!
//! and, where q and k are normalised, `dq` and `dk` go on through the norm of each row. Rows that see nothing have no
//! gradient. Source: Dao et al. 2022 (FlashAttention), appendix B.

use super::{Exact, RowId, Score, dot};
use crate::mask::{Head, Pair};
use crate::qk_norm::{NormKind, RowNorm};
use crate::{AttnError, AttnShape, Qkv, Result};

/// Gradients in f64, each row-major in the shape of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct ExactGrads {
    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub q: Vec<f64>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub k: Vec<f64>,
    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub v: Vec<f64>,
    /// `[n_heads_q]`, if there are sinks.
    pub sinks: Option<Vec<f64>>,
    /// `[head_dim]`, if queries are normalised and their channels have weights.
    pub gamma_q: Option<Vec<f64>>,
    /// `[head_dim]`, if keys are normalised and their channels have weights.
    pub gamma_k: Option<Vec<f64>>,
}

impl Exact<'_> {
    /// Gradients of a loss, given its gradient with respect to the output, `grad_out [batch, n_heads_q, n_q, head_dim_v]`,
    /// and to the log-sum-exp, `grad_lse [batch, n_heads_q, n_q]`, if that is used.
    ///
    /// `each_pair` gets `ds` of every visible pair of a row that sees something, in order: its sum over the pairs that read an
    /// element of a bias is that element's gradient ([`crate::score::BiasIndex`]), if no score mod follows the bias.
    ///
    /// # Errors
    /// As [`Exact::rows`]; [`AttnError::Shape`] for gradients of another size; [`AttnError::Unsupported`] if the score
    /// mod has no derivative.
    pub fn backward(
        &self,
        x: &Qkv<'_>,
        grad_out: &[f64],
        grad_lse: Option<&[f64]>,
        mut each_pair: impl FnMut(Pair, f64),
    ) -> Result<ExactGrads> {
        let s = x.shape();
        let scale = self.check(x)?;
        if grad_out.len() != s.rows() * s.head_dim_v {
            return Err(AttnError::shape("grad_out", "elements", grad_out.len(), s.rows() * s.head_dim_v));
        }
        if let Some(grad_lse) = grad_lse
            && grad_lse.len() != s.rows()
        {
            return Err(AttnError::shape("grad_lse", "rows", grad_lse.len(), s.rows()));
        }
        if !self.score_mod.has_derivative() {
            return Err(AttnError::unsupported(
                "exact attention",
                "a backward pass through a score mod without derivative",
            ));
        }

        let zeros = |axes: [usize; 4]| vec![0.0; axes.iter().product()];
        let (mut q, mut k, mut v) = (zeros(s.q()), zeros(s.k()), zeros(s.v()));
        let mut sinks = self.sinks.map(|sinks| vec![0.0; sinks.len()]);
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = (batch * s.n_heads_kv + s.kv_head(head)) * s.n_kv;
                let (keys, values) = (kv * s.head_dim, kv * s.head_dim_v);
                for i in 0..s.n_q {
                    let row = (batch * s.n_heads_q + head) * s.n_q + i;
                    let mut grads = RowGrads {
                        q: &mut q[row * s.head_dim..][..s.head_dim],
                        k: &mut k[keys..][..s.n_kv * s.head_dim],
                        v: &mut v[values..][..s.n_kv * s.head_dim_v],
                        sink: sinks.as_mut().map(|sinks| &mut sinks[head]),
                    };
                    let incoming = Incoming {
                        out: &grad_out[row * s.head_dim_v..][..s.head_dim_v],
                        lse: grad_lse.map_or(0.0, |lse| lse[row]),
                    };
                    self.row_backward(
                        x,
                        RowId { batch, head, i },
                        scale,
                        incoming,
                        &mut grads,
                        &mut each_pair,
                    );
                }
            }
        }

        let (mut gamma_q, mut gamma_k) = (None, None);
        if let Some(norm) = self.qk_norm {
            let read = |view: &crate::TensorView<'_>, heads: usize| {
                (0..s.batch * heads).flat_map(|h| view.head_f64(h / heads, h % heads)).collect::<Vec<_>>()
            };
            gamma_q = norm_backward(norm.q(), &read(x.q(), s.n_heads_q), &mut q, &s);
            gamma_k = norm_backward(norm.k(), &read(x.k(), s.n_heads_kv), &mut k, &s);
        }
        Ok(ExactGrads { q, k, v, sinks, gamma_q, gamma_k })
    }

    fn row_backward(
        &self,
        x: &Qkv<'_>,
        id: RowId,
        scale: f64,
        incoming: Incoming<'_>,
        grads: &mut RowGrads<'_>,
        each_pair: &mut impl FnMut(Pair, f64),
    ) {
        let (s, RowId { batch, head, i }) = (x.shape(), id);
        let kv_head = s.kv_head(head);
        let q = self.q(x, id);
        let seen = self.scores(x, &q, id, scale);
        let Some((max, sum)) = self.normaliser(&seen, head) else { return };
        let probability = |seen: &Score| (seen.score - max).exp() / sum;

        let mut v = vec![0.0; s.head_dim_v];
        let mut grad_p = Vec::with_capacity(seen.len());
        for seen in &seen {
            let (p, factor) = (probability(seen), self.dropout_factor(Head { batch, head }.pair(i, seen.j)));
            let mut along = 0.0;
            if p * factor != 0.0 {
                x.v().read_row(batch, kv_head, seen.j, &mut v);
                along = factor * dot(incoming.out, &v);
                let grad_v = &mut grads.v[seen.j * s.head_dim_v..][..s.head_dim_v];
                grad_v.iter_mut().zip(incoming.out).for_each(|(dv, g)| *dv += factor * p * g);
            }
            grad_p.push(along);
        }
        let mean: f64 = seen.iter().zip(&grad_p).map(|(seen, dp)| probability(seen) * dp).sum();
        let delta = mean - incoming.lse;
        if let (Some(grad), Some(sinks)) = (&mut grads.sink, self.sinks) {
            **grad -= (sinks[head] - max).exp() / sum * delta;
        }

        let mut k = vec![0.0; s.head_dim];
        for (seen, dp) in seen.iter().zip(&grad_p) {
            let at = Head { batch, head }.pair(i, seen.j);
            let ds = probability(seen) * (dp - delta);
            each_pair(at, ds);
            if ds == 0.0 {
                continue; // nothing flows through a weight of zero, whatever stands behind it
            }
            let dr = scale * ds * self.score_mod.derivative_f64(seen.scaled, at);
            x.k().read_row(batch, kv_head, seen.j, &mut k);
            if let Some(norm) = self.qk_norm {
                norm.k().apply_f64(&mut k);
            }
            grads.q.iter_mut().zip(&k).for_each(|(dq, k)| *dq += dr * k);
            let grad_k = &mut grads.k[seen.j * s.head_dim..][..s.head_dim];
            grad_k.iter_mut().zip(&q).for_each(|(dk, q)| *dk += dr * q);
        }
    }
}

/// Gradients that come in for one row.
struct Incoming<'a> {
    out: &'a [f64],
    lse: f64,
}

/// Where the gradients of one row go: its query, and the keys and values of its head.
struct RowGrads<'a> {
    q: &'a mut [f64],
    k: &'a mut [f64],
    v: &'a mut [f64],
    sink: Option<&'a mut f64>,
}

/// Turns gradients of normalised rows into those of the rows `x`, and gives that of the weights.
///
/// With `u = x / t` and `t` what the norm divides by: `y = gamma u`, `du = gamma dy`, `dx = (du - u (u . du) w) / t`, where
/// `w` is `1/d` for RMS, 1 for L2, and 0 for L2 where `t` is the constant eps.
fn norm_backward(norm: RowNorm<'_>, x: &[f64], grads: &mut [f64], s: &AttnShape) -> Option<Vec<f64>> {
    let width = s.head_dim;
    let unit = RowNorm { gamma: None, ..norm };
    let mut grad_gamma = norm.gamma.map(|gamma| vec![0.0; gamma.len()]);
    for (x, grad) in x.chunks_exact(width).zip(grads.chunks_exact_mut(width)) {
        let mut u = x.to_vec();
        unit.apply_f64(&mut u);
        for c in 0..width {
            if let (Some(gamma), Some(grad_gamma)) = (norm.gamma, &mut grad_gamma) {
                grad_gamma[c] += grad[c] * u[c];
                grad[c] *= f64::from(gamma[c]);
            }
        }
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let (t, w) = match norm.kind {
            NormKind::Rms { eps } => ((squares / width as f64 + f64::from(eps)).sqrt(), 1.0 / width as f64),
            NormKind::L2 { eps } if squares.sqrt() > f64::from(eps) => (squares.sqrt(), 1.0),
            NormKind::L2 { eps } => (f64::from(eps), 0.0),
        };
        let along = w * dot(&u, grad);
        grad.iter_mut().zip(&u).for_each(|(g, u)| *g = (*g - u * along) / t);
    }
    grad_gamma
}
