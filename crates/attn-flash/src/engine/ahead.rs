//! Asking for the next chunk of keys while this one is attended.

use super::rows::{HeadRows, KeyRows};
use attn_core::tile::prefetch;
use attn_core::view::Rows;
use std::ops::Range;

/// The keys and values of the next chunk, asked for a few at a time between products: where the spans of a mask lie far apart,
/// nothing else would bring them to the caches in time.
pub(super) struct Ahead<'a> {
    rows: [Option<Rows<'a, f32>>; 2],
    /// Rows already asked for.
    next: [usize; 2],
}

impl<'a> Ahead<'a> {
    pub(super) fn new(next: Option<&[Range<usize>]>, kv: [&KeyRows<'a>; 2]) -> Self {
        let rows = |rows: &KeyRows<'a>| match (rows, next) {
            (KeyRows::Strided(HeadRows::F32(rows)), Some([keys])) => Some(rows.slice(keys.clone())),
            _ => None,
        };
        Self { rows: kv.map(rows), next: [0; 2] }
    }

    /// Asks for the next `n` rows of keys (0) or values (1).
    #[inline(always)]
    pub(super) fn ask(&mut self, which: usize, n: usize) {
        if let Some(rows) = &self.rows[which] {
            let first = self.next[which];
            let end = (first + n).min(rows.len());
            (first..end).for_each(|i| prefetch(rows.row(i)));
            self.next[which] = end;
        }
    }
}
