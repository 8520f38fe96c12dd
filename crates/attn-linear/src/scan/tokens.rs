//! The inputs of a scan: which rows a head reads.

use super::Cell;
use crate::matrix_state::sequences;
use attn_core::view::Rows;
use attn_core::{AttnError, Element, Result, TensorView};
use std::ops::Range;

/// Batch entries of the state of a call, before its `cu_seqlens` are checked.
pub(crate) fn sequences_of(cu_seqlens: Option<&[usize]>, batch: usize) -> usize {
    batch * cu_seqlens.map_or(1, |sums| sums.len().saturating_sub(1))
}

/// Token rows of all heads, checked: `(batch, heads, length, width)` each, in any storage type. Fewer heads than the most of
/// them are shared by consecutive heads.
#[derive(Debug)]
pub struct Tokens<'a> {
    inputs: Vec<TensorView<'a>>,
    batch: usize,
    heads: usize,
    len: usize,
    /// Tokens of the sequences of a batch entry.
    cuts: Vec<Range<usize>>,
}

impl<'a> Tokens<'a> {
    /// The inputs of `cell` in its order, each with its name.
    ///
    /// # Errors
    /// [`AttnError::Shape`] naming the input whose batch, heads, length or width does not fit.
    pub fn new<C: Cell>(cell: &C, inputs: &[(&str, TensorView<'a>)]) -> Result<Self> {
        let tokens = Self::of_any_width(inputs)?;
        for ((name, view), width) in inputs.iter().zip(cell.inputs()) {
            if view.shape()[3] != width {
                return Err(AttnError::shape(*name, "width", view.shape()[3], width));
            }
        }
        Ok(tokens)
    }

    /// As [`Tokens::new`] for inputs of any width: channels that a narrower input lacks are its first ones again, those that
    /// a wider one has too many are not read.
    ///
    /// # Errors
    /// As [`Tokens::new`].
    pub fn of_any_width(inputs: &[(&str, TensorView<'a>)]) -> Result<Self> {
        let [batch, _, len, _] = inputs.first().map_or([0; 4], |(_, view)| view.shape());
        let heads = inputs.iter().map(|(_, view)| view.shape()[1]).max().unwrap_or(0);
        for (name, view) in inputs {
            let found = view.shape();
            for (axis, found, expected) in [("batch", found[0], batch), ("length", found[2], len)] {
                if found != expected {
                    return Err(AttnError::shape(*name, axis, found, expected));
                }
            }
            if found[1] == 0 && heads > 0 || found[1] > 0 && heads % found[1] != 0 {
                return Err(AttnError::shape(*name, "heads", found[1], format!("a divisor of {heads}")));
            }
            if found[3] == 0 {
                return Err(AttnError::shape(*name, "width", 0, "at least 1"));
            }
        }
        let cuts = std::iter::once(0..len).collect();
        Ok(Self { inputs: inputs.iter().map(|(_, view)| *view).collect(), batch, heads, len, cuts })
    }

    /// Of sequences packed one behind the other: `cu_seqlens` are the prefix sums of their lengths, from 0 to all tokens. Each is
    /// a run of its own with a state of its own: a batch entry of the state for each sequence of each batch entry.
    ///
    /// # Errors
    /// [`AttnError::Value`] for sums that do not rise from 0 to the tokens.
    pub fn packed(mut self, cu_seqlens: Option<&[usize]>) -> Result<Self> {
        self.cuts = sequences(cu_seqlens, self.len)?;
        Ok(self)
    }

    /// Independent sequences: batch entries of the state.
    pub fn sequences(&self) -> usize {
        self.batch * self.cuts.len()
    }

    /// Tokens of the sequences of each batch entry.
    pub(super) fn cuts(&self) -> &[Range<usize>] {
        &self.cuts
    }

    /// Independent problems.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Heads of the output.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the rows `range` of input `at` of a head into `panel`, `width` wide and `stride` apart.
    pub(crate) fn load(
        &self,
        at: usize,
        (batch, head): (usize, usize),
        range: Range<usize>,
        (width, stride): (usize, usize),
        panel: &mut [f32],
    ) {
        let view = &self.inputs[at];
        let head = head / (self.heads / view.shape()[1]);
        match view {
            TensorView::F32(view) => copy(view.head(batch, head).slice(range), width, stride, panel),
            TensorView::Bf16(view) => copy(view.head(batch, head).slice(range), width, stride, panel),
            TensorView::F16(view) => copy(view.head(batch, head).slice(range), width, stride, panel),
        }
    }

    /// Adds up the gradients by input `at` of `width` channels a head, `[batch, heads, len, width]`, over the heads that share
    /// a row and the channels that were read twice: `[batch, its heads, len, its width]`.
    pub(crate) fn gather(&self, at: usize, width: usize, grads: Vec<f32>) -> Vec<f32> {
        let [batch, heads, len, own] = self.inputs[at].shape();
        if (heads, own) == (self.heads, width) {
            return grads;
        }
        let group = self.heads / heads.max(1);
        let mut sums = vec![0.0; batch * heads * len * own];
        for (row, from) in grads.chunks_exact(width).enumerate() {
            let (memory, i) = (row / len, row % len);
            let memory = memory / self.heads * heads + memory % self.heads / group;
            let to = &mut sums[(memory * len + i) * own..][..own];
            from.iter().enumerate().for_each(|(c, x)| to[c % own] += x);
        }
        sums
    }
}

fn copy<E: Element>(rows: Rows<'_, E>, width: usize, stride: usize, panel: &mut [f32]) {
    for (row, to) in rows.iter().zip(panel.chunks_exact_mut(stride)) {
        let to = &mut to[..width];
        match E::as_f32(row) {
            Some(row) if row.len() >= width => to.copy_from_slice(&row[..width]),
            _ => to.iter_mut().zip(row.iter().cycle()).for_each(|(to, x)| *to = x.load()),
        }
    }
}
