//! Asking for the next chunk of keys while this one is attended.

use super::rows::{HeadRows, KeyRows};
use attn_core::tile::prefetch;
use attn_core::view::Rows;
use std::ops::Range;

/// The keys and values of the next chunk, asked for between products, the same share each time: where the spans of a mask lie
/// far apart, nothing else would bring them to the caches in time, and a core that asks for too many lines at once waits for
/// them.
pub(super) struct Ahead<'a> {
    /// Keys, then values.
    rows: [Option<Rows<'a, f32>>; 2],
    /// Rows already asked for, of keys and values together.
    asked: usize,
    /// Rows of a turn.
    share: usize,
}

impl<'a> Ahead<'a> {
    /// All of `next` in `turns` turns.
    pub(super) fn new(next: Option<&[Range<usize>]>, kv: [&KeyRows<'a>; 2], turns: usize) -> Self {
        let rows = |rows: &KeyRows<'a>| match (rows, next) {
            (KeyRows::Strided(HeadRows::F32(rows)), Some([keys])) => Some(rows.slice(keys.clone())),
            _ => None,
        };
        let rows = kv.map(rows);
        let n_rows: usize = rows.iter().flatten().map(Rows::len).sum();
        Self { rows, asked: 0, share: n_rows.div_ceil(turns.max(1)) }
    }

    /// One turn.
    #[inline(always)]
    pub(super) fn ask(&mut self) {
        let turn = self.asked..self.asked + self.share;
        self.asked = turn.end;
        let mut before = 0;
        for rows in self.rows.iter().flatten() {
            let own = |at: usize| at.saturating_sub(before).min(rows.len());
            (own(turn.start)..own(turn.end)).for_each(|i| prefetch(rows.row(i)));
            before += rows.len();
        }
    }
}
