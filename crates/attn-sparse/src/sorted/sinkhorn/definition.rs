//! The definition, query by query in f64.

use super::SinkhornKind;
use super::forward::Forward;
use super::groups::Sizes;
use super::layout::Buckets;
use crate::sorted::rows::heads;
use attn_core::exact::Reference;

pub(super) fn definition(forward: &Forward<'_>) -> Reference {
    let (x, shape) = (&forward.x, forward.x.shape());
    let (d, d_v) = (shape.head_dim, shape.head_dim_v);
    let mut out = Vec::new();
    for at in heads(&shape).into_iter().take(if shape.n_q > 0 { usize::MAX } else { 0 }) {
        let buckets = Buckets::new(forward.config, &shape, at[1]);
        let (weights, sizes) = (forward.weights(at), Sizes::new(forward));
        let n_null = weights.sources - buckets.count;
        let kv_head = shape.kv_head(at[1]);
        let queries = x.q().head_f64(at[0], at[1]);
        let (keys, values) = (x.k().head_f64(at[0], kv_head), x.v().head_f64(at[0], kv_head));
        let null = |rows: Option<&[f32]>, width: usize| -> Vec<f64> {
            let null =
                rows.map(|rows| rows[at[1] * width..][..width].iter().map(|x| f64::from(*x)).collect());
            null.unwrap_or_else(|| vec![0.0; width])
        };
        let (null_key, null_value) = (null(forward.inputs.null_key, d), null(forward.inputs.null_value, d_v));
        // Slot `e` of a row of weights, if anything is mixed into it.
        let mixture = |row: usize, e: usize, rows: &[f64], null: &[f64]| -> Option<Vec<f64>> {
            let width = null.len();
            let mut sum = None;
            for (source, weight) in weights.row(row) {
                let from = match source.checked_sub(n_null) {
                    None => null,
                    Some(bucket) => match buckets.token(bucket, e) {
                        None => continue,
                        Some(token) => &rows[token * width..][..width],
                    },
                };
                let sum = sum.get_or_insert_with(|| vec![0.0; width]);
                sum.iter_mut().zip(from).for_each(|(sum, x)| *sum += f64::from(weight) * x);
            }
            sum
        };
        for i in 0..shape.n_q {
            let query = &queries[i * d..][..d];
            let (bucket, _) = buckets.place(i);
            let mut seen: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
            for row in (0..sizes.mixtures).filter_map(|r| sizes.row(bucket, r)) {
                for e in 0..buckets.size {
                    seen.extend(mixture(row, e, &keys, &null_key).zip(mixture(row, e, &values, &null_value)));
                }
            }
            let causal = forward.config.kind == SinkhornKind::Causal;
            for j in (0..buckets.size).filter_map(|e| buckets.token(bucket, e)).filter(|j| !causal || *j <= i)
            {
                seen.push((keys[j * d..][..d].to_vec(), values[j * d_v..][..d_v].to_vec()));
            }
            let score = |key: &[f64]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
            let scale = f64::from(forward.softmax_scale);
            let scores: Vec<f64> = seen.iter().map(|(key, _)| scale * score(key)).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let mut row = vec![0.0; d_v];
            for (score, (_, value)) in scores.iter().zip(&seen) {
                let weight = (score - most).exp() / sum;
                row.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
            }
            out.extend(row);
        }
    }
    Reference { out, lse: None }
}
