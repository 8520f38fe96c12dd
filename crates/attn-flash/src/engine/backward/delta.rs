//! What the backward pass needs of each row beside its log-sum-exp, and the gradient of the sinks.
//!
//! ```text
//! delta_i = dout_i . out_i - dlse_i              dsink_h = - sum_i e^(sink_h - lse_i) delta_i
//! ```

use crate::engine::problem::KvView;
use attn_core::AttnShape;
use attn_core::TensorView;
use attn_core::parallel::for_each_task;

/// Rows that one task takes.
const ROWS: usize = 1024;
/// Rows that are widened at once.
const STEP: usize = 32;

/// `[batch, n_heads_q, n_q]`. Products are summed in f64.
pub(super) fn deltas(
    shape: &AttnShape,
    out: TensorView<'_>,
    grad_out: TensorView<'_>,
    grad_lse: Option<&[f32]>,
) -> Vec<f32> {
    let mut deltas =
        grad_lse.map_or_else(|| vec![0.0; shape.rows()], |grad| grad.iter().map(|g| -g).collect());
    let (out, grad_out) = (KvView::from(out), KvView::from(grad_out));
    let tasks = deltas.chunks_mut(shape.n_q.max(1)).enumerate().flat_map(|(head, deltas)| {
        let blocks = deltas.chunks_mut(ROWS).enumerate();
        blocks.map(move |(block, deltas)| (head, block * ROWS, deltas))
    });
    let width = shape.head_dim_v;
    let scratch = || [vec![0.0; STEP * width], vec![0.0; STEP * width]];
    for_each_task(tasks, scratch, |[a, b], (head, first, deltas): (usize, usize, &mut [f32])| {
        let (batch, head) = (head / shape.n_heads_q, head % shape.n_heads_q);
        let (out, grad_out) = (out.head(batch, head), grad_out.head(batch, head));
        for (at, deltas) in (first..).step_by(STEP).zip(deltas.chunks_mut(STEP)) {
            let range = at..at + deltas.len();
            let (out, grad_out) = (out.slice(range.clone()).wide(a), grad_out.slice(range).wide(b));
            for (i, delta) in deltas.iter_mut().enumerate() {
                *delta = (dot(out.row(i, width), grad_out.row(i, width)) + f64::from(*delta)) as f32;
            }
        }
    });
    deltas
}

/// In eight running sums, which the compiler can keep in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Writes the gradient of the sinks, `[n_heads_q]`.
pub(super) fn sink_gradients(
    shape: &AttnShape,
    sinks: &[f32],
    lse: &[f32],
    delta: &[f32],
    grads: &mut [f32],
) {
    let mut sums = vec![0.0f64; sinks.len()];
    for (row, (&lse, &delta)) in lse.iter().zip(delta).enumerate() {
        let head = row / shape.n_q % shape.n_heads_q;
        if lse != f32::NEG_INFINITY {
            sums[head] -= (f64::from(sinks[head]) - f64::from(lse)).exp() * f64::from(delta);
        }
    }
    grads.iter_mut().zip(sums).for_each(|(grad, sum)| *grad = sum as f32);
}
