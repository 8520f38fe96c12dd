//! A prefix that reads itself in both directions, then causal text: `A(i) = { j <= p or j < prefix }`, with
//! `p = i + n_kv - n_q`.
//!
//! Sources: Raffel et al. 2020 (T5's prefix language model); Dong et al. 2019 (UniLM).

use crate::Pattern;
use attn_core::mask::{Align, Band, PrefixLm as PrefixMask};
use attn_core::{AttnError, AttnShape, Growth, Result, band_pairs};

/// The prefix, and the keys up to the query. Time `O(n^2)`. Not causal in the strict sense: the prefix reads itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixLm {
    /// Its length in each batch entry, or one for all; a prefix longer than the keys is all of them.
    pub prefix: Vec<usize>,
}

impl Pattern for PrefixLm {
    type Mask = PrefixMask;

    const NAME: &'static str = "prefix-lm";

    fn mask(&self, shape: &AttnShape) -> Result<PrefixMask> {
        if self.prefix.is_empty() {
            return Err(AttnError::value("prefix", "no length", "one, or one a batch entry"));
        }
        let prefix = self.prefix.iter().map(|prefix| shape.n_kv.min(*prefix)).collect();
        PrefixMask::new(prefix, shape, Align::BottomRight)
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        // The causal pairs, and those of the prefix that lie behind their query.
        let causal = Band::causal(shape, Align::BottomRight);
        let all = band_pairs(shape, &causal);
        let of_entry = |batch: usize| {
            let at = if self.prefix.len() == 1 { 0 } else { batch };
            let prefix = self.prefix.get(at).map_or(0, |prefix| shape.n_kv.min(*prefix));
            let seen_anyway = band_pairs(&AttnShape { n_kv: prefix, ..*shape }, &causal);
            shape.n_heads_q as u64 * (all + (shape.n_q * prefix) as u64 - seen_anyway)
        };
        (0..shape.batch).map(of_entry).sum()
    }

    fn is_causal(&self) -> bool {
        self.prefix.iter().all(|prefix| *prefix == 0)
    }

    fn growth(&self) -> Growth {
        Growth::Quadratic
    }
}
