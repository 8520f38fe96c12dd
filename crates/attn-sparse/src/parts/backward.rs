//! Gradients, part by part.

use super::forward::gathered;
use super::order::{Gathered, gather_numbers};
use super::{Order, Part};
use attn_core::parallel::for_each_task;
use attn_core::score::Unchanged;
use attn_core::view::ViewMut;
use attn_core::{Qkv, Result, TensorView};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};

/// Gradients of one source.
pub(crate) struct SourceGrads {
    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub(crate) q: Vec<f32>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub(crate) k: Vec<f32>,
    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub(crate) v: Vec<f32>,
}

/// Gradients of all sources from the merged rows `(out, lse)` and the gradient of the output.
pub(crate) fn backward<const N: usize>(
    sources: &[Qkv<'_>; N],
    parts: &[Part],
    softmax_scale: f32,
    (out, lse): (TensorView<'_>, &[f32]),
    grad_out: TensorView<'_>,
) -> Result<[SourceGrads; N]> {
    let shape = sources[0].shape();
    let zeros = |axes: [usize; 4]| vec![0.0f32; axes.iter().product()];
    let mut sums =
        [(); N].map(|()| SourceGrads { q: zeros(shape.q()), k: zeros(shape.k()), v: zeros(shape.v()) });
    for part in parts {
        let [q, k, v] = gathered(sources, part)?;
        let x = Qkv::new(q.view()?, k.view()?, v.view()?)?;
        let rows = x.shape();
        if rows.rows() == 0 {
            continue;
        }
        let (part_out, part_grad) =
            (Gathered::new(out, &part.queries), Gathered::new(grad_out, &part.queries));
        let axes = [shape.batch, shape.n_heads_q, shape.n_q];
        let lse = gather_numbers(lse, axes, &part.queries, f32::NEG_INFINITY);
        let (mut grad_q, mut grad_k, mut grad_v) = (zeros(rows.q()), zeros(rows.k()), zeros(rows.v()));
        let grads = Grads::new(
            ViewMut::contiguous("grad_q", &mut grad_q, rows.q())?.into(),
            ViewMut::contiguous("grad_k", &mut grad_k, rows.k())?.into(),
            ViewMut::contiguous("grad_v", &mut grad_v, rows.v())?.into(),
        );
        let spec = AnySpec::new(softmax_scale, &*part.mask, &Unchanged);
        let forward = ForwardResult { out: part_out.view()?, lse: &lse };
        let grad = OutputGrad { out: part_grad.view()?, lse: None };
        attend_backward_any(Problem::batch(x), forward, grad, grads, &spec)?;
        let sums = &mut sums[part.source];
        add(&mut sums.q, &grad_q, &part.queries, shape.q());
        add(&mut sums.k, &grad_k, &part.keys, shape.k());
        add(&mut sums.v, &grad_v, &part.keys, shape.v());
    }
    Ok(sums)
}

/// Adds gradients of gathered rows to those of the rows `[batch, heads, n, width]` they were gathered from.
fn add(sums: &mut [f32], part: &[f32], order: &Order, [_, heads, n, width]: [usize; 4]) {
    let len = order.len(n);
    if n == 0 || len == 0 {
        return;
    }
    let pairs = sums.chunks_exact_mut(n * width).zip(part.chunks_exact(len * width)).enumerate();
    for_each_task(
        pairs,
        || (),
        |(), (head, (sums, part))| {
            for (place, row) in order.places(head / heads, n) {
                let part = &part[place * width..][..width];
                sums[row * width..][..width].iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        },
    );
}
