//! How many pairs a mask sees, where no formula counts them.

use attn_core::AttnShape;
use attn_core::mask::{Cover, Head, Mask};
use std::ops::Range;

/// Rows that are asked about together.
const ROWS: usize = 32;
/// Keys that are asked about together.
const KEYS: usize = 64;
/// Pairs that may be asked about; of longer problems, evenly spread blocks of rows are counted.
const BUDGET: usize = 1 << 24;

/// Batch entries and heads between which a mask tells no difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alike {
    pub(crate) batch: bool,
    pub(crate) heads: bool,
}

/// Pairs that the mask sees, over all heads of all batch entries. Exact up to 2^24 pairs a head; beyond, extrapolated from as
/// many of blocks of rows spread evenly over the sequence.
pub(crate) fn count_pairs(mask: &dyn Mask, shape: &AttnShape, alike: Alike) -> u64 {
    let n_blocks = shape.n_q.div_ceil(ROWS);
    let counted = n_blocks.min((BUDGET / (ROWS * shape.n_kv.max(1))).max(1));
    let axis = |alike: bool, n: usize| if alike { (n.min(1), n as u64) } else { (n, 1) };
    let (heads, head_times) = axis(alike.heads, shape.n_heads_q);
    let (entries, batch_times) = axis(alike.batch, shape.batch);
    let mut seen = 0;
    for at in 0..counted {
        // The middle one of as many blocks as this one stands for.
        let block = (at * n_blocks + n_blocks / 2) / counted;
        let first = block * ROWS;
        let rows = first..(first + ROWS).min(shape.n_q);
        for at in 0..entries * heads {
            let head = Head { batch: at / heads, head: at % heads };
            seen += in_rows(mask, head, rows.clone(), shape.n_kv);
        }
    }
    let share = (seen as u128 * n_blocks as u128 / counted.max(1) as u128) as u64;
    share * head_times * batch_times
}

fn in_rows(mask: &dyn Mask, head: Head, rows: Range<usize>, n_kv: usize) -> u64 {
    let mut seen = 0;
    for span in mask.spans(head, rows.clone(), n_kv) {
        for first in span.clone().step_by(KEYS) {
            let keys = first..(first + KEYS).min(span.end);
            seen += match mask.cover(head, rows.clone(), keys.clone()) {
                Cover::Empty => 0,
                Cover::Full => rows.len() * keys.len(),
                Cover::Partial => {
                    let of_row = |i: usize| keys.clone().filter(|&j| mask.sees(head.pair(i, j))).count();
                    rows.clone().map(of_row).sum()
                }
            };
        }
    }
    seen as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::band_pairs;
    use attn_core::mask::{Align, Band, Pair, Predicate};

    const ALIKE: Alike = Alike { batch: true, heads: true };

    #[test]
    fn short_problems_are_counted_exactly() {
        for (n_q, n_kv) in [(0, 4), (1, 7), (70, 70), (300, 131), (4096, 200)] {
            let shape = AttnShape { n_q, n_kv, batch: 2, ..AttnShape::square(3, 1, 1) };
            let band = Band { left: Some(40), ..Band::causal(&shape, Align::BottomRight) };
            assert_eq!(count_pairs(&band, &shape, ALIKE), 6 * band_pairs(&shape, &band));
            let one = Predicate(move |p: Pair| (p.batch, p.head) == (1, 2) && band.sees(p));
            let none = Alike { batch: false, heads: false };
            assert_eq!(count_pairs(&one, &shape, none), band_pairs(&shape, &band));
        }
    }

    #[test]
    fn long_problems_are_extrapolated() {
        let shape = AttnShape::square(1, 100_000, 1);
        let causal = Band::causal(&shape, Align::BottomRight);
        for band in [causal, Band { left: Some(511), ..causal }] {
            let (got, want) = (count_pairs(&band, &shape, ALIKE) as f64, band_pairs(&shape, &band) as f64);
            assert!((got / want - 1.0).abs() < 0.02, "{got} for {want}");
        }
    }
}
