//! The model's loss when its global layer's attention is computed by someone else.

use std::ops::Range;

use candle_core::Tensor;

use super::byte_lm::{ByteLm, cross_entropy};
use super::capture::CHUNK;
use super::captured::Captured;
use super::error::{LmError, Result};
use super::global_attention::GlobalAttention;

impl ByteLm {
    /// Mean next-byte cross-entropy, in nats, of the bytes at the positions `targets` of `text`, when `attention`
    /// computes the global layer: from its inputs at the positions `0..targets.end − 1` to `(n_heads_q, n, head_dim)`.
    /// The byte at a target is predicted from all bytes before it, so the first possible target is position 1.
    ///
    /// The layers behind the global one run only where the targets need them.
    ///
    /// # Errors
    /// [`LmError::Argument`] for targets outside of the text or an output of another shape; whatever `attention` says.
    pub fn loss(
        &self,
        text: &[u8],
        targets: Range<usize>,
        attention: &dyn Fn(&Captured) -> Result<Vec<f32>>,
    ) -> Result<f64> {
        let inputs = self.capture(context(text, &targets)?)?;
        let out = attention(&inputs)?;
        if out.len() != inputs.q.len() {
            let Captured { n_heads_q, n, head_dim, .. } = inputs;
            return Err(LmError::Argument(format!(
                "attention output: {} numbers, expected ({n_heads_q}, {n}, {head_dim})",
                out.len()
            )));
        }
        self.loss_behind(text, targets, &|rows| inputs.rows(&out, rows.start, rows.end))
    }

    /// [`ByteLm::loss`] for each of the stand-ins, which are computed only where the targets need them.
    ///
    /// # Errors
    /// [`LmError::Argument`] for targets outside of the text.
    pub fn losses(
        &self,
        text: &[u8],
        targets: Range<usize>,
        stand_ins: &[GlobalAttention],
    ) -> Result<Vec<f64>> {
        let inputs = self.capture(context(text, &targets)?)?;
        let loss = |stand_in: &GlobalAttention| {
            self.loss_behind(text, targets.clone(), &|rows| stand_in.rows(&inputs, rows))
        };
        stand_ins.iter().map(loss).collect()
    }

    fn loss_behind(
        &self,
        text: &[u8],
        targets: Range<usize>,
        attended: &dyn Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<f64> {
        let behind = self.config().global_layer + 1..self.config().n_layers;
        let mut sum = 0.0;
        for start in targets.clone().step_by(CHUNK) {
            let chunk = start..targets.end.min(start + CHUNK);
            let x = self.through_windows(behind.clone(), chunk.start - 1..chunk.end - 1, |rows| {
                self.after_global(&self.before_global(text, rows.clone())?, &attended(rows.clone())?, rows)
            })?;
            let mean = cross_entropy(&self.logits(&x)?, &text[chunk.clone()])?.to_scalar::<f32>()?;
            sum += f64::from(mean) * chunk.len() as f64;
        }
        Ok(sum / targets.len() as f64)
    }
}

/// The bytes from which the targets are predicted.
fn context<'a>(text: &'a [u8], targets: &Range<usize>) -> Result<&'a [u8]> {
    if targets.is_empty() || targets.start == 0 || targets.end > text.len() {
        let (Range { start, end }, n) = (targets, text.len());
        return Err(LmError::Argument(format!(
            "loss targets {start}..{end}: expected positions from 1 on of a text of {n} bytes"
        )));
    }
    Ok(&text[..targets.end - 1])
}
