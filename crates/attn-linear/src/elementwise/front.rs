//! What turns a channel's inputs into a loss and a written number, and the cell around it.

use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use crate::scan::element::{ScanBack, scan, scan_back};
use crate::scan::math::sigmoid;
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::MAX_LANES;

/// The inputs of some channels at one token; those beyond [`Front::INPUTS`] are zero.
pub(super) type Channels<V> = [V; 3];

/// `(loss, x)` of a channel from its inputs and its parameter.
pub trait Front: Send + Sync {
    /// Inputs read, at most three.
    const INPUTS: usize;

    /// `first` says that the token is the first one of all.
    fn forward<S: Simd>(
        &self,
        simd: S,
        first: bool,
        param: S::f32s,
        inputs: Channels<S::f32s>,
    ) -> (S::f32s, S::f32s);

    /// Gradients by the inputs and the parameter, from those by loss and x.
    fn backward<S: Simd>(
        &self,
        simd: S,
        first: bool,
        param: S::f32s,
        inputs: Channels<S::f32s>,
        grads: (S::f32s, S::f32s),
    ) -> (Channels<S::f32s>, S::f32s);
}

/// Loss and x of all tokens.
#[inline(always)]
pub(crate) fn front<S: Simd, F: Front>(
    simd: S,
    front: &F,
    piece: Piece<'_>,
    params: &[f32],
    mut loss: PanelMut<'_>,
    mut x: PanelMut<'_>,
) {
    let load = |row: &[f32], c: usize| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
    for t in 0..piece.len {
        let (loss, x) = (loss.row(t), x.row(t));
        for c in (0..loss.len()).step_by(S::f32s::LEN) {
            let inputs = channels(simd, piece.inputs, t, c, F::INPUTS);
            let (l, w) = front.forward(simd, piece.first + t == 0, load(params, c), inputs);
            l.store_slice(&mut loss[c..c + S::f32s::LEN]);
            w.store_slice(&mut x[c..c + S::f32s::LEN]);
        }
    }
}

/// Gradients by the inputs and the parameters of [`front`].
#[inline(always)]
pub(crate) fn front_back<S: Simd, F: Front>(
    simd: S,
    front: &F,
    piece: Piece<'_>,
    params: &[f32],
    (dloss, dx): (Panel<'_>, Panel<'_>),
    grads: &mut [PanelMut<'_>],
    dparams: &mut [f32],
) {
    let load = |row: &[f32], c: usize| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
    for c in (0..dloss.stride).step_by(S::f32s::LEN) {
        let param = load(params, c);
        let mut dparam = load(dparams, c);
        for t in 0..piece.len {
            let inputs = channels(simd, piece.inputs, t, c, F::INPUTS);
            let by = (load(dloss.row(t), c), load(dx.row(t), c));
            let (by_inputs, by_param) = front.backward(simd, piece.first + t == 0, param, inputs, by);
            for (grad, by) in grads.iter_mut().zip(by_inputs) {
                by.store_slice(&mut grad.row(t)[c..c + S::f32s::LEN]);
            }
            dparam += by_param;
        }
        dparam.store_slice(&mut dparams[c..c + S::f32s::LEN]);
    }
}

#[inline(always)]
fn channels<S: Simd>(simd: S, panels: &[Panel<'_>], t: usize, c: usize, n: usize) -> Channels<S::f32s> {
    std::array::from_fn(|at| {
        if at < n {
            S::f32s::from_slice(simd, &panels[at].row(t)[c..c + S::f32s::LEN])
        } else {
            S::f32s::splat(simd, 0.0)
        }
    })
}

/// A front, the scan, and if `gated` the output gate `o = sigmoid(q) o h` whose pre-activations are then the first input.
#[derive(Debug, Clone)]
pub struct ElementCell<F> {
    pub(crate) front: F,
    /// Channels a head.
    pub(crate) width: usize,
    pub(crate) gated: bool,
    /// `[heads, channels padded to vectors]`; empty for a front without parameter.
    pub(crate) params: Vec<f32>,
}

impl<F: Front> ElementCell<F> {
    fn stride(&self) -> usize {
        self.width.next_multiple_of(MAX_LANES)
    }

    fn params_of(&self, head: usize) -> &[f32] {
        if self.params.is_empty() { &[] } else { &self.params[head * self.stride()..][..self.stride()] }
    }
}

/// Cuts scratch into `N` panels of `len` rows.
#[inline(always)]
pub(crate) fn panels<const N: usize>(scratch: &mut [f32], len: usize, stride: usize) -> [PanelMut<'_>; N] {
    let mut rest = scratch;
    std::array::from_fn(|_| {
        let (data, after) = std::mem::take(&mut rest).split_at_mut(len * stride);
        rest = after;
        PanelMut { data, stride }
    })
}

/// `out = sigmoid(q) o h`.
#[inline(always)]
pub(crate) fn gate<S: Simd>(simd: S, len: usize, q: Panel<'_>, h: Panel<'_>, out: &mut PanelMut<'_>) {
    for t in 0..len {
        let (q, h, out) = (q.row(t), h.row(t), out.row(t));
        for c in (0..out.len()).step_by(S::f32s::LEN) {
            let load = |row: &[f32]| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
            (sigmoid(simd, load(q)) * load(h)).store_slice(&mut out[c..c + S::f32s::LEN]);
        }
    }
}

/// Gradients of [`gate`] by `q` and `h`.
#[inline(always)]
pub(crate) fn gate_back<S: Simd>(
    simd: S,
    len: usize,
    (q, h, dout): (Panel<'_>, Panel<'_>, Panel<'_>),
    dq: &mut PanelMut<'_>,
    dh: &mut PanelMut<'_>,
) {
    for t in 0..len {
        let (q, h, dout, dq, dh) = (q.row(t), h.row(t), dout.row(t), dq.row(t), dh.row(t));
        for c in (0..dq.len()).step_by(S::f32s::LEN) {
            let load = |row: &[f32]| S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN]);
            let s = sigmoid(simd, load(q));
            let by = load(dout) * s;
            by.store_slice(&mut dh[c..c + S::f32s::LEN]);
            (by * load(h) * (S::f32s::splat(simd, 1.0) - s)).store_slice(&mut dq[c..c + S::f32s::LEN]);
        }
    }
}

impl<F: Front> Cell for ElementCell<F> {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width; F::INPUTS + usize::from(self.gated)]
    }

    fn out_width(&self) -> usize {
        self.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[1, self.width]]
    }

    fn params(&self) -> usize {
        if self.params.is_empty() { 0 } else { self.stride() }
    }

    fn scratch(&self, len: usize) -> usize {
        (6 * len + 2) * self.stride()
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        mut out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (len, stride) = (piece.len, self.stride());
        let [mut loss, mut x, mut h] = panels(scratch, len, stride);
        let zeros;
        let params = match self.params_of(piece.head) {
            [] => {
                zeros = vec![0.0; stride];
                &zeros[..]
            }
            params => params,
        };
        let inputs = &piece.inputs[usize::from(self.gated)..];
        front(simd, &self.front, Piece { inputs, ..piece }, params, reborrow(&mut loss), reborrow(&mut x));
        if self.gated {
            scan(simd, len, loss.as_panel(), x.as_panel(), state[0], reborrow(&mut h));
            gate(simd, len, piece.inputs[0], h.as_panel(), &mut out);
        } else {
            scan(simd, len, loss.as_panel(), x.as_panel(), state[0], out);
        }
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        let (len, stride) = (piece.len, self.stride());
        let (scratch, rows) = scratch.split_at_mut(6 * len * stride);
        let [mut loss, mut x, mut h, mut dloss, mut dx, mut dh] = panels(scratch, len, stride);
        let (now, none) = rows.split_at_mut(stride);
        none.fill(0.0);
        let params = self.params_of(piece.head);
        let params = if params.is_empty() { &none[..] } else { params };
        let inner = Piece { inputs: &piece.inputs[usize::from(self.gated)..], ..piece };
        front(simd, &self.front, inner, params, reborrow(&mut loss), reborrow(&mut x));
        now.copy_from_slice(state[0]);
        scan(simd, len, loss.as_panel(), x.as_panel(), now, reborrow(&mut h));
        let (mut first, mut others) = (None, &mut grads.inputs[..]);
        if self.gated {
            let (q, rest) = std::mem::take(&mut others).split_at_mut(1);
            (first, others) = (q.first_mut(), rest);
        }
        let grad = match first {
            Some(dq) => {
                gate_back(simd, len, (piece.inputs[0], h.as_panel(), grads.out), dq, &mut dh);
                dh.as_panel()
            }
            None => grads.out,
        };
        let given = ScanBack { len, loss: loss.as_panel(), before: state[0], states: h.as_panel(), grad };
        scan_back(simd, given, grads.state[0], reborrow(&mut dloss), reborrow(&mut dx));
        // A front without parameter adds zeros to a row that nobody reads.
        now.fill(0.0);
        let dparams = if grads.params.is_empty() { now } else { &mut *grads.params };
        let by = (dloss.as_panel(), dx.as_panel());
        front_back(simd, &self.front, inner, params, by, others, dparams);
    }
}

/// The same panel for a shorter time.
#[inline(always)]
pub(crate) fn reborrow<'a>(panel: &'a mut PanelMut<'_>) -> PanelMut<'a> {
    PanelMut { data: &mut *panel.data, stride: panel.stride }
}
