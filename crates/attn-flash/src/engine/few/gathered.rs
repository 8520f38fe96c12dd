//! Keys that lie apart, side by side.

use super::super::rows::{HeadRows, KeyRows};
use super::Lines;
use super::groups::Groups;
use attn_core::view::Rows;
use std::ops::Range;

/// A block of keys and their values as f32, each row at least a group of channels wide.
pub(super) struct Gathered {
    k: Lines,
    v: Lines,
}

impl Default for Gathered {
    fn default() -> Self {
        Self { k: Lines::new(64), v: Lines::new(64) }
    }
}

impl Gathered {
    /// The keys and values of all `ranges`, one after another.
    #[inline(always)]
    pub(super) fn rows<'s>(
        &'s mut self,
        (k, v): (&KeyRows<'_>, &KeyRows<'_>),
        ranges: &[Range<usize>],
        [groups, groups_v]: [Groups; 2],
    ) -> (HeadRows<'s>, HeadRows<'s>) {
        (side_by_side(k, ranges, groups, &mut self.k), side_by_side(v, ranges, groups_v, &mut self.v))
    }
}

#[inline(always)]
fn side_by_side<'s>(
    rows: &KeyRows<'_>,
    ranges: &[Range<usize>],
    groups: Groups,
    copy: &'s mut Lines,
) -> HeadRows<'s> {
    let n = ranges.iter().map(Range::len).sum::<usize>();
    let width = if groups.is_narrow() { groups.numbers() } else { rows.width() };
    if copy.len() < n * width {
        copy.resize(n * width, 0.0);
    }
    // Numbers between the rows are zero from the start, and stay so: a scratch serves one call of one width.
    rows.spread_to(ranges, copy, width);
    HeadRows::F32(Rows::new(copy, n, width, width))
}
