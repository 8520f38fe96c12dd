//! Whether the captured tensors are worth comparing attention on: the model must use its global layer at every length.

use serde::{Deserialize, Serialize};

use super::byte_lm::ByteLm;
use super::error::{LmError, Result};
use super::global_attention::GlobalAttention;

/// Bytes predicted in each stretch of the text.
const TARGETS: usize = 512;
/// Stretches, if the text is long enough for that many.
const STRETCHES: usize = 8;

/// Losses with a context of `n` bytes, in nats a byte. The same bytes are predicted at every `n`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateRow {
    /// Bytes of context, the predicted ones but the last included.
    pub n: usize,
    /// Bytes predicted.
    pub targets: usize,
    /// With exact attention in the global layer: must not rise with `n`.
    pub exact_loss: f64,
    /// With zeros in place of its attention: must be higher.
    pub removed_loss: f64,
    /// With as many keys as the window layers see.
    pub window_loss: f64,
}

impl ByteLm {
    /// The loss at several context lengths, on the last bytes of up to 8 stretches spread over the text.
    ///
    /// # Errors
    /// [`LmError::TextTooShort`] if the text does not hold the longest context and one byte more;
    /// [`LmError::Argument`] for no or zero lengths.
    pub fn gate(&self, text: &[u8], lengths: &[usize]) -> Result<Vec<GateRow>> {
        let (Some(&longest), Some(&shortest)) = (lengths.iter().max(), lengths.iter().min()) else {
            return Err(LmError::Argument("gate: no lengths given".to_string()));
        };
        if shortest == 0 {
            return Err(LmError::Argument("gate: a context of 0 bytes predicts nothing".to_string()));
        }
        if text.len() <= longest {
            let place = "the text of the gate".to_string();
            return Err(LmError::TextTooShort { found: text.len(), asked: longest + 1, place });
        }
        let targets = TARGETS.min(shortest);
        let spare = text.len() - longest - 1;
        let stretches = STRETCHES.min(spare / targets + 1);
        let end = |stretch: usize| longest + 1 + spare * stretch / (stretches - 1).max(1);
        lengths.iter().map(|&n| self.gate_row(text, n, targets, (0..stretches).map(end))).collect()
    }

    fn gate_row(
        &self,
        text: &[u8],
        n: usize,
        targets: usize,
        ends: impl ExactSizeIterator<Item = usize>,
    ) -> Result<GateRow> {
        let window = GlobalAttention::Window(self.config().window);
        let stand_ins = [GlobalAttention::Exact, GlobalAttention::Removed, window];
        let stretches = ends.len();
        let mut sums = [0.0; 3];
        for end in ends {
            let losses = self.losses(&text[end - n - 1..end], n + 1 - targets..n + 1, &stand_ins)?;
            sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
        }
        let [exact_loss, removed_loss, window_loss] = sums.map(|sum| sum / stretches as f64);
        Ok(GateRow { n, targets: targets * stretches, exact_loss, removed_loss, window_loss })
    }
}
