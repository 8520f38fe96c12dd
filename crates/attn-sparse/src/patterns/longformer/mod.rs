//! Longformer: local queries see a window and the global tokens, global tokens see everything.
//!
//! ```text
//! A(i) = all                                   if p is global, p = i + n_kv - n_q
//! A(i) = { j : |p - j| <= w } + global tokens  otherwise
//! ```
//!
//! Causal, nothing after `p`. Without global tokens it is a sliding window; with all tokens global, dense attention.
//!
//! Global rows may have projections of their own ([`GlobalProjections`]): they attend with `q_global` to all of `k_global`,
//! `v_global`, while local rows use `q`, `k`, `v` also towards global tokens.
//!
//! Global rows are gathered and attended as a block of their own, so that their neighbours do not pay for what they see
//! ([`Parted`]).
//!
//! Source: Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer", 2020.

mod mask;
mod projections;

use crate::parts::{Order, Part, Parted};
use crate::{Pattern, heads};
use attn_core::mask::{Align, Band};
use attn_core::{AttnError, AttnShape, Result, band_pairs};
use mask::LongformerMask;
use mask::{RowEnds, Rows};
pub use projections::{GlobalProjections, ProjectedGrads};
use std::sync::Arc;

/// Positions of global tokens, ascending: one list for all batch entries, or one for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalTokens(Arc<[Vec<usize>]>);

impl GlobalTokens {
    /// The same positions in all batch entries; those beyond the sequence count for nothing.
    pub fn shared(positions: impl IntoIterator<Item = usize>) -> Self {
        Self([sorted(positions.into_iter().collect())].into())
    }

    /// Positions of each batch entry.
    pub fn per_batch(positions: Vec<Vec<usize>>) -> Self {
        Self(positions.into_iter().map(sorted).collect())
    }

    /// The positions of a batch entry.
    pub fn of(&self, batch: usize) -> &[usize] {
        self.0.get(if self.0.len() == 1 { 0 } else { batch }).map_or(&[], Vec::as_slice)
    }

    /// Those below `n`.
    fn below(&self, batch: usize, n: usize) -> &[usize] {
        let all = self.of(batch);
        &all[..all.partition_point(|g| *g < n)]
    }

    fn check(&self, shape: &AttnShape) -> Result<()> {
        match self.0.len() {
            1 => Ok(()),
            lists if lists == shape.batch => Ok(()),
            lists => Err(AttnError::shape("global_tokens", "batch", lists, shape.batch)),
        }
    }
}

fn sorted(mut positions: Vec<usize>) -> Vec<usize> {
    positions.sort_unstable();
    positions.dedup();
    positions
}

/// A window and global tokens. Time `O(n (2 window + 1 + globals))`; a causal stream keeps every position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Longformer {
    /// Keys seen on each side of the query.
    pub window: usize,
    /// Tokens that all see and that see all.
    pub globals: GlobalTokens,
    /// Nothing after the query.
    pub causal: bool,
}

impl Longformer {
    fn band(&self, shape: &AttnShape) -> Band {
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        Band { offset, left: Some(self.window), right: Some(if self.causal { 0 } else { self.window }) }
    }

    fn mask_of(&self, shape: &AttnShape, rows: Rows) -> LongformerMask {
        let globals = self.globals.clone();
        LongformerMask { band: self.band(shape), globals, causal: self.causal, n_kv: shape.n_kv, rows }
    }

    /// Keys that a global row at `p` sees.
    fn end(&self, p: usize, n_kv: usize) -> usize {
        if self.causal { p + 1 } else { n_kv }
    }

    /// Local rows in the order of the sequence, then global rows; these of `source`.
    fn two_parts(&self, shape: &AttnShape, source: usize) -> Vec<Part> {
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        let lists = self.globals.0.len().min(shape.batch.max(1));
        let rows_of = |batch: usize| {
            let row = |&p: &usize| usize::try_from(p as isize - offset).ok().filter(|i| *i < shape.n_q);
            self.globals.below(batch, shape.n_kv).iter().filter_map(move |p| row(p).map(|i| (i, *p)))
        };
        let rows = (0..lists).map(|b| rows_of(b).map(|(i, _)| i as u32).collect()).collect();
        let ends = (0..lists).map(|b| rows_of(b).map(|(_, p)| self.end(p, shape.n_kv)).collect()).collect();
        let global = Part {
            queries: Order::per_batch(rows),
            keys: Order::natural(),
            mask: Arc::new(RowEnds { ends }),
            source,
        };
        vec![Part::natural(Arc::new(self.mask_of(shape, Rows::Local))), global]
    }
}

impl Pattern for Longformer {
    type Mask = LongformerMask;

    const NAME: &'static str = "longformer";

    fn mask(&self, shape: &AttnShape) -> Result<LongformerMask> {
        self.globals.check(shape)?;
        Ok(self.mask_of(shape, Rows::All))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let (band, n_kv) = (self.band(shape), shape.n_kv as isize);
        let (first, end) = (band.offset, band.offset + shape.n_q as isize);
        let right = if self.causal { 0 } else { self.window as isize };
        let reach = |p: isize| ((p - self.window as isize).max(0), (p + right + 1).min(n_kv));
        let window = |p: isize| (reach(p).1 - reach(p).0).max(0);
        let in_window = |p: isize, g: isize| reach(p).0 <= g && g < reach(p).1;
        let visible = |p: isize, g: isize| !self.causal || g <= p;
        let of_entry = |batch: usize| -> u64 {
            let globals = self.globals.below(batch, shape.n_kv).iter().map(|g| *g as isize);
            let rows: Vec<isize> = globals.clone().filter(|g| (first..end).contains(g)).collect();
            let mut pairs = band_pairs(shape, &band) as i64;
            for g in globals {
                // Rows that see g, less those whose window has it, less those that are global themselves.
                let see = (end - if self.causal { g.max(first) } else { first }).max(0);
                let near = ((g + self.window as isize + 1).min(end) - (g - right).max(first)).max(0);
                let global = rows.iter().filter(|p| visible(**p, g) && !in_window(**p, g)).count();
                pairs += (see - near) as i64 - global as i64;
            }
            let extra = |p: &isize| self.end(*p as usize, shape.n_kv) as i64 - window(*p) as i64;
            (pairs + rows.iter().map(extra).sum::<i64>()).max(0) as u64
        };
        match self.globals.0.len() {
            1 => heads(shape) * of_entry(0),
            _ => shape.n_heads_q as u64 * (0..shape.batch).map(of_entry).sum::<u64>(),
        }
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn memory(&self) -> attn_core::Growth {
        attn_core::Growth::Linear
    }
}

impl Parted for Longformer {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        self.globals.check(shape)?;
        if (0..shape.batch).all(|batch| self.globals.below(batch, shape.n_kv).is_empty()) {
            return Ok(Vec::new());
        }
        Ok(self.two_parts(shape, 0))
    }
}
