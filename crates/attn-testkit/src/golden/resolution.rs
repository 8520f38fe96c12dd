//! How much f32 resolves of a softmax row and of its gradients: a file may ask for more.
//!
//! A score rounded to f32 is off by up to `u |s|` with `u = 2^-24`, which its exponential turns into a relative error of the
//! weight. With a few roundings more (products, exponential, sums), `S_i = max_j |s_ij|`, `c = 4` and `r_i = c u (1 + S_i)`,
//!
//! ```text
//! |lse_i - exact|  <= r_i                                |out_ic - exact| <= r_i sum_j p_ij |v_jc|
//! |ds_ij - exact|  <= r_i p_ij b_ij                      b_ij = sum_c |g_ic| (|v_jc| + sum_j p_ij |v_jc|)
//! |dq_ic - exact|  <= scale sum_j r_i p_ij b_ij |k_jc|   |dk_jc - exact|  <= scale sum_i r_i p_ij b_ij |q_ic|
//! |dv_jc - exact|  <= sum_i r_i p_ij |g_ic|              with g the gradient of out
//! ```
//!
//! The weights `p` are the variant's own output for unit vectors as values. An element outside the file's tolerance but
//! inside this bound says that the file asks for more digits than f32 has (values that cancel, a log-sum-exp near zero from
//! large scores), not that a kernel is wrong. It is counted and said, never hidden.

use super::forms::{MOST_KEYS, weights};
use super::{GoldenCase, Plan, Weights};
use attn_core::registry::Entry;
use attn_core::{AttnShape, DType, Family, Qkv, Result};

/// Roundings counted by the bound.
const ROUNDINGS: f64 = 4.0;

/// What f32 resolves of each element of an output, or of a gradient `grad.q`, `grad.k`, `grad.v`; `None` for what is no
/// softmax row in f32, or too long.
///
/// # Errors
/// Those of running the variant.
pub(super) fn of(entry: &Entry, plan: &Plan, case: &GoldenCase, name: &str) -> Result<Option<Vec<f64>>> {
    let x = plan.inputs.qkv()?;
    let softmax = entry.family == Family::Exact || entry.build(&plan.options)?.as_softmax().is_some();
    if !softmax || x.dtype() != DType::F32 || x.shape().n_kv > MOST_KEYS {
        return Ok(None);
    }
    let scale = plan.options.get::<f64>("scale")?.unwrap_or(1.0 / (x.shape().head_dim as f64).sqrt()).abs();
    let relative = relative_errors(&x, scale);
    if name == "lse" {
        return Ok(Some(relative));
    }
    let mut inputs = plan.inputs.clone();
    inputs.0.remove("v");
    let asked = Weights { options: plan.options.clone(), inputs, scores: false };
    let p = weights(entry, &asked)?.data.to_f64();
    // Weights of other queries than these: those of a decoded token.
    if p.len() != x.shape().rows() * x.shape().n_kv {
        return Ok(None);
    }
    let grad_out = case.w.as_ref().map(|w| w.data.to_f64());
    let pairs = Pairs { x: &x, shape: x.shape(), scale, relative, p };
    Ok(match (name, grad_out.filter(|w| w.len() == x.shape().rows() * x.shape().head_dim_v)) {
        ("o", _) => Some(pairs.out()),
        ("grad.v", Some(g)) => Some(pairs.grad_v(&g)),
        ("grad.q", Some(g)) => Some(pairs.grad_qk(&g).0),
        ("grad.k", Some(g)) => Some(pairs.grad_qk(&g).1),
        _ => None,
    })
}

/// `r_i` of every row.
fn relative_errors(x: &Qkv<'_>, scale: f64) -> Vec<f64> {
    let shape = x.shape();
    let mut rows = Vec::with_capacity(shape.rows());
    let mut q = vec![0.0; shape.head_dim];
    for batch in 0..shape.batch {
        for head in 0..shape.n_heads_q {
            let keys = x.k().head_f64(batch, shape.kv_head(head));
            for i in 0..shape.n_q {
                x.q().read_row(batch, head, i, &mut q);
                let score = |k: &[f64]| scale * k.iter().zip(&q).map(|(k, q)| k * q).sum::<f64>().abs();
                let largest = keys.chunks_exact(shape.head_dim).map(score).fold(0.0, f64::max);
                rows.push(ROUNDINGS * 2f64.powi(-24) * (1.0 + largest));
            }
        }
    }
    rows
}

struct Pairs<'a> {
    x: &'a Qkv<'a>,
    shape: AttnShape,
    scale: f64,
    /// `r [batch, n_heads_q, n_q]`.
    relative: Vec<f64>,
    /// `p [batch, n_heads_q, n_q, n_kv]`.
    p: Vec<f64>,
}

impl Pairs<'_> {
    /// `sum_j p_ij |v_jc|` of every row.
    fn spreads(&self) -> Vec<f64> {
        let d = self.shape.head_dim_v;
        let mut spreads = vec![0.0; self.shape.rows() * d];
        self.each(|row, at, key, p| {
            let v = &at.v[key * d..][..d];
            spreads[row * d..][..d].iter_mut().zip(v).for_each(|(s, v)| *s += p * v.abs());
        });
        spreads
    }

    fn out(&self) -> Vec<f64> {
        let spreads = self.spreads();
        let d = self.shape.head_dim_v;
        spreads.iter().enumerate().map(|(at, spread)| self.relative[at / d] * spread).collect()
    }

    fn grad_v(&self, g: &[f64]) -> Vec<f64> {
        let d = self.shape.head_dim_v;
        let mut bounds = vec![0.0; self.shape.v().iter().product()];
        self.each(|row, at, key, p| {
            let weight = self.relative[row] * p;
            let to = &mut bounds[(at.kv_start + key) * d..][..d];
            to.iter_mut().zip(&g[row * d..]).for_each(|(to, g)| *to += weight * g.abs());
        });
        bounds
    }

    fn grad_qk(&self, g: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (d, dv) = (self.shape.head_dim, self.shape.head_dim_v);
        let spreads = self.spreads();
        let mut q = vec![0.0; self.shape.q().iter().product()];
        let mut k = vec![0.0; self.shape.k().iter().product()];
        self.each(|row, at, key, p| {
            let rows = g[row * dv..][..dv].iter().zip(&at.v[key * dv..]).zip(&spreads[row * dv..]);
            let b: f64 = rows.map(|((g, v), spread)| g.abs() * (v.abs() + spread)).sum();
            let weight = self.scale * self.relative[row] * p * b;
            let (query, keys) = (&at.q[(row % self.shape.n_q) * d..][..d], &at.k[key * d..][..d]);
            q[row * d..][..d].iter_mut().zip(keys).for_each(|(q, k)| *q += weight * k.abs());
            let to = &mut k[(at.kv_start + key) * d..][..d];
            to.iter_mut().zip(query).for_each(|(k, q)| *k += weight * q.abs());
        });
        (q, k)
    }

    /// Calls `with(row, head, key, p)` for every pair.
    fn each(&self, mut with: impl FnMut(usize, &HeadRows, usize, f64)) {
        let s = self.shape;
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv_head = s.kv_head(head);
                let rows = HeadRows {
                    q: self.x.q().head_f64(batch, head),
                    k: self.x.k().head_f64(batch, kv_head),
                    v: self.x.v().head_f64(batch, kv_head),
                    kv_start: (batch * s.n_heads_kv + kv_head) * s.n_kv,
                };
                for i in 0..s.n_q {
                    let row = (batch * s.n_heads_q + head) * s.n_q + i;
                    for key in 0..s.n_kv {
                        with(row, &rows, key, self.p[row * s.n_kv + key]);
                    }
                }
            }
        }
    }
}

/// The rows of one query head, and where its keys start among those of all heads.
struct HeadRows {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    kv_start: usize,
}
