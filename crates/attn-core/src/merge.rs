//! Merging partial softmax results through their log-sum-exp.
//!
//! Two results over disjoint sets of keys, `(out_a, lse_a)` and `(out_b, lse_b)`, give the result over the union:
//!
//! ```text
//! lse = ln(e^lse_a + e^lse_b)        out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
//! ```
//!
//! The operation is associative and commutative up to rounding; an empty part (`lse = -inf`) is its identity.
//! Sources: Milakov and Gimelshein 2018; Rabe and Staats 2021; Dao et al. 2022.

use crate::{AttnError, Result};

/// The weights `(e^(a - lse), e^(b - lse))` and the merged `lse`; both weights are 0 when both parts are empty.
#[inline]
pub fn merge_weights(lse_a: f32, lse_b: f32) -> (f32, f32, f32) {
    if lse_a == f32::NEG_INFINITY && lse_b == f32::NEG_INFINITY {
        return (0.0, 0.0, f32::NEG_INFINITY);
    }
    let max = lse_a.max(lse_b); // ignores a NaN, which reaches the weights below
    let (a, b) = ((lse_a - max).exp(), (lse_b - max).exp());
    let sum = a + b;
    (a / sum, b / sum, max + sum.ln())
}

/// Merges a second part into the first, in place: `out [rows, width]`, `lse [rows]`.
///
/// A row of weight 0 contributes nothing, whatever its values are.
///
/// # Errors
/// [`AttnError::Shape`] if the buffers disagree in length; nothing has then been written.
pub fn merge_into(out: &mut [f32], lse: &mut [f32], part_out: &[f32], part_lse: &[f32]) -> Result<()> {
    if part_lse.len() != lse.len() {
        return Err(AttnError::shape("part_lse", "rows", part_lse.len(), lse.len()));
    }
    if part_out.len() != out.len() {
        return Err(AttnError::shape("part_out", "elements", part_out.len(), out.len()));
    }
    if lse.is_empty() {
        return Ok(());
    }
    if !out.len().is_multiple_of(lse.len()) {
        return Err(AttnError::shape(
            "out",
            "elements",
            out.len(),
            format!("a multiple of {} rows", lse.len()),
        ));
    }
    let width = out.len() / lse.len();
    for (row, (lse, &part_lse)) in lse.iter_mut().zip(part_lse).enumerate() {
        let (keep, add, merged) = merge_weights(*lse, part_lse);
        *lse = merged;
        let rows = out[row * width..][..width].iter_mut().zip(&part_out[row * width..][..width]);
        for (o, p) in rows {
            let kept = if keep == 0.0 { 0.0 } else { keep * *o };
            *o = if add == 0.0 { kept } else { kept + add * p };
        }
    }
    Ok(())
}

/// Sums parts with given weights, `out_i = sum_p gate_p,i part_p,i`, without a normaliser: gated branches (Native Sparse
/// Attention), or a plain average with equal weights. Each part is `[rows, width]` with its gates `[rows]`.
///
/// A gate of 0 contributes nothing, whatever its part holds.
///
/// # Errors
/// [`AttnError::Shape`] if a part or its gates do not fit `out` and `rows`; nothing has then been written.
pub fn gated_sum(out: &mut [f32], rows: usize, parts: &[(&[f32], &[f32])]) -> Result<()> {
    for (part, gates) in parts {
        if part.len() != out.len() {
            return Err(AttnError::shape("part", "elements", part.len(), out.len()));
        }
        if gates.len() != rows {
            return Err(AttnError::shape("gates", "rows", gates.len(), rows));
        }
    }
    if !out.len().is_multiple_of(rows.max(1)) {
        return Err(AttnError::shape("out", "elements", out.len(), format!("a multiple of {rows} rows")));
    }
    let width = out.len() / rows.max(1);
    for (row, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        out.fill(0.0);
        for (part, gates) in parts.iter().filter(|(_, gates)| gates[row] != 0.0) {
            out.iter_mut().zip(&part[row * width..]).for_each(|(o, p)| *o += gates[row] * p);
        }
    }
    Ok(())
}

/// Gradients of [`gated_sum`] for one part: `grad_part_i = gate_i grad_out_i`, `grad_gate_i = grad_out_i . part_i`.
///
/// # Errors
/// [`AttnError::Shape`] if the buffers disagree; nothing has then been written.
pub fn gated_sum_backward(
    grad_out: &[f32],
    part: &[f32],
    gates: &[f32],
    grad_part: &mut [f32],
    grad_gates: &mut [f32],
) -> Result<()> {
    for (name, len) in [("part", part.len()), ("grad_part", grad_part.len())] {
        if len != grad_out.len() {
            return Err(AttnError::shape(name, "elements", len, grad_out.len()));
        }
    }
    if grad_gates.len() != gates.len() {
        return Err(AttnError::shape("grad_gates", "rows", grad_gates.len(), gates.len()));
    }
    if gates.is_empty() {
        return Ok(());
    }
    if !grad_out.len().is_multiple_of(gates.len()) {
        let expected = format!("a multiple of {} rows", gates.len());
        return Err(AttnError::shape("grad_out", "elements", grad_out.len(), expected));
    }
    let width = grad_out.len() / gates.len();
    for (row, (gate, grad_gate)) in gates.iter().zip(grad_gates).enumerate() {
        let of = row * width..(row + 1) * width;
        *grad_gate = grad_out[of.clone()].iter().zip(&part[of.clone()]).map(|(g, p)| g * p).sum();
        grad_part[of.clone()].iter_mut().zip(&grad_out[of]).for_each(|(to, g)| *to = gate * g);
    }
    Ok(())
}

/// A sink logit enters the normaliser of finished rows and has no value: `lse' = ln(e^lse + e^sink)`,
/// `out' = e^(lse - lse') out`. Apply it once, after all merges. `out [rows, width]`, `lse [rows]`, one logit a row.
///
/// # Errors
/// [`AttnError::Shape`] if the buffers disagree; nothing has then been written.
pub fn apply_sinks(out: &mut [f32], lse: &mut [f32], sinks: &[f32]) -> Result<()> {
    if sinks.len() != lse.len() {
        return Err(AttnError::shape("sinks", "rows", sinks.len(), lse.len()));
    }
    let nothing = vec![0.0; out.len()];
    merge_into(out, lse, &nothing, sinks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_sums() {
        let (a, b, lse) = merge_weights(1f32.ln(), 3f32.ln());
        assert!((a - 0.25).abs() < 1e-6 && (b - 0.75).abs() < 1e-6 && (lse - 4f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn an_empty_part_changes_nothing() {
        let (mut out, mut lse) = (vec![1.0, 2.0], vec![0.5]);
        merge_into(&mut out, &mut lse, &[f32::NAN, f32::NAN], &[f32::NEG_INFINITY]).unwrap();
        assert_eq!((out.as_slice(), lse.as_slice()), (&[1.0, 2.0][..], &[0.5][..]));
        let (mut out, mut lse) = (vec![0.0, 0.0], vec![f32::NEG_INFINITY]);
        merge_into(&mut out, &mut lse, &[1.0, 2.0], &[0.5]).unwrap();
        assert_eq!((out.as_slice(), lse.as_slice()), (&[1.0, 2.0][..], &[0.5][..]));
        let (mut out, mut lse) = (vec![9.0], vec![f32::NEG_INFINITY]);
        merge_into(&mut out, &mut lse, &[9.0], &[f32::NEG_INFINITY]).unwrap();
        assert_eq!((out[0], lse[0]), (0.0, f32::NEG_INFINITY));
    }

    #[test]
    fn a_nan_part_is_never_lost() {
        for (a, b) in [(f32::NAN, f32::NEG_INFINITY), (f32::NEG_INFINITY, f32::NAN), (f32::NAN, 1.0)] {
            let (keep, add, lse) = merge_weights(a, b);
            assert!(keep.is_nan() && add.is_nan() && lse.is_nan(), "{a} and {b}");
        }
    }

    #[test]
    fn huge_log_sums_do_not_overflow() {
        let (a, b, lse) = merge_weights(1e30, -1e30);
        assert_eq!((a, b, lse), (1.0, 0.0, 1e30));
    }

    #[test]
    fn lengths_are_checked() {
        let (mut out, mut lse) = (vec![0.0; 4], vec![0.0; 2]);
        assert!(merge_into(&mut out, &mut lse, &[0.0; 4], &[0.0; 3]).is_err());
        assert!(merge_into(&mut out, &mut lse, &[0.0; 3], &[0.0; 2]).is_err());
        assert!(merge_into(&mut out[..3], &mut lse, &[0.0; 3], &[0.0; 2]).is_err());
    }

    #[test]
    fn gates_weigh_and_pass_gradients_on() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [f32::NAN, f32::NAN, 10.0, 20.0]);
        let mut out = [9.0; 4];
        gated_sum(&mut out, 2, &[(&a, &[0.5, 1.0]), (&b, &[0.0, 2.0])]).unwrap();
        assert_eq!(out, [0.5, 1.0, 23.0, 44.0]);
        let (mut grad_part, mut grad_gates) = ([0.0; 4], [0.0; 2]);
        gated_sum_backward(&[1.0, 1.0, 1.0, -1.0], &a, &[0.5, 2.0], &mut grad_part, &mut grad_gates).unwrap();
        assert_eq!((grad_part, grad_gates), ([0.5, 0.5, 2.0, -2.0], [3.0, -1.0]));
        assert!(gated_sum(&mut out, 2, &[(&a, &[0.5])]).unwrap_err().to_string().contains("gates"));
        assert!(gated_sum(&mut out, 3, &[]).is_err());
    }

    #[test]
    fn a_sink_takes_weight_and_gives_nothing() {
        let (mut out, mut lse) = ([2.0, 3.0], [2f32.ln(), f32::NEG_INFINITY]);
        apply_sinks(&mut out, &mut lse, &[2f32.ln(), 1.0]).unwrap();
        assert!((out[0] - 1.0).abs() < 1e-6 && (lse[0] - 4f32.ln()).abs() < 1e-6, "{out:?} {lse:?}");
        assert_eq!((out[1], lse[1]), (0.0, 1.0));
    }
}
