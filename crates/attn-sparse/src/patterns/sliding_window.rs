//! Sliding window: `A(i) = { j : p - left <= j <= p + right }` with `p = i + n_kv - n_q`.
//!
//! Causal windows have `right = 0` and see `left + 1` keys, the query's own included; bidirectional ones usually
//! `left = right`. A window that covers everything is dense attention; `left = right = 0` returns the values.
//!
//! Sources: Child et al. 2019; Beltagy, Peters, Cohan 2020 (Longformer); Jiang et al. 2023 (Mistral 7B).

use crate::{Pattern, heads};
use attn_core::mask::{Align, Band};
use attn_core::{AttnShape, Growth, Result, band_pairs};
use attn_flash::stream::Kept;

/// Keys near the query. Time `O(n_q * (left + right + 1))`; a causal stream keeps `left` positions.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_sparse::{SlidingWindow, SparseAttention};
///
/// let x: Vec<f32> = (0..6 * 4).map(|i| i as f32).collect();
/// let view = |name| View::contiguous(name, &x, [1, 1, 6, 4]);
/// let mut out = vec![0.0; x.len()];
/// let itself = SparseAttention::new(SlidingWindow::causal(1));
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// itself.forward(qkv, ViewMut::contiguous("out", &mut out, [1, 1, 6, 4])?.into())?;
/// let close = out.iter().zip(&x).all(|(out, x)| (out - x).abs() <= 1e-6 * x);
/// assert!(close, "a window of one key returns the values");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Keys seen before the query's position.
    pub left: usize,
    /// Keys seen after the query's position.
    pub right: usize,
}

impl SlidingWindow {
    /// The last `window` keys, the query's own included; `window` 0 sees nothing but the query's own key, like 1.
    pub fn causal(window: usize) -> Self {
        Self { left: window.saturating_sub(1), right: 0 }
    }

    fn band(&self, shape: &AttnShape) -> Band {
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        Band { offset, left: Some(self.left), right: Some(self.right) }
    }
}

impl Pattern for SlidingWindow {
    type Mask = Band;

    const NAME: &'static str = "sliding-window";

    fn mask(&self, shape: &AttnShape) -> Result<Band> {
        Ok(self.band(shape))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        heads(shape) * band_pairs(shape, &self.band(shape))
    }

    fn is_causal(&self) -> bool {
        self.right == 0
    }

    fn kept(&self) -> Option<Kept> {
        Some(Kept { sinks: 0, last: Some(self.left) })
    }

    /// A side that no sequence reaches is no window.
    fn growth(&self) -> Growth {
        if self.left.max(self.right) < 1 << 40 { Growth::Linear } else { Growth::Quadratic }
    }
}
