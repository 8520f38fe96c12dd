//! Masks given pair by pair.

use super::broadcast::{broadcast_strides, check_fits};
use super::{Cover, Head, Mask, Pair};
use crate::{AttnShape, Result};
use std::ops::Range;

/// A dense boolean mask, broadcast over the axes on which it has length 1.
#[derive(Debug, Clone, Copy)]
pub struct DenseMask<'a> {
    seen: &'a [bool],
    strides: [usize; 4],
}

impl<'a> DenseMask<'a> {
    /// `seen`, row-major, of `mask_shape` with 1 to 4 axes, right-aligned to `(batch, n_heads_q, n_q, n_kv)`
    /// as in numpy; `true` = attend.
    ///
    /// # Errors
    /// [`crate::AttnError`] if it does not broadcast to the problem.
    pub fn new(seen: &'a [bool], mask_shape: &[usize], shape: &AttnShape) -> Result<Self> {
        Ok(Self { seen, strides: broadcast_strides("mask", seen.len(), mask_shape, shape)? })
    }
}

impl Mask for DenseMask<'_> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        check_fits("mask", self.seen.len(), &self.strides, shape)
    }

    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let s = &self.strides;
        self.seen[p.batch * s[0] + p.head * s[1] + p.i * s[2] + p.j * s[3]]
    }

    /// Reads the tile, 64 keys at a time, and stops as soon as it has met both kinds of pairs.
    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let [batch, heads, row, key] = self.strides;
        let start = head.batch * batch + head.head * heads + keys.start * key;
        let rows = if row == 0 { rows.start..rows.start + 1 } else { rows };
        let width = if key == 0 { 1 } else { keys.len() };
        let (mut some, mut all) = (false, true);
        for i in rows {
            for seen in self.seen[start + i * row..][..width].chunks(64) {
                some |= seen.iter().fold(false, |some, seen| some | seen);
                all &= seen.iter().fold(true, |all, seen| all & seen);
                if some && !all {
                    return Cover::Partial;
                }
            }
        }
        if all { Cover::Full } else { Cover::Empty }
    }
}
