//! How much f32 resolves of a softmax row: a file may ask for more.
//!
//! A score rounded to f32 is off by up to `u |s|` with `u = 2^-24`, which its exponential turns into a relative error of the
//! weight. With a few roundings more (products, exponential, sums), `S_i = max_j |s_ij|` and `c = 4`,
//!
//! ```text
//! |out_ic - exact| <= c u (1 + S_i) sum_j p_ij |v_jc|          |lse_i - exact| <= c u (1 + S_i)
//! ```
//!
//! The sum is the variant's own output for `|v|`. An element outside the file's tolerance but inside this bound says that
//! the file asks for more digits than f32 has (values that cancel, a log-sum-exp near zero from large scores), not that a
//! kernel is wrong. It is counted and said, never hidden.

use super::Plan;
use attn_core::registry::{Entry, NamedTensor, TensorData};
use attn_core::{DType, Result};

/// Roundings counted by the bound.
const ROUNDINGS: f64 = 4.0;

/// What f32 resolves of each element of an output; `None` for what is no softmax row in f32.
///
/// # Errors
/// Those of running the variant.
pub(super) fn of(entry: &Entry, plan: &Plan, output: &str) -> Result<Option<Vec<f64>>> {
    let x = plan.inputs.qkv()?;
    if entry.build(&plan.options)?.as_softmax().is_none() || x.dtype() != DType::F32 {
        return Ok(None);
    }
    let (shape, scale) = (x.shape(), plan.options.get::<f64>("scale")?);
    let scale = scale.unwrap_or(1.0 / (shape.head_dim as f64).sqrt()).abs();
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
    Ok(match output {
        "lse" => Some(rows),
        "o" => {
            let mut inputs = plan.inputs.clone();
            if let Some(NamedTensor { data: TensorData::F32(v), .. }) = inputs.0.get_mut("v") {
                v.iter_mut().for_each(|v| *v = v.abs());
            }
            let sums = entry.run(&plan.options, &inputs)?.require("o")?.data.to_f64();
            let of_row = |at: usize| rows[at / shape.head_dim_v];
            Some(sums.iter().enumerate().map(|(at, sum)| of_row(at) * sum).collect())
        }
        _ => None,
    })
}
