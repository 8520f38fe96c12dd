//! Softmax over the visible part of each row of scores, with its gradient, in one pass over memory.
//!
//! ```text
//! p_j  = e^(s_j − m) / Σ_visible e^(s_j − m)   for visible j, else 0
//! ds_j = p_j (dp_j − Σ_j p_j dp_j)
//! ```
//!
//! In both masks a row sees one range of columns, so no mask tensor is built, and hidden scores are never read.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

use super::rows::{f32_rows, no_input};

/// Which columns each row of `[.., n_rows, n_cols]` scores sees.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Visible {
    /// Row `r` is position `first_row + r` and sees the columns up to it.
    Causal { first_row: usize },
    /// Block `b` of every `n_blocks`: row `r` is query `b·window + r`, column `c` is key `(b − 1)·window + c`;
    /// the last `window` keys up to the query are seen. Keys before the text do not exist.
    Band { window: usize, n_blocks: usize },
}

impl Visible {
    fn columns(self, matrix: usize, row: usize) -> Range<usize> {
        match self {
            Self::Causal { first_row } => 0..first_row + row + 1,
            Self::Band { window, n_blocks } => {
                let first_key = if matrix.is_multiple_of(n_blocks) { window } else { 0 };
                first_key.max(row + 1)..row + window + 1
            }
        }
    }
}

/// `softmax` of `scores [.., n_rows, n_cols]` over the visible columns.
pub(crate) fn masked_softmax(scores: &Tensor, visible: Visible) -> candle_core::Result<Tensor> {
    scores.apply_op1(MaskedSoftmax(visible))
}

struct MaskedSoftmax(Visible);

impl CustomOp1 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let scores = f32_rows(scores, layout)?;
        let (n_rows, n_cols) = matrix_dims(layout)?;
        let mut probs = vec![0.0; scores.len()];
        let rows = scores.chunks_exact(n_cols).zip(probs.chunks_exact_mut(n_cols));
        for (index, (scores, probs)) in rows.enumerate() {
            let columns = self.0.columns(index / n_rows, index % n_rows);
            softmax(&scores[columns.clone()], &mut probs[columns]);
        }
        Ok((CpuStorage::F32(probs), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, probs: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        probs.apply_op2_no_bwd(&grad.contiguous()?, &MaskedSoftmaxGrad(self.0)).map(Some)
    }
}

struct MaskedSoftmaxGrad(Visible);

impl CustomOp2 for MaskedSoftmaxGrad {
    fn name(&self) -> &'static str {
        "masked-softmax-grad"
    }

    fn cpu_fwd(
        &self,
        probs: &CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (probs, grad) = (f32_rows(probs, layout)?, f32_rows(grad, grad_layout)?);
        let (n_rows, n_cols) = matrix_dims(layout)?;
        let mut out = vec![0.0; probs.len()];
        for (index, out) in out.chunks_exact_mut(n_cols).enumerate() {
            let columns = self.0.columns(index / n_rows, index % n_rows);
            let row = index * n_cols + columns.start..index * n_cols + columns.end;
            let (probs, grad) = (&probs[row.clone()], &grad[row]);
            let mean = dot(probs, grad);
            for ((out, p), g) in out[columns].iter_mut().zip(probs).zip(grad) {
                *out = p * (g - mean);
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

fn matrix_dims(layout: &Layout) -> candle_core::Result<(usize, usize)> {
    match layout.dims() {
        [.., n_rows, n_cols] if *n_cols > 0 && *n_rows > 0 => Ok((*n_rows, *n_cols)),
        _ => Err(no_input("masked softmax", layout)),
    }
}

fn softmax(scores: &[f32], probs: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (p, s) in probs.iter_mut().zip(scores) {
        *p = (s - max).exp();
        sum += *p;
    }
    let inverse = 1.0 / sum;
    probs.iter_mut().for_each(|p| *p *= inverse);
}

/// Eight partial sums: one chain of additions would wait for each other.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (a, b) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
