//! Heads that see different things: some by one pattern, the others by another.
//!
//! DuoAttention gives the few heads that retrieve from afar all earlier keys, and the others the first keys and a window:
//! `PerHead { heads, first: SlidingWindow::causal(usize::MAX), second: SinkWindow { .. } }`.
//!
//! Source: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", 2024.

use super::growth::{both_kept, larger};
use crate::Pattern;
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
use std::ops::Range;

/// Which query heads follow the first of two patterns.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadChoice {
    /// These.
    Listed(Vec<usize>),
    /// The query heads of this share of the key/value heads, rounded, from the first on.
    Share(f64),
}

impl HeadChoice {
    /// For each query head, whether it is chosen.
    fn chosen(&self, shape: &AttnShape) -> Result<Vec<bool>> {
        let heads = shape.n_heads_q;
        match self {
            Self::Listed(list) => {
                let mut chosen = vec![false; heads];
                for &head in list {
                    let expected = || format!("below n_heads_q = {heads}");
                    *chosen.get_mut(head).ok_or_else(|| AttnError::value("head", head, expected()))? = true;
                }
                Ok(chosen)
            }
            Self::Share(share) if (0.0..=1.0).contains(share) => {
                let first = (share * shape.n_heads_kv as f64).round() as usize * shape.group_size();
                Ok((0..heads).map(|head| head < first).collect())
            }
            Self::Share(share) => Err(AttnError::value("share of the heads", share, "from 0 to 1")),
        }
    }
}

/// Some heads see by one pattern, the others by another.
#[derive(Debug, Clone, PartialEq)]
pub struct PerHead<A, B> {
    /// Heads of the first pattern.
    pub heads: HeadChoice,
    /// What these see.
    pub first: A,
    /// What the others see.
    pub second: B,
}

/// The mask of a [`PerHead`].
#[derive(Debug, Clone)]
pub struct PerHeadMask<A, B> {
    /// For each query head, whether it is of the first pattern.
    chosen: Vec<bool>,
    first: A,
    second: B,
}

impl<A: Mask, B: Mask> Mask for PerHeadMask<A, B> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        if self.chosen.len() != shape.n_heads_q {
            return Err(AttnError::shape("heads", "n_heads_q", self.chosen.len(), shape.n_heads_q));
        }
        self.first.check(shape)?;
        self.second.check(shape)
    }

    fn sees(&self, pair: Pair) -> bool {
        if self.chosen[pair.head] { self.first.sees(pair) } else { self.second.sees(pair) }
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        match self.chosen[head.head] {
            true => self.first.spans(head, rows, n_kv),
            false => self.second.spans(head, rows, n_kv),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match self.chosen[head.head] {
            true => self.first.cover(head, rows, keys),
            false => self.second.cover(head, rows, keys),
        }
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        match self.chosen[head.head] {
            true => self.first.hide(head, rows, j, scores),
            false => self.second.hide(head, rows, j, scores),
        }
    }
}

impl<A: Pattern, B: Pattern> Pattern for PerHead<A, B> {
    type Mask = PerHeadMask<A::Mask, B::Mask>;

    const NAME: &'static str = "per-head";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let chosen = self.heads.chosen(shape)?;
        Ok(PerHeadMask { chosen, first: self.first.mask(shape)?, second: self.second.mask(shape)? })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let chosen = self.heads.chosen(shape).unwrap_or_default();
        let of = |is_first: bool| chosen.iter().filter(|chosen| **chosen == is_first).count();
        let heads = |n: usize| AttnShape { n_heads_q: n, n_heads_kv: n, ..*shape };
        self.first.pairs(&heads(of(true))) + self.second.pairs(&heads(of(false)))
    }

    fn is_causal(&self) -> bool {
        self.first.is_causal() && self.second.is_causal()
    }

    fn kept(&self) -> Option<Kept> {
        both_kept(self.first.kept(), self.second.kept())
    }

    fn cross_lengths(&self) -> bool {
        self.first.cross_lengths() && self.second.cross_lengths()
    }

    fn growth(&self) -> Growth {
        larger(self.first.growth(), self.second.growth())
    }

    fn memory(&self) -> Growth {
        larger(self.first.memory(), self.second.memory())
    }
}
