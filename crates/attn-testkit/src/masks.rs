//! Whether a mask's shortcuts agree with its definition.
//!
//! [`Mask::sees`] defines a mask pair by pair. [`Mask::spans`] may leave out only keys that no row sees, and
//! [`Mask::cover`] may call a tile empty or full only if it is: an engine that trusts them would else drop or add keys.

use attn_core::AttnShape;
use attn_core::mask::{Cover, Head, Mask};
use std::ops::Range;

/// Panics with the first tile in which `spans` or `cover` contradicts `sees`, over every head of `shape` and tiles of
/// 1, 3, 16 and all rows and keys.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Align, Band};
///
/// let shape = AttnShape { n_kv: 70, ..AttnShape::square(2, 50, 8) };
/// attn_testkit::masks::assert_consistent(&Band::causal(&shape, Align::BottomRight), &shape);
/// ```
///
/// # Panics
/// If there is one.
#[track_caller]
pub fn assert_consistent(mask: &impl Mask, shape: &AttnShape) {
    for batch in 0..shape.batch {
        for head in 0..shape.n_heads_q {
            let head = Head { batch, head };
            for block_q in [1, 3, 16, shape.n_q] {
                for rows in blocks(shape.n_q, block_q) {
                    if let Err(reason) = check_rows(mask, head, rows, shape.n_kv) {
                        panic!("{head:?}: {reason}");
                    }
                }
            }
        }
    }
}

fn blocks(n: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(block.max(1)).map(move |start| start..(start + block).min(n))
}

fn check_rows(mask: &impl Mask, head: Head, rows: Range<usize>, n_kv: usize) -> Result<(), String> {
    let spans = mask.spans(head, rows.clone(), n_kv);
    let ordered = spans.windows(2).all(|w| w[0].end <= w[1].start);
    if !ordered || spans.iter().any(|s| s.start >= s.end || s.end > n_kv) {
        return Err(format!(
            "spans of rows {rows:?} are not sorted, disjoint ranges below {n_kv}: {spans:?}"
        ));
    }
    for j in (0..n_kv).filter(|j| !spans.iter().any(|s| s.contains(j))) {
        if let Some(i) = rows.clone().find(|&i| mask.sees(head.pair(i, j))) {
            return Err(format!(
                "row {i} sees key {j}, which is outside the spans {spans:?} of rows {rows:?}"
            ));
        }
    }
    for j in 0..n_kv {
        let mut scores = vec![0.0; rows.len()];
        mask.hide(head, rows.clone(), j, &mut scores);
        for (i, score) in rows.clone().zip(scores) {
            if (score == f32::NEG_INFINITY) == mask.sees(head.pair(i, j)) {
                return Err(format!("hide gives {score} to row {i} and key {j}, which sees contradicts"));
            }
        }
    }
    if mask.sees_spans(head, rows.clone()) {
        let keys = || spans.iter().cloned().flatten();
        let mut pairs = rows.clone().flat_map(|i| keys().map(move |j| (i, j)));
        if let Some((i, j)) = pairs.find(|&(i, j)| !mask.sees(head.pair(i, j))) {
            return Err(format!(
                "rows {rows:?} are said to see their spans, but row {i} does not see key {j}"
            ));
        }
    }
    for block_kv in [1, 3, 16, n_kv] {
        for keys in blocks(n_kv, block_kv) {
            let cover = mask.cover(head, rows.clone(), keys.clone());
            let (n, stride) = (rows.len(), rows.len() + 1);
            let (mut tile, mut one_by_one) = (vec![0.0; keys.len() * stride], vec![0.0; keys.len() * stride]);
            mask.hide_tile(head, rows.clone(), keys.clone(), &mut tile, stride);
            for (j, scores) in keys.clone().zip(one_by_one.chunks_exact_mut(stride)) {
                mask.hide(head, rows.clone(), j, &mut scores[..n]);
            }
            if tile != one_by_one {
                return Err(format!("hide_tile and hide differ on {rows:?} x {keys:?}"));
            }
            let contradicts = |seen: bool| match cover {
                Cover::Empty => seen,
                Cover::Full => !seen,
                Cover::Partial => false,
            };
            let mut pairs = rows.clone().flat_map(|i| keys.clone().map(move |j| (i, j)));
            if let Some((i, j)) = pairs.find(|&(i, j)| contradicts(mask.sees(head.pair(i, j)))) {
                let pair = format!("row {i} and key {j}");
                return Err(format!(
                    "the tile {rows:?} x {keys:?} is called {cover:?}, which {pair} contradict"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::{packed_ids, scattered_ids};
    use attn_core::mask::{
        Align, And, Band, BandPerBatch, DenseMask, Documents, KeyLengths, KeysBelow, Or, Pair, Predicate,
        PrefixLm, SeeAll, Spans,
    };
    use proptest::prelude::*;

    const SHAPE: AttnShape =
        AttnShape { batch: 2, n_heads_q: 2, n_heads_kv: 2, n_q: 20, n_kv: 33, head_dim: 1, head_dim_v: 1 };

    #[test]
    fn the_masks_of_the_core_are_consistent() {
        let causal = Band::causal(&SHAPE, Align::BottomRight);
        let window = Band { left: Some(4), ..causal };
        assert_consistent(&SeeAll, &SHAPE);
        assert_consistent(&causal, &SHAPE);
        assert_consistent(&And(causal, Or(KeysBelow(3), window)), &SHAPE);
        assert_consistent(&Predicate(|p: Pair| (p.i * p.j + p.head) % 3 == p.batch), &SHAPE);
        assert_consistent(&causal, &AttnShape { n_kv: 0, ..SHAPE });
    }

    proptest! {
        #[test]
        fn masks_of_ids_are_consistent(
            (packed_q, packed_kv) in (packed_ids(SHAPE.n_q), packed_ids(SHAPE.n_kv)),
            (q, kv) in (scattered_ids(2 * SHAPE.n_q), scattered_ids(2 * SHAPE.n_kv)),
            dense in prop::collection::vec(any::<bool>(), SHAPE.n_kv),
        ) {
            let causal = Band::causal(&SHAPE, Align::BottomRight);
            let packed = Documents::new(&packed_q, &packed_kv, &SHAPE).unwrap();
            let scattered = Documents::new(&q, &kv, &SHAPE).unwrap();
            assert_consistent(&packed, &SHAPE);
            assert_consistent(&scattered, &SHAPE);
            assert_consistent(&And(causal, packed), &SHAPE);
            assert_consistent(&Or(causal, Spans::new(&q, &kv, &SHAPE).unwrap()), &SHAPE);
            assert_consistent(&Or(scattered, DenseMask::new(&dense, &[SHAPE.n_kv], &SHAPE).unwrap()), &SHAPE);
        }

        #[test]
        fn masks_by_batch_entry_are_consistent(
            lens in prop::collection::vec(0..=SHAPE.n_kv, 2),
            offsets in prop::collection::vec(-50..50isize, 2),
            widths in (prop::option::of(0..40usize), prop::option::of(0..40usize)),
        ) {
            let band = BandPerBatch::new(offsets.clone(), widths.0, widths.1, &SHAPE).unwrap();
            let prefix = PrefixLm::new(lens.clone(), &SHAPE, Align::Offset(offsets[0])).unwrap();
            let lens = KeyLengths::new(lens, &SHAPE).unwrap();
            assert_consistent(&band, &SHAPE);
            assert_consistent(&prefix, &SHAPE);
            assert_consistent(&And(lens, Or(band, prefix)), &SHAPE);
        }
    }

    /// Sees the diagonal, with one shortcut that goes wrong in the last tile.
    struct Hasty {
        spans_too_short: bool,
        spans_twice: bool,
        wrong_cover: Option<Cover>,
    }

    impl Mask for Hasty {
        fn sees(&self, p: Pair) -> bool {
            p.i == p.j
        }

        fn spans(&self, _: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
            match (self.spans_too_short && rows.end == 20, self.spans_twice) {
                (true, _) => Vec::new(),
                (_, true) => vec![rows.clone(), rows],
                _ => vec![rows],
            }
        }

        fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
            let late = rows.end == 20 && keys.contains(&19);
            self.wrong_cover.filter(|_| late).unwrap_or(Cover::Partial)
        }
    }

    #[test]
    fn wrong_shortcuts_are_rejected() {
        let honest = || Hasty { spans_too_short: false, spans_twice: false, wrong_cover: None };
        assert_consistent(&honest(), &SHAPE);
        let wrong = [
            (Hasty { spans_too_short: true, ..honest() }, "row 19 sees key 19"),
            (Hasty { spans_twice: true, ..honest() }, "not sorted"),
            (Hasty { wrong_cover: Some(Cover::Empty), ..honest() }, "called Empty"),
            (Hasty { wrong_cover: Some(Cover::Full), ..honest() }, "called Full"),
        ];
        for (mask, reason) in wrong {
            let panic = std::panic::catch_unwind(|| assert_consistent(&mask, &SHAPE)).unwrap_err();
            let message = panic.downcast_ref::<String>().unwrap();
            assert!(message.contains(reason), "{message}");
        }
    }
}
