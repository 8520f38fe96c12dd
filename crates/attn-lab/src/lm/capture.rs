//! Running a [`ByteLm`] over long texts in chunks, and taking the inputs of one attention layer from it.
//!
//! A window layer reaches `window − 1` positions back, so `l` of them reach less than `l · window`: a chunk is
//! computed with that many positions before it (its halo), whose rows are then dropped. Time is linear in the text and
//! memory beyond the result does not grow with it.

use std::ops::Range;

use candle_core::Tensor;

use super::block::Span;
use super::byte_lm::ByteLm;
use super::captured::Captured;
use super::error::{LmError, Result};
use super::global_attention::GlobalAttention;

/// Positions run at once.
pub(crate) const CHUNK: usize = 4_096;

impl ByteLm {
    /// `q`, `k`, `v` of the global layer over the whole text. Linear in the length of the text.
    ///
    /// # Errors
    /// [`LmError::Argument`] for an empty text.
    pub fn capture(&self, text: &[u8]) -> Result<Captured> {
        self.capture_layer(text, self.config().global_layer)
    }

    /// `q`, `k`, `v` of any layer. All layers but the global one are window layers: their queries and keys are taken
    /// after the rotation, and exact attention over all keys is not what the model does with them. Layers behind the
    /// global one need its exact attention first, which is quadratic in the length of the text.
    ///
    /// # Errors
    /// [`LmError::Argument`] for an empty text or a layer that does not exist.
    pub fn capture_layer(&self, text: &[u8], layer: usize) -> Result<Captured> {
        self.capture_in_chunks(text, layer, CHUNK)
    }

    pub(crate) fn capture_in_chunks(&self, text: &[u8], layer: usize, chunk: usize) -> Result<Captured> {
        let config = self.config();
        if layer >= config.n_layers {
            let layers = config.n_layers;
            return Err(LmError::Argument(format!(
                "layer {layer}: the model has layers 0 to {}",
                layers - 1
            )));
        }
        if text.is_empty() {
            return Err(LmError::Argument("the text is empty: there is nothing to capture".to_string()));
        }
        let global = config.global_layer;
        if layer <= global {
            return self.project_all(text.len(), layer, chunk, |rows| self.before_layer(text, layer, rows));
        }
        let inputs = self.project_all(text.len(), global, chunk, |rows| self.before_global(text, rows))?;
        let mut residual = Vec::new();
        for rows in chunks(text.len(), chunk) {
            let attended = GlobalAttention::Exact.rows(&inputs, rows.clone())?;
            residual.push(self.after_global(&self.before_global(text, rows.clone())?, &attended, rows)?);
        }
        let residual = Tensor::cat(&residual, 0)?;
        self.project_all(text.len(), layer, chunk, |rows| {
            self.through_windows(global + 1..layer, rows, |rows| {
                Ok(residual.narrow(0, rows.start, rows.len())?)
            })
        })
    }

    /// The residual before the global layer at positions `rows`.
    pub(crate) fn before_global(&self, text: &[u8], rows: Range<usize>) -> Result<Tensor> {
        self.before_layer(text, self.config().global_layer, rows)
    }

    /// The residual behind the global layer, given the residual before it and its attention's output.
    pub(crate) fn after_global(
        &self,
        before: &Tensor,
        attended: &Tensor,
        rows: Range<usize>,
    ) -> Result<Tensor> {
        Ok(self.blocks[self.config().global_layer].finish(before, attended, span(&rows))?)
    }

    /// The residual behind the window layers `layers` at positions `rows`; `input` is the residual before them.
    pub(crate) fn through_windows(
        &self,
        layers: Range<usize>,
        rows: Range<usize>,
        input: impl Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let halo = (layers.len() * self.config().window).min(rows.start);
        let with_halo = rows.start - halo..rows.end;
        let mut x = input(with_halo.clone())?;
        for block in &self.blocks[layers] {
            x = block.forward(&x, span(&with_halo))?;
        }
        Ok(x.narrow(0, halo, rows.len())?.contiguous()?)
    }

    fn before_layer(&self, text: &[u8], layer: usize, rows: Range<usize>) -> Result<Tensor> {
        self.through_windows(0..layer, rows, |rows| Ok(self.embed(&text[rows])?))
    }

    fn project_all(
        &self,
        n: usize,
        layer: usize,
        chunk: usize,
        residual: impl Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<Captured> {
        let config = self.config();
        let mut captured = Captured::zeros(config.n_heads, config.n_heads, n, config.head_dim);
        for rows in chunks(n, chunk) {
            let inputs = self.blocks[layer].project(&residual(rows.clone())?, span(&rows))?;
            captured.put(rows.start, &inputs.q, &inputs.k, &inputs.v)?;
        }
        Ok(captured)
    }
}

pub(crate) fn span(rows: &Range<usize>) -> Span {
    Span { batch: 1, n: rows.len(), first: rows.start }
}

/// `0..n` in stretches of `chunk`.
pub(crate) fn chunks(n: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(chunk.max(1)).map(move |start| start..n.min(start.saturating_add(chunk)))
}
