//! The definition, cluster by cluster in f64.

use super::Routing;
use super::inputs::Checked;
use attn_core::Qkv;
use attn_core::exact::Reference;

pub(super) fn definition(config: &Routing, x: &Qkv<'_>, inputs: &Checked<'_>) -> Reference {
    let shape = x.shape();
    let (d, d_v) = (shape.head_dim, shape.head_dim_v);
    let row = |rows: &[f64], i: usize, width: usize| rows[i * width..][..width].to_vec();
    let wide = |rows: &[f32], i: usize, width: usize| -> Vec<f64> {
        rows[i * width..][..width].iter().map(|x| f64::from(*x)).collect()
    };
    let mut all = Vec::new();
    for at in (0..shape.batch).flat_map(|b| (0..shape.n_heads_q).map(move |h| [b, h])) {
        let [batch, head] = at;
        let kv_head = shape.kv_head(head);
        let (queries, values) = (x.q().head_f64(batch, head), x.v().head_f64(batch, kv_head));
        let keys = if config.shared_qk { queries.clone() } else { x.k().head_f64(batch, kv_head) };
        let [lists_q, lists_k] = inputs.lists(config, x, at);
        let mut out = vec![0.0; shape.n_q * d_v];
        let mut counts = vec![0.0; shape.n_q];
        for cluster in 0..inputs.clusters {
            let memory = (head * inputs.clusters + cluster) * inputs.n_memory;
            let list = |all: &[i32], window: usize| -> Vec<usize> {
                all[cluster * window..][..window].iter().filter_map(|t| usize::try_from(*t).ok()).collect()
            };
            for i in list(&lists_q, inputs.windows[0]) {
                let query = row(&queries, i, d);
                let dot = |key: &[f64]| -> f64 { query.iter().zip(key).map(|(q, k)| q * k).sum() };
                let scale = f64::from(inputs.softmax_scale);
                let mut seen: Vec<(f64, Vec<f64>)> = (memory..memory + inputs.n_memory)
                    .map(|m| (scale * dot(&wide(inputs.memory[0], m, d)), wide(inputs.memory[1], m, d_v)))
                    .collect();
                for j in list(&lists_k, inputs.windows[1]) {
                    if config.causal && j + shape.n_q > i + shape.n_kv {
                        continue;
                    }
                    let key = row(&keys, j, d);
                    let length = key.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                    let score = match config.shared_qk {
                        true if i == j => f64::from(config.self_logit),
                        true => scale * dot(&key) / length,
                        false => scale * dot(&key),
                    };
                    seen.push((score, row(&values, j, d_v)));
                }
                if seen.is_empty() {
                    continue;
                }
                let most = seen.iter().map(|(s, _)| *s).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = seen.iter().map(|(s, _)| (s - most).exp()).sum();
                counts[i] += 1.0;
                for (score, value) in &seen {
                    let weight = (score - most).exp() / sum;
                    out[i * d_v..][..d_v].iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
            }
        }
        for (row, count) in out.chunks_exact_mut(d_v).zip(counts) {
            let divisor = if count == 0.0 { 1.0 } else { count + f64::from(config.mean_eps) };
            row.iter_mut().for_each(|o| *o /= divisor);
        }
        all.extend(out);
    }
    Reference { out: all, lse: None }
}
