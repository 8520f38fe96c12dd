//! The definition in f64: slow on purpose, sharing nothing with the fast forms.
//!
//! Quadratic, for query `i` at position `p = i + n_kv - n_q` and the keys `j` it sees (`j <= p` under `causal`):
//!
//! ```text
//! a_j = e^((p-j) g) phi(q_i) . phi(k_j)         N = sum_j a_j v_j + e^((p+1) g) S_0^T phi(q_i)
//! out = scale N / (scale D + eps)               D = sum_j a_j     + e^((p+1) g) phi(q_i) . z_0
//! ```
//!
//! without a normaliser `out = scale N`; where the divisor is 0, and for queries that see nothing, `out = 0`.

use super::{Decay, Normaliser, Spec, State};
use attn_core::exact::Reference;
use attn_core::{Qkv, Result, TensorView};

/// A state in f64: `s [batch, heads, key_dim, value_dim]`, `z [batch, heads, key_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct State64 {
    /// The sums of `k v^T`.
    pub s: Vec<f64>,
    /// The sums of `k`, with or without a normaliser.
    pub z: Vec<f64>,
}

/// One head in f64: features, values, initial state.
struct Head64 {
    q: Vec<Vec<f64>>,
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    /// `[key_dim][value_dim]`.
    s: Vec<Vec<f64>>,
    z: Vec<f64>,
    log_decay: f64,
    value_dim: usize,
}

impl Head64 {
    /// The query's position on the key axis; `None` if it stands before all keys.
    fn position(&self, i: usize) -> Option<usize> {
        (i + self.k.len()).checked_sub(self.q.len())
    }

    /// `e^(steps g)`, with `0 * -inf = 0`.
    fn weight(&self, steps: usize) -> f64 {
        if steps == 0 { 1.0 } else { (steps as f64 * self.log_decay).exp() }
    }

    /// Adds `weight * q . S_0` to `n` and `weight * q . z_0` to `d`.
    fn read_initial(&self, q: &[f64], weight: f64, n: &mut [f64], d: &mut f64) {
        for (c, q) in q.iter().enumerate() {
            n.iter_mut().zip(&self.s[c]).for_each(|(n, s)| *n += weight * q * s);
            *d += weight * q * self.z[c];
        }
    }
}

/// The quadratic form, in `O(n_q n_kv)`.
///
/// # Errors
/// As [`Spec::forward`].
pub fn quadratic(spec: &Spec, x: &Qkv<'_>, initial: Option<&State>) -> Result<Reference> {
    let mut out = Vec::new();
    for head in heads(spec, x, initial)? {
        for (i, q) in head.q.iter().enumerate() {
            let (mut n, mut d) = (vec![0.0; head.value_dim], 0.0);
            let position = head.position(i);
            let seen = if spec.causal { position.map_or(0, |p| p + 1) } else { head.k.len() };
            for j in 0..seen {
                let steps = if spec.causal { seen - 1 - j } else { 0 };
                let a = head.weight(steps) * dot64(q, &head.k[j]);
                n.iter_mut().zip(&head.v[j]).for_each(|(n, v)| *n += a * v);
                d += a;
            }
            head.read_initial(q, head.weight(if spec.causal { seen } else { 0 }), &mut n, &mut d);
            out.extend(finish(spec, &n, d));
        }
    }
    Ok(Reference { out, lse: None })
}

/// The recurrence, token by token, and the state it ends in. Only under `causal`, with as many queries as keys.
///
/// # Errors
/// As [`Spec::forward`]; [`attn_core::AttnError::Unsupported`] otherwise.
pub fn recurrence(spec: &Spec, x: &Qkv<'_>, initial: Option<&State>) -> Result<(Reference, State64)> {
    if !spec.causal || x.shape().n_q != x.shape().n_kv {
        let what = "the recurrence without `causal` or with n_q != n_kv";
        return Err(attn_core::AttnError::unsupported(spec.name, what));
    }
    let (mut out, mut end) = (Vec::new(), State64 { s: Vec::new(), z: Vec::new() });
    for mut head in heads(spec, x, initial)? {
        let gamma = head.log_decay.exp();
        for t in 0..head.q.len() {
            for (c, k) in head.k[t].iter().enumerate() {
                head.z[c] = gamma * head.z[c] + k;
                head.s[c].iter_mut().zip(&head.v[t]).for_each(|(s, v)| *s = gamma * *s + k * v);
            }
            let (mut n, mut d) = (vec![0.0; head.value_dim], 0.0);
            head.read_initial(&head.q[t], 1.0, &mut n, &mut d);
            out.extend(finish(spec, &n, d));
        }
        end.s.extend(head.s.concat());
        end.z.extend(head.z);
    }
    Ok((Reference { out, lse: None }, end))
}

fn finish(spec: &Spec, n: &[f64], d: f64) -> Vec<f64> {
    let scale = f64::from(spec.scale);
    let factor = match spec.normaliser {
        Normaliser::None => scale,
        Normaliser::SumPlus { eps } => {
            let divisor = scale * d + f64::from(eps);
            if divisor == 0.0 { 0.0 } else { scale / divisor }
        }
    };
    n.iter().map(|n| factor * n).collect()
}

fn dot64(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The heads of a problem, batch by batch.
fn heads(spec: &Spec, x: &Qkv<'_>, initial: Option<&State>) -> Result<Vec<Head64>> {
    let shape = x.shape();
    spec.check(shape.n_heads_q)?;
    if let Some(state) = initial {
        spec.check_state(&shape, state)?;
    }
    let (key_dim, value_dim) = (spec.key_dim(shape.head_dim), shape.head_dim_v);
    let rows = |tensor: &TensorView<'_>, batch, head, mapped: bool| -> Vec<Vec<f64>> {
        let [_, _, len, width] = tensor.shape();
        let mut row = vec![0.0; width];
        (0..len)
            .map(|i| {
                tensor.read_row(batch, head, i, &mut row);
                match &spec.features {
                    Some(map) if mapped => map.define(&row),
                    _ => row.clone(),
                }
            })
            .collect()
    };
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let mut all = Vec::new();
    for at in 0..shape.batch * shape.n_heads_q {
        let (batch, head) = (at / shape.n_heads_q, at % shape.n_heads_q);
        let kv_head = shape.kv_head(head);
        let initial_row = |c: usize| match initial {
            Some(state) => wide(&state.s()[(at * key_dim + c) * value_dim..][..value_dim]),
            None => vec![0.0; value_dim],
        };
        all.push(Head64 {
            q: rows(x.q(), batch, head, true),
            k: rows(x.k(), batch, kv_head, true),
            v: rows(x.v(), batch, kv_head, false),
            s: (0..key_dim).map(initial_row).collect(),
            z: initial
                .and_then(State::z)
                .map_or_else(|| vec![0.0; key_dim], |z| wide(&z[at * key_dim..][..key_dim])),
            log_decay: match &spec.decay {
                Decay::None => 0.0,
                Decay::PerHead(log_decay) => f64::from(log_decay[head]),
            },
            value_dim,
        });
    }
    Ok(all)
}
