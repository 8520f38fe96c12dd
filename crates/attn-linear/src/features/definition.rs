//! The definition of kernelised attention: every pair of a query and a key, in f64.
//!
//! With a gate `r`, key `j` weighs `(1 - r) r^(i - j)` times as much for query `i`.

use super::maps::{Map, Place, Side};
use super::variant::{FeatureSpec, Normaliser};
use attn_core::Qkv;
use attn_core::exact::Reference;

/// All rows.
pub(super) fn definition(spec: &FeatureSpec, causal: bool, x: &Qkv<'_>) -> Reference {
    let s = x.shape();
    let mut out = Vec::with_capacity(s.out().iter().product());
    for batch in 0..s.batch {
        for head in 0..s.n_heads_q {
            let kv = s.kv_head(head);
            let keys = x.k().head_f64(batch, kv);
            let shift =
                if spec.key_max { spec.keys.define_shift(head, &keys, s.head_dim) } else { Vec::new() };
            let features = |map: &Map, side, rows: Vec<f64>| -> Vec<Vec<f64>> {
                let shift: &[f32] = if side == Side::Key { &shift } else { &[] };
                let rows = rows.chunks_exact(s.head_dim).enumerate();
                rows.map(|(first, row)| map.define(Place { side, head, first, len: 1, shift }, row)).collect()
            };
            let q = features(&spec.queries, Side::Query, x.q().head_f64(batch, head));
            let k = features(&spec.keys, Side::Key, keys.clone());
            let v = x.v().head_f64(batch, kv);
            for (i, q) in q.iter().enumerate() {
                let seen = if causal { i + 1 } else { s.n_kv };
                out.extend(row(spec, q, &k[..seen], &v, s.head_dim_v));
            }
        }
    }
    Reference { out, lse: None }
}

/// One row by the quadratic formula.
fn row(spec: &FeatureSpec, q: &[f64], keys: &[Vec<f64>], v: &[f64], width: usize) -> Vec<f64> {
    let scale = f64::from(spec.scale);
    let mut sums: Vec<f64> = vec![0.0; q.len()];
    keys.iter().for_each(|k| sums.iter_mut().zip(k).for_each(|(sum, k)| *sum += k));
    let (mut out, mut d) = (vec![0.0; width], 0.0);
    for (j, k) in keys.iter().enumerate() {
        let pairs = q.iter().zip(k).zip(&sums);
        let weight: f64 = match spec.normaliser {
            Normaliser::Rows => pairs.map(|((q, k), z)| if *z == 0.0 { 0.0 } else { q * k / z }).sum(),
            _ => pairs.map(|((q, k), _)| q * k).sum(),
        };
        let weight = match spec.gate.map(f64::from) {
            Some(r) => weight * (1.0 - r) * r.powi((keys.len() - 1 - j) as i32),
            None => weight,
        };
        d += scale * weight;
        out.iter_mut().zip(&v[j * width..]).for_each(|(o, v)| *o += scale * weight * v);
    }
    let divisor = match spec.normaliser {
        Normaliser::None | Normaliser::Rows => 1.0,
        Normaliser::Plus(eps) => d + f64::from(eps),
        Normaliser::AtLeast(eps) => d.max(f64::from(eps)),
        Normaliser::EachPlus(eps) => d + f64::from(eps) * scale * q.iter().sum::<f64>(),
    };
    out.iter().map(|o| if divisor == 0.0 { 0.0 } else { o / divisor }).collect()
}
