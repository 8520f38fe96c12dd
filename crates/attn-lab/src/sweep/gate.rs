//! Whether the language model's inputs are worth comparing attention on: the quality gate beside the error table.
//!
//! The gate holds if the loss with exact attention does not rise with the context, and removing the global layer costs
//! loss at every length. Both have a margin of [`MARGIN`] nats, far above rounding.

use super::source::LmText;
use crate::lm::GateRow;
use crate::report::units;
use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, Instant};

/// Nats a byte that count as a difference.
pub const MARGIN: f64 = 0.01;

/// The largest length judged: twice what the model saw in training. Beyond it a gate takes longer than the sweep.
const LARGEST: usize = 65_536;

/// About the length that is timed first.
const PROBE: usize = 4096;

/// The gate's figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// Hash of model, text and lengths.
    pub key: String,
    /// One row a length.
    pub rows: Vec<GateRow>,
    /// Lengths without a row: too large, or for lack of time or text.
    pub missing: Vec<usize>,
}

impl Gate {
    /// Computes the gate for `lengths`, leaving out the largest ones if they would not be done within `time`. A gate
    /// that `path` holds for the same text and lengths is taken from there; a new one is written to it.
    ///
    /// # Errors
    /// [`LabError`] if the model cannot run or the file cannot be written.
    pub fn open(path: &Path, source: &LmText, lengths: &[usize], time: Duration) -> Result<Self> {
        let key = format!("{} {lengths:?}", source.hash_all());
        let known = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        if let Some(known) = known.filter(|gate| gate.key == key && gate.missing.is_empty()) {
            return Ok(known);
        }
        let gate = Self { key, ..Self::compute(source, lengths, time)? };
        let text = serde_json::to_vec_pretty(&gate).map_err(|e| LabError::format(path, e))?;
        std::fs::write(path, text).map_err(|e| LabError::io("write", path, e))?;
        Ok(gate)
    }

    fn compute(source: &LmText, lengths: &[usize], time: Duration) -> Result<Self> {
        let text = source.text();
        let mut within: Vec<usize> =
            lengths.iter().copied().filter(|n| *n < text.len() && *n <= LARGEST).collect();
        within.sort_unstable();
        // The time of a length grows with it; one length that is quick and no longer all overhead says how fast this
        // machine is.
        if let Some(&first) = within.iter().rfind(|n| **n <= PROBE).or(within.first()) {
            let from = Instant::now();
            source.model().gate(text, &[first])?;
            let a_byte = from.elapsed().as_secs_f64() / first as f64;
            let mut bytes = 0;
            within.retain(|n| {
                bytes += n;
                a_byte * bytes as f64 <= time.as_secs_f64()
            });
        }
        let rows = if within.is_empty() { Vec::new() } else { source.model().gate(text, &within)? };
        let missing = lengths.iter().copied().filter(|n| !within.contains(n)).collect();
        Ok(Self { key: String::new(), rows, missing })
    }

    /// Whether the gate holds, with the figures that decide it.
    pub fn verdict(&self) -> (bool, String) {
        let (Some(first), Some(last)) = (self.rows.first(), self.rows.last()) else {
            return (
                false,
                "the gate was not computed: no length is short enough for the text, the time and the model"
                    .into(),
            );
        };
        let mut lowest = f64::INFINITY;
        let mut rise: f64 = 0.0;
        let mut held_to = None; // the largest length such that the gate holds up to it
        for (at, row) in self.rows.iter().enumerate() {
            rise = rise.max(row.exact_loss - lowest);
            lowest = lowest.min(row.exact_loss);
            // Comparisons with NaN are false: a loss that is no number never holds.
            let here = row.exact_loss - lowest <= MARGIN && row.removed_loss - row.exact_loss >= MARGIN;
            if here && rise <= MARGIN && (at == 0 || held_to.is_some()) {
                held_to = Some(row.n);
            }
        }
        let gain =
            self.rows.iter().map(|row| row.removed_loss - row.exact_loss).fold(f64::INFINITY, f64::min);
        let holds = held_to == Some(last.n);
        let verdict = match held_to {
            Some(_) if holds => "the gate holds".to_string(),
            Some(n) => format!("the gate holds up to n = {} and NOT BEYOND", units::length(n)),
            None => "the gate DOES NOT HOLD".to_string(),
        };
        let text = format!(
            "{verdict}: exact loss {:.3} nats a byte at n = {}, {:.3} at n = {}, at most {rise:.3} above a shorter \
             context; without the global layer at least {gain:.3} more",
            first.exact_loss,
            units::length(first.n),
            last.exact_loss,
            units::length(last.n)
        );
        (holds, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(losses: &[(f64, f64)]) -> Gate {
        let row = |(i, (exact, removed)): (usize, &(f64, f64))| GateRow {
            n: 1024 << i,
            targets: 512,
            exact_loss: *exact,
            removed_loss: *removed,
            window_loss: *removed,
        };
        Gate { key: String::new(), rows: losses.iter().enumerate().map(row).collect(), missing: Vec::new() }
    }

    #[test]
    fn a_loss_that_rises_or_a_layer_that_does_nothing_breaks_the_gate() {
        assert!(gate(&[(1.5, 1.7), (1.4, 1.6), (1.405, 1.6)]).verdict().0);
        let (holds, text) = gate(&[(1.5, 1.7), (1.4, 1.6), (1.45, 1.6), (1.4, 1.6)]).verdict();
        assert!(!holds && text.contains("holds up to n = 2k and NOT BEYOND"), "rises: {text}");
        assert!(!gate(&[(1.5, 1.7), (1.4, 1.405)]).verdict().0, "no use");
        assert!(!gate(&[(f64::NAN, 1.7)]).verdict().0);
        let (holds, text) = gate(&[]).verdict();
        assert!(!holds && text.contains("not computed"));
    }
}
