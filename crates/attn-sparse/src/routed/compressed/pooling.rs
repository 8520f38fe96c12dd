//! Entries by learned gates: a softmax over slots for each feature, and its gradients.
//!
//! ```text
//! C = sum_s w_s x_s      w = softmax_s(g_s + b_s)      dx_s = w_s dC      dg_s = db_s = w_s (x_s - C) dC
//! ```

use crate::routed::rows::heads_f32;
use attn_core::{AttnError, Result, TensorView};

/// What entries are made of.
#[derive(Debug, Clone, Copy)]
pub struct EntryPooling<'a> {
    /// `(batch, 1, n, width)`; twice the entries' width in the sparse form: the series for the next entry, then that for its own.
    pub kv: TensorView<'a>,
    /// As `kv`.
    pub gate: TensorView<'a>,
    /// `[rate, width]`.
    pub position_bias: &'a [f32],
}

/// A [`EntryPooling`] in f32.
pub(super) struct Slots {
    batch: usize,
    n: usize,
    /// Of `kv`.
    width: usize,
    rate: usize,
    twice: bool,
    kv: Vec<f32>,
    gate: Vec<f32>,
    bias: Vec<f32>,
}

/// Gradients of a [`EntryPooling`].
pub(super) struct PoolingGrads {
    pub(super) kv: Vec<f32>,
    pub(super) gate: Vec<f32>,
    pub(super) bias: Vec<f32>,
}

impl Slots {
    pub(super) fn new(
        name: &str,
        x: &EntryPooling<'_>,
        rate: usize,
        twice: bool,
        [batch, n, entry]: [usize; 3],
    ) -> Result<Self> {
        let width = if twice { 2 * entry } else { entry };
        let expected = [batch, 1, n, width];
        crate::routed::index_inputs::check_axes(&format!("{name}_kv"), x.kv.shape(), expected)?;
        crate::routed::index_inputs::check_axes(&format!("{name}_gate"), x.gate.shape(), expected)?;
        if x.position_bias.len() != rate * width {
            let bias =
                if name == "compress" { "position_bias".into() } else { format!("{name}_position_bias") };
            return Err(AttnError::shape(bias, "elements", x.position_bias.len(), rate * width));
        }
        let (kv, gate) = (heads_f32(&x.kv, 0..n), heads_f32(&x.gate, 0..n));
        Ok(Self { batch, n, width, rate, twice, kv, gate, bias: x.position_bias.to_vec() })
    }

    fn entry_width(&self) -> usize {
        if self.twice { self.width / 2 } else { self.width }
    }

    pub(super) fn n_entries(&self) -> usize {
        self.n / self.rate
    }

    /// The slots of feature `c` of an entry: where in `kv` and `gate`, and where in the bias.
    fn slots(&self, batch: usize, entry: usize, c: usize) -> impl Iterator<Item = (usize, usize)> + use<'_> {
        let before = if self.twice && entry > 0 { entry * self.rate - self.rate } else { entry * self.rate };
        (before..(entry + 1) * self.rate).map(move |token| {
            let series = if self.twice && token >= entry * self.rate { self.width / 2 } else { 0 };
            let column = series + c;
            ((batch * self.n + token) * self.width + column, token % self.rate * self.width + column)
        })
    }

    /// Softmax weights of the slots of a feature, in their order.
    fn weights(&self, batch: usize, entry: usize, c: usize, weights: &mut Vec<f32>) {
        weights.clear();
        weights.extend(self.slots(batch, entry, c).map(|(at, bias)| self.gate[at] + self.bias[bias]));
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|x| *x /= sum);
    }

    /// Entries `[batch, entries, entry width]`.
    pub(super) fn pool(&self) -> Vec<f32> {
        let (mut all, mut weights) = (Vec::new(), Vec::new());
        for (batch, entry) in self.entries() {
            for c in 0..self.entry_width() {
                self.weights(batch, entry, c, &mut weights);
                let slots = self.slots(batch, entry, c).zip(&weights);
                all.push(slots.map(|((at, _), weight)| weight * self.kv[at]).sum());
            }
        }
        all
    }

    fn entries(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let entries = self.n_entries();
        (0..self.batch * entries).map(move |at| (at / entries, at % entries))
    }

    /// Gradients, given the entries and theirs.
    pub(super) fn backward(&self, pooled: &[f32], grad: &[f32]) -> PoolingGrads {
        let zeros = |len: usize| vec![0.0f32; len];
        let mut grads = PoolingGrads {
            kv: zeros(self.kv.len()),
            gate: zeros(self.gate.len()),
            bias: zeros(self.bias.len()),
        };
        let (width, mut weights) = (self.entry_width(), Vec::new());
        for (at, (batch, entry)) in self.entries().enumerate() {
            for c in 0..width {
                let (pooled, grad) = (pooled[at * width + c], grad[at * width + c]);
                self.weights(batch, entry, c, &mut weights);
                for ((slot, bias), weight) in self.slots(batch, entry, c).zip(&weights) {
                    grads.kv[slot] += weight * grad;
                    let grad_gate = weight * (self.kv[slot] - pooled) * grad;
                    grads.gate[slot] += grad_gate;
                    grads.bias[bias] += grad_gate;
                }
            }
        }
        grads
    }
}
