//! Padding behind sequences of different lengths: `A(i) = { j < len_b }`, causal also `j <= p`, with `p = i + n_kv - n_q`.
//!
//! Rows behind a sequence's own end are computed like others.

use crate::Pattern;
use attn_core::mask::{Align, And, Band, KeyLengths};
use attn_core::{AttnShape, Growth, Result, band_pairs};
use attn_flash::stream::Kept;

/// Keys inside the sequence of each batch entry. Time `O(sum of n_q * len_b)`.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_sparse::{Padded, Pattern};
///
/// let shape = AttnShape { batch: 2, ..AttnShape::square(1, 4, 8) };
/// let padded = Padded { lengths: vec![4, 2], causal: true };
/// assert_eq!(padded.pairs(&shape), (1 + 2 + 3 + 4) + (1 + 2 + 2 + 2));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// Keys of each batch entry, or one for all; none given is no padding. At most `n_kv` each.
    pub lengths: Vec<usize>,
    /// No key after the query's position.
    pub causal: bool,
}

impl Padded {
    fn band(&self, shape: &AttnShape) -> Band {
        Band { right: self.causal.then_some(0), ..Band::causal(shape, Align::BottomRight) }
    }
}

impl Pattern for Padded {
    type Mask = And<Band, Option<KeyLengths>>;

    const NAME: &'static str = "padded-causal";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let lengths = match self.lengths.is_empty() {
            true => None,
            false => Some(KeyLengths::new(self.lengths.clone(), shape)?),
        };
        Ok(And(self.band(shape), lengths))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let of_entry = |batch: usize| {
            let at = if self.lengths.len() == 1 { 0 } else { batch };
            let len = self.lengths.get(at).map_or(shape.n_kv, |len| shape.n_kv.min(*len));
            shape.n_heads_q as u64 * band_pairs(&AttnShape { n_kv: len, ..*shape }, &self.band(shape))
        };
        (0..shape.batch).map(of_entry).sum()
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    /// A stream has no padding.
    fn kept(&self) -> Option<Kept> {
        self.lengths.is_empty().then_some(Kept { sinks: 0, last: None })
    }

    fn growth(&self) -> Growth {
        Growth::Quadratic
    }
}
