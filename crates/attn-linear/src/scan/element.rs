//! The scan itself: one number a channel.
//!
//! ```text
//! h_t = h_(t-1) - l_t h_(t-1) + x_t          l_t = 1 - e^(g_t), the loss
//! ```
//!
//! and backwards, with `dh` the gradient by `h_t` through everything later,
//!
//! ```text
//! dh += do_t      dx_t = dh      dl_t = -dh h_(t-1)      dh <- dh - l_t dh
//! ```
//!
//! Channels lie in the vector lanes, several vectors at a time: a channel's own chain has to wait for itself.

use super::cell::{Panel, PanelMut};
use attn_core::simd::{Simd, SimdBase, SimdFloat};

/// Vectors of channels done together.
const VECTORS: usize = 4;

/// `h_t` of all `len` tokens into `out`; `h` moves from before the first to after the last.
#[inline(always)]
pub(crate) fn scan<S: Simd>(
    simd: S,
    len: usize,
    loss: Panel<'_>,
    x: Panel<'_>,
    h: &mut [f32],
    mut out: PanelMut<'_>,
) {
    let mut c = 0;
    while c + VECTORS * S::f32s::LEN <= h.len() {
        scan_columns::<S, VECTORS>(simd, len, c, loss, x, h, &mut out);
        c += VECTORS * S::f32s::LEN;
    }
    while c < h.len() {
        scan_columns::<S, 1>(simd, len, c, loss, x, h, &mut out);
        c += S::f32s::LEN;
    }
}

#[inline(always)]
fn scan_columns<S: Simd, const N: usize>(
    simd: S,
    len: usize,
    c: usize,
    loss: Panel<'_>,
    x: Panel<'_>,
    h: &mut [f32],
    out: &mut PanelMut<'_>,
) {
    let load =
        |row: &[f32], v: usize| S::f32s::from_slice(simd, &row[c + v * S::f32s::LEN..][..S::f32s::LEN]);
    let mut now: [S::f32s; N] = std::array::from_fn(|v| load(h, v));
    for t in 0..len {
        let (loss, x, out) = (loss.row(t), x.row(t), out.row(t));
        for (v, h) in now.iter_mut().enumerate() {
            *h = *h + (-load(loss, v)).mul_add(*h, load(x, v));
            h.store_slice(&mut out[c + v * S::f32s::LEN..][..S::f32s::LEN]);
        }
    }
    for (v, now) in now.iter().enumerate() {
        now.store_slice(&mut h[c + v * S::f32s::LEN..][..S::f32s::LEN]);
    }
}

/// What the backward pass of [`scan`] reads.
#[derive(Clone, Copy)]
pub(crate) struct ScanBack<'a> {
    pub(crate) len: usize,
    pub(crate) loss: Panel<'a>,
    /// The state before the first token.
    pub(crate) before: &'a [f32],
    /// The states after each token, as [`scan`] gave them.
    pub(crate) states: Panel<'a>,
    /// Gradients by them.
    pub(crate) grad: Panel<'a>,
}

/// Gradients by loss and input, row by row; `dh` moves from after the last token to before the first.
#[inline(always)]
pub(crate) fn scan_back<S: Simd>(
    simd: S,
    given: ScanBack<'_>,
    dh: &mut [f32],
    mut dloss: PanelMut<'_>,
    mut dx: PanelMut<'_>,
) {
    let load = |row: &[f32], c: usize| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
    for c in (0..dh.len()).step_by(S::f32s::LEN) {
        let mut grad = load(dh, c);
        for t in (0..given.len).rev() {
            grad += load(given.grad.row(t), c);
            let before = if t == 0 { given.before } else { given.states.row(t - 1) };
            grad.store_slice(&mut dx.row(t)[c..c + S::f32s::LEN]);
            (-grad * load(before, c)).store_slice(&mut dloss.row(t)[c..c + S::f32s::LEN]);
            grad = (-load(given.loss.row(t), c)).mul_add(grad, grad);
        }
        grad.store_slice(&mut dh[c..c + S::f32s::LEN]);
    }
}
