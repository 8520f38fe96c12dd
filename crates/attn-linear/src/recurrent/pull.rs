//! What front ends do to single tokens, backwards.

use super::front::sigmoid;
use crate::matrix_state::{Chunk, Pull, Tokens};
use attn_core::view::Rows;

/// q, k and v as they are.
pub(crate) fn qkv(grads: &Chunk, to: &mut Pull<'_>) {
    to.q.copy_from_slice(&grads.q);
    to.k.copy_from_slice(&grads.k);
    to.v.copy_from_slice(&grads.v);
}

/// The decays as given.
pub(crate) fn decays(grads: &Chunk, to: &mut Pull<'_>) {
    if let Some(d) = to.extra("log_decay") {
        d.copy_from_slice(&grads.log_decay);
    }
}

/// From the gradient of `y = x / sqrt(x . x + eps)` in `d` to that of `x`: `r (dy - y (y . dy))`.
pub(crate) fn normalised(x: Rows<'_, f32>, y: &[f32], eps: f32, d: &mut [f32]) {
    let width = x.width();
    for ((x, y), d) in x.iter().zip(y.chunks_exact(width)).zip(d.chunks_exact_mut(width)) {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() + eps).sqrt();
        let along: f32 = y.iter().zip(&*d).map(|(y, d)| y * d).sum();
        d.iter_mut().zip(y).for_each(|(d, y)| *d = r * (*d - y * along));
    }
}

/// q and k through their norms, if they have them: `to` holds the gradients of what comes out of these.
pub(crate) fn norms(x: &Tokens<'_>, chunk: &Chunk, normed: bool, to: &mut Pull<'_>) {
    if normed {
        normalised(x.q, &chunk.q, 1e-6, to.q);
        normalised(x.k, &chunk.k, 1e-6, to.k);
    }
}

/// The delta rule's `a = -beta k`, `v <- beta v` with one `beta` a write: adds to the gradient of `k`, replaces that of `v`,
/// and tells `d_beta(w, d)`. `values` are the rows before they were multiplied.
pub(crate) fn delta<'a>(
    chunk: &Chunk,
    grads: &Chunk,
    key_dim: usize,
    values: impl Iterator<Item = &'a [f32]>,
    beta: impl Fn(usize) -> f32,
    [d_k, d_v]: [&mut [f32]; 2],
    mut d_beta: impl FnMut(usize, f32),
) {
    for (w, v) in values.enumerate() {
        let (key, value) = (w * key_dim..(w + 1) * key_dim, w * v.len()..(w + 1) * v.len());
        let (k, da, dv) = (&chunk.k[key.clone()], &grads.a[key.clone()], &grads.v[value.clone()]);
        let beta = beta(w);
        d_k[key].iter_mut().zip(da).for_each(|(dk, da)| *dk -= beta * da);
        d_v[value].iter_mut().zip(dv).for_each(|(out, dv)| *out = beta * dv);
        let erased: f32 = k.iter().zip(da).map(|(k, da)| k * da).sum();
        let written: f32 = v.iter().zip(dv).map(|(v, dv)| v * dv).sum();
        d_beta(w, written - erased);
    }
}

/// `sigmoid'(x)`.
pub(crate) fn sigmoid_slope(x: f32) -> f32 {
    sigmoid(x) * sigmoid(-x)
}
