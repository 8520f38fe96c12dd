//! What the positions of a prompt are worth after dense causal attention, and which survive.

use super::mass::masses;
use super::policy::{EvictionPolicy, Importance, Pooling, Share};
use attn_core::{AttnError, Qkv, Result};

/// Positions that survive a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Survivors {
    /// `[batch * n_heads_kv]`, each ascending.
    pub positions: Vec<Vec<usize>>,
    /// What every position was worth, forced or not: `[batch * n_heads_kv][n_kv]`; empty if not known.
    pub worth: Vec<Vec<f64>>,
    /// The mass behind it, not divided nor smoothed, where the policy counts mass.
    pub(super) mass: Vec<Vec<f64>>,
}

impl Survivors {
    /// Positions that were chosen elsewhere, `[batch * n_heads_kv]`; nothing is known of what they are worth.
    pub fn new(positions: Vec<Vec<usize>>) -> Self {
        Self { positions, worth: Vec::new(), mass: Vec::new() }
    }
}

/// Smooths neighbours.
pub(super) fn smooth(values: Vec<f64>, kernel: usize, pooling: Pooling) -> Vec<f64> {
    let side = kernel / 2;
    if side == 0 {
        return values;
    }
    let around = |at: usize| &values[at.saturating_sub(side)..(at + side + 1).min(values.len())];
    let of = |at: usize| match pooling {
        Pooling::Mean => around(at).iter().sum::<f64>() / kernel as f64,
        Pooling::Max => around(at).iter().fold(f64::NEG_INFINITY, |max, x| max.max(*x)),
    };
    (0..values.len()).map(of).collect()
}

/// What survives of the keys of `x`, whose last query stands at the last key.
pub(super) fn survivors(policy: &EvictionPolicy, x: &Qkv<'_>, softmax_scale: f32) -> Result<Survivors> {
    let s = x.shape();
    policy.check(s.n_heads_kv)?;
    if s.n_q > s.n_kv {
        return Err(AttnError::shape("q", "n_q", s.n_q, format!("at most n_kv = {}", s.n_kv)));
    }
    let n_rows = match policy.importance {
        Importance::LastQuery => 1,
        Importance::WindowMass { window, .. } => window.min(s.n_q),
        Importance::TotalMass | Importance::MeanMass => s.n_q,
        Importance::Recency | Importance::KeyNorm | Importance::KeyDifference => 0,
    };
    if n_rows > s.n_q {
        return Err(AttnError::shape("q", "n_q", s.n_q, "at least 1, whose weights say what is kept"));
    }
    let mass = if n_rows > 0 { masses(x, softmax_scale, n_rows) } else { Vec::new() };
    let heads = 0..s.batch * s.n_heads_kv;
    let mut worth: Vec<Vec<f64>> = match policy.importance {
        Importance::Recency => heads.map(|_| (0..s.n_kv).map(|at| at as f64).collect()).collect(),
        Importance::KeyNorm => heads.map(|head| key_norms(x, head)).collect(),
        Importance::KeyDifference => heads.map(|head| key_differences(x, head)).collect(),
        Importance::LastQuery | Importance::TotalMass => mass.clone(),
        Importance::MeanMass => {
            let queries = |at: usize| s.n_q.min(s.n_kv - at) as f64;
            let mean = |mass: &Vec<f64>| mass.iter().enumerate().map(|(at, m)| m / queries(at)).collect();
            mass.iter().map(mean).collect()
        }
        Importance::WindowMass { kernel, pooling, .. } => {
            let before = s.n_kv.saturating_sub(policy.recent());
            let smoothed = |mass: &Vec<f64>| {
                let mean: Vec<f64> = mass.iter().map(|mass| mass / n_rows.max(1) as f64).collect();
                let mut worth = smooth(mean[..before].to_vec(), kernel, pooling);
                worth.extend(&mean[before..]);
                worth
            };
            mass.iter().map(smoothed).collect()
        }
    };
    worth.resize(s.batch * s.n_heads_kv, vec![0.0; s.n_kv]);
    if policy.share == Share::Layer {
        for heads in worth.chunks_mut(s.n_heads_kv.max(1)) {
            let mean: Vec<f64> = (0..s.n_kv)
                .map(|at| heads.iter().map(|worth| worth[at]).sum::<f64>() / heads.len() as f64)
                .collect();
            heads.fill(mean);
        }
    }
    let layers = worth.chunks(s.n_heads_kv.max(1));
    let positions = layers.flat_map(|layer| choose(policy, layer, s.n_kv)).collect();
    Ok(Survivors { positions, worth, mass })
}

/// Calls `visit` with every key of a head.
fn each_key(x: &Qkv<'_>, head: usize, mut visit: impl FnMut(&mut [f64])) {
    let s = x.shape();
    let mut k = vec![0.0; s.head_dim];
    for at in 0..s.n_kv {
        x.k().read_row(head / s.n_heads_kv, head % s.n_heads_kv, at, &mut k);
        visit(&mut k);
    }
}

fn key_norms(x: &Qkv<'_>, head: usize) -> Vec<f64> {
    let mut worth = Vec::with_capacity(x.shape().n_kv);
    each_key(x, head, |k| worth.push(-k.iter().map(|k| k * k).sum::<f64>().sqrt()));
    worth
}

fn key_differences(x: &Qkv<'_>, head: usize) -> Vec<f64> {
    let mut anchor = vec![0.0; x.shape().head_dim];
    each_key(x, head, |k| {
        normalise(k);
        anchor.iter_mut().zip(&*k).for_each(|(a, k)| *a += k);
    });
    normalise(&mut anchor);
    let mut worth = Vec::with_capacity(x.shape().n_kv);
    each_key(x, head, |k| {
        normalise(k);
        worth.push(-k.iter().zip(&anchor).map(|(k, a)| k * a).sum::<f64>());
    });
    worth
}

fn normalise(x: &mut [f64]) {
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
    if norm > 0.0 {
        x.iter_mut().for_each(|x| *x /= norm);
    }
}

/// The positions that the heads of a layer keep: forced ones first, then by worth, ties to the lower head and position.
fn choose(policy: &EvictionPolicy, worth: &[Vec<f64>], n: usize) -> Vec<Vec<usize>> {
    let last = n.saturating_sub(1);
    let key = |head: usize, at: usize| match worth[head][at] {
        _ if policy.is_forced(at, last) => f64::INFINITY,
        worth if worth.is_nan() => f64::INFINITY,
        worth => worth,
    };
    let best = |head: usize, keep: usize| {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| {
            let forced = policy.is_forced(*b, last).cmp(&policy.is_forced(*a, last));
            forced.then(key(head, *b).total_cmp(&key(head, *a))).then(a.cmp(b))
        });
        order.truncate(keep);
        order
    };
    let heads = 0..worth.len();
    let mut kept: Vec<Vec<usize>> = match policy.share {
        Share::Head | Share::Layer => {
            heads.map(|head| best(head, if policy.keeps_all(head) { n } else { policy.budget })).collect()
        }
        Share::Budget { .. } => {
            // The safe ones of each head, then the best of all heads' others.
            let mut kept: Vec<Vec<usize>> = Vec::new();
            let mut others: Vec<(f64, usize, usize)> = Vec::new();
            for head in heads {
                let mut order = best(head, n);
                let n_forced = order.iter().filter(|at| policy.is_forced(**at, last)).count();
                let rest = order.split_off(policy.safe().max(n_forced).min(n));
                others.extend(rest.into_iter().map(|at| (key(head, at), head, at)));
                kept.push(order);
            }
            others.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
            let taken: usize = kept.iter().map(Vec::len).sum();
            let room = policy.budget.saturating_mul(worth.len()).saturating_sub(taken);
            others.into_iter().take(room).for_each(|(_, head, at)| kept[head].push(at));
            kept
        }
    };
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    kept
}
