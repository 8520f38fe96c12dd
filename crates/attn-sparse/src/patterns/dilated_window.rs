//! Dilated window, with dilation `r` and `p = i + n_kv - n_q`:
//!
//! ```text
//! causal           A(i) = { j : 0 <= p - j < window r,  p - j = 0 (mod r) }         window keys
//! bidirectional    A(i) = { j :   |p - j| <= window r,  p - j = 0 (mod r) }         2 window + 1 keys
//! ```
//!
//! The positions of one residue class see each other and no others, so that this is `r` plain windows side by side, and that is
//! how it runs: class by class, on rows that lie `r` apart, without visiting a hidden key. Heads may differ in dilation,
//! and then reach differently far at the same cost.
//!
//! Source: Beltagy, Peters, Cohan 2020 (Longformer), after van den Oord et al. 2016 (WaveNet).

use crate::residues::{Class, Residues};
use crate::{Decision, Pattern};
use attn_core::mask::{Align, Band, Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Result, band_pairs};
use attn_flash::stream::Kept;
use std::ops::Range;
use std::sync::Arc;

/// Every `dilation`-th key near the query. Time `O(n_q * window)`; a causal stream keeps `(window - 1) * dilation` positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DilatedWindow {
    /// Causal: keys seen, the query's own included; bidirectional: keys seen on each side.
    pub window: usize,
    /// From one key seen to the next, at least 1; one for all query heads, or one each.
    pub dilation: Arc<[usize]>,
    /// No key after the query's position.
    pub causal: bool,
}

impl DilatedWindow {
    /// One dilation for all heads.
    pub fn new(window: usize, dilation: usize, causal: bool) -> Self {
        Self { window, dilation: [dilation].into(), causal }
    }

    /// The plain window within a class of positions `step` apart; with a step of 1 and keys `step` apart it is the reach.
    fn band(&self, offset: isize, step: usize) -> Band {
        let before = if self.causal { self.window.saturating_sub(1) } else { self.window };
        let after = if self.causal { 0 } else { self.window };
        Band { offset, left: Some(before.saturating_mul(step)), right: Some(after.saturating_mul(step)) }
    }

    fn residues(&self) -> Result<Residues> {
        let window = self.clone();
        Residues::new(self.dilation.clone(), move |class: Class| Box::new(window.band(class.offset, 1)))
    }
}

/// The pairs of a [`DilatedWindow`].
#[derive(Debug, Clone)]
pub struct DilatedMask {
    window: DilatedWindow,
    offset: isize,
}

impl DilatedMask {
    fn step(&self, head: usize) -> usize {
        let steps = &self.window.dilation;
        steps[if steps.len() == 1 { 0 } else { head }]
    }

    fn reach(&self, head: usize) -> Band {
        self.window.band(self.offset, self.step(head))
    }
}

impl Mask for DilatedMask {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        match self.window.dilation.len() {
            1 => Ok(()),
            len if len == shape.n_heads_q => Ok(()),
            len => {
                let expected = format!("1 or {}", shape.n_heads_q);
                Err(AttnError::shape("dilation", "n_heads_q", len, expected))
            }
        }
    }

    fn sees(&self, pair: Pair) -> bool {
        let apart = pair.i as isize + self.offset - pair.j as isize;
        apart % self.step(pair.head) as isize == 0 && self.reach(pair.head).sees(pair)
    }

    /// One row's keys singly; of several rows, all that lie in reach.
    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let (step, reach) = (self.step(head.head), self.reach(head.head));
        let spans = reach.spans(head, rows.clone(), n_kv);
        let [span] = spans.as_slice() else { return spans };
        if rows.len() > 1 || step == 1 {
            return spans;
        }
        let residue = (rows.start as isize + self.offset).rem_euclid(step as isize) as usize;
        let first = span.start + (residue + step - span.start % step) % step;
        (first..span.end).step_by(step).map(|j| j..j + 1).collect()
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match self.reach(head.head).cover(head, rows, keys) {
            Cover::Full if self.step(head.head) > 1 => Cover::Partial,
            cover => cover,
        }
    }
}

impl Pattern for DilatedWindow {
    type Mask = DilatedMask;

    const NAME: &'static str = "dilated-window";

    fn mask(&self, shape: &AttnShape) -> Result<DilatedMask> {
        if self.dilation.contains(&0) {
            return Err(AttnError::value("dilation", 0, "at least 1"));
        }
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        let mask = DilatedMask { window: self.clone(), offset };
        mask.check(shape)?;
        Ok(mask)
    }

    fn decision(&self, shape: &AttnShape) -> Result<Decision> {
        Ok(Decision::by_residue(self.mask(shape)?, self.residues()?))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let of_class = |class: Class| {
            let (n_q, n_kv) = class.lengths(shape);
            band_pairs(&AttnShape { n_q, n_kv, ..*shape }, &self.band(class.offset, 1))
        };
        let of_step = |step: &usize| Class::all(*step, shape).map(of_class).sum::<u64>();
        let per_head: u64 = self.dilation.iter().filter(|step| **step > 0).map(of_step).sum();
        let times = if self.dilation.len() == 1 { shape.n_heads_q } else { 1 };
        per_head * (shape.batch * times) as u64
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn kept(&self) -> Option<Kept> {
        let step = self.dilation.iter().copied().max().unwrap_or(1);
        Some(Kept { sinks: 0, last: Some(self.window.saturating_sub(1).saturating_mul(step)) })
    }
}
