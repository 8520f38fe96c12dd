//! Attention sinks and a window: `A(i) = { j <= p : j < n_sinks or j > p - window }` with `p = i + n_kv - n_q`.
//!
//! The first tokens of a text draw much attention whatever they are; keeping them next to a sliding window keeps the
//! softmax of a trained model in its regime. Always causal. In prefill this is the A-shape of MInference.
//!
//! Positions count in the sequence; a rotary embedding that counts inside the cache instead is the caller's choice.
//!
//! Source: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", 2024.

use crate::{Pattern, heads};
use attn_core::mask::{Align, And, Band, KeysBelow, Or};
use attn_core::{AttnShape, Result, band_pairs};
use attn_flash::stream::Kept;

/// The first `n_sinks` keys and the last `window`, the query's own included. Time `O(n_q * (n_sinks + window))`; a stream
/// keeps `n_sinks + window - 1` positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SinkWindow {
    /// Keys at the start that every later query sees.
    pub n_sinks: usize,
    /// Keys seen up to the query's position, its own included.
    pub window: usize,
}

impl SinkWindow {
    fn causal(&self, shape: &AttnShape) -> Band {
        Band::causal(shape, Align::BottomRight)
    }

    fn window(&self, shape: &AttnShape) -> Band {
        Band { left: Some(self.window.saturating_sub(1)), ..self.causal(shape) }
    }
}

impl Pattern for SinkWindow {
    type Mask = And<Band, Or<KeysBelow, Band>>;

    const NAME: &'static str = "sink-window";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        Ok(And(self.causal(shape), Or(KeysBelow(self.n_sinks), self.window(shape))))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        // The window over all keys, and the causal pairs of the sinks that the window does not have.
        let sinks = AttnShape { n_kv: self.n_sinks.min(shape.n_kv), ..*shape };
        let over_sinks = |band: Band| band_pairs(&sinks, &band);
        let (causal, window) = (self.causal(shape), self.window(shape));
        heads(shape) * (band_pairs(shape, &window) + over_sinks(causal) - over_sinks(window))
    }

    fn is_causal(&self) -> bool {
        true
    }

    fn kept(&self) -> Option<Kept> {
        Some(Kept { sinks: self.n_sinks, last: Some(self.window.saturating_sub(1)) })
    }
}
