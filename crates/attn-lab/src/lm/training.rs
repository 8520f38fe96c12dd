//! The losses that training minimises: differentiable in the weights.

use candle_core::Tensor;

use super::attention::causal_attention;
use super::block::{Projected, Span};
use super::byte_lm::{ByteLm, cross_entropy};
use super::capture::{chunks, span};
use super::error::{LmError, Result};

/// Positions of the far context run at once.
const FAR_CHUNK: usize = 4096;

impl ByteLm {
    /// Mean next-byte cross-entropy (nats) over `batch` texts of equal length, one after the other in `texts`.
    ///
    /// # Errors
    /// [`LmError::Argument`] if `texts` is not a whole number of texts of at least two bytes.
    pub fn training_loss(&self, texts: &[u8], batch: usize) -> Result<Tensor> {
        if batch == 0 || !texts.len().is_multiple_of(batch) || texts.len() < 2 * batch {
            let len = texts.len();
            return Err(LmError::Argument(format!(
                "{len} bytes cannot be cut into {batch} texts to learn from"
            )));
        }
        let rows = || texts.chunks_exact(texts.len() / batch);
        let span = Span { batch, n: texts.len() / batch - 1, first: 0 };
        let inputs = rows().flat_map(|row| &row[..span.n]).copied().collect::<Vec<_>>();
        let targets = rows().flat_map(|row| &row[1..]).copied().collect::<Vec<_>>();
        let mut x = self.embed(&inputs)?;
        for block in &self.blocks {
            x = block.forward(&x, span)?;
        }
        Ok(cross_entropy(&self.logits(&x)?, &targets)?)
    }

    /// Mean next-byte cross-entropy (nats) of the last `targets` bytes of one long text. Far from them no gradient
    /// reaches the window layers, so that a long context costs little more than its forward pass.
    ///
    /// # Errors
    /// [`LmError::Argument`] if the text is not longer than `targets`, or `targets` is 0.
    pub fn long_context_loss(&self, text: &[u8], targets: usize) -> Result<Tensor> {
        if targets == 0 || text.len() <= targets {
            let len = text.len();
            return Err(LmError::Argument(format!("{targets} targets in a text of {len} bytes")));
        }
        let config = self.config();
        let (global, n) = (config.global_layer, text.len() - 1);
        let behind = global + 1..config.n_layers;
        let near = (n - targets).saturating_sub(behind.len() * config.window)..n;

        let far = chunks(near.start, FAR_CHUNK).map(|rows| Ok(self.before_global(text, rows)?.detach()));
        let mut residual = far.collect::<Result<Vec<_>>>()?;
        let before = self.before_global(text, near.clone())?;
        residual.push(before.clone());
        let Projected { q, k, v } =
            self.blocks[global].project(&Tensor::cat(&residual, 0)?, span(&(0..n)))?;
        let attended = causal_attention(&q.narrow(1, near.start, near.len())?, &k, &v)?;
        let mut x = self.after_global(&before, &attended, near.clone())?;
        for block in &self.blocks[behind] {
            x = block.forward(&x, span(&near))?;
        }
        let x = x.narrow(0, near.len() - targets, targets)?.contiguous()?;
        Ok(cross_entropy(&self.logits(&x)?, &text[n + 1 - targets..])?)
    }
}
