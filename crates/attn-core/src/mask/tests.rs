use super::*;
use crate::AttnShape;

const HEAD: Head = Head { batch: 0, head: 0 };

/// `spans` and `cover` may only leave out or wave through what `sees` says.
fn check_consistent(mask: &impl Mask, n_q: usize, n_kv: usize, what: &str) {
    for rows in [0..1, 0..n_q, n_q / 3..n_q / 2 + 1, n_q - 1..n_q] {
        let spans = mask.spans(HEAD, rows.clone(), n_kv);
        assert!(spans.iter().all(|s| s.start < s.end && s.end <= n_kv), "{what}: {spans:?}");
        assert!(spans.windows(2).all(|w| w[0].end <= w[1].start), "{what}: {spans:?}");
        for j in 0..n_kv {
            let seen = rows.clone().any(|i| mask.sees(HEAD.pair(i, j)));
            let inside = spans.iter().any(|s| s.contains(&j));
            assert!(inside || !seen, "{what}: rows {rows:?} see key {j} outside {spans:?}");
            let mut scores = vec![1.0; rows.len()];
            mask.hide(HEAD, rows.clone(), j, &mut scores);
            let hidden = rows.clone().map(|i| !mask.sees(HEAD.pair(i, j)));
            assert!(
                scores.iter().map(|s| *s != 1.0).eq(hidden),
                "{what}: rows {rows:?}, key {j}: hide gives {scores:?}"
            );
        }
        for keys in [0..1, 0..n_kv, n_kv / 4..n_kv / 2 + 1, n_kv - 1..n_kv] {
            let seen: Vec<bool> = rows
                .clone()
                .flat_map(|i| keys.clone().map(move |j| (i, j)))
                .map(|(i, j)| mask.sees(HEAD.pair(i, j)))
                .collect();
            match mask.cover(HEAD, rows.clone(), keys.clone()) {
                Cover::Empty => {
                    assert!(seen.iter().all(|s| !s), "{what}: {rows:?} x {keys:?} is not empty")
                }
                Cover::Full => {
                    assert!(seen.iter().all(|s| *s), "{what}: {rows:?} x {keys:?} is not full")
                }
                Cover::Partial => {}
            }
        }
    }
}

#[test]
fn spans_and_cover_agree_with_sees() {
    for (n_q, n_kv) in [(1, 1), (5, 9), (9, 5), (16, 16), (17, 40)] {
        for offset in [-20, -3, 0, 4, n_kv as isize - n_q as isize, 60] {
            for left in [None, Some(0), Some(2), Some(usize::MAX)] {
                for right in [None, Some(0), Some(3), Some(usize::MAX)] {
                    let band = Band { offset, left, right };
                    let what = format!("{band:?} on {n_q} x {n_kv}");
                    check_consistent(&band, n_q, n_kv, &what);
                    check_consistent(&And(band, KeysBelow(n_kv / 2)), n_q, n_kv, &what);
                    check_consistent(&Or(band, KeysBelow(2)), n_q, n_kv, &what);
                    let causal = Band { offset, left: None, right: Some(0) };
                    check_consistent(&And(causal, Or(KeysBelow(3), band)), n_q, n_kv, &what);
                }
            }
        }
    }
}

#[test]
fn bands_at_the_ends_of_the_numbers_are_what_they_say() {
    let far =
        [isize::MIN, isize::MIN + 1, isize::MIN / 8, -3, 0, 4, isize::MAX / 8, isize::MAX - 1, isize::MAX];
    let widths = [0, 5, 1 << 62, isize::MAX as usize, isize::MAX as usize + 4, usize::MAX - 1, usize::MAX];
    let widths: Vec<Option<usize>> = std::iter::once(None).chain(widths.map(Some)).collect();
    for offset in far {
        for left in &widths {
            for right in &widths {
                let band = Band { offset, left: *left, right: *right };
                for (i, j) in (0..7).flat_map(|i| (0..9).map(move |j| (i, j))) {
                    let (position, key) = (i as i128 + offset as i128, j as i128);
                    let want = left.is_none_or(|left| position - left as i128 <= key)
                        && right.is_none_or(|right| key <= position + right as i128);
                    assert_eq!(band.sees(HEAD.pair(i, j)), want, "{band:?}, row {i}, key {j}");
                }
                check_consistent(&band, 7, 9, &format!("{band:?}"));
            }
        }
    }
}

#[test]
fn causal_aligns_the_last_query_with_the_last_key() {
    let shape = AttnShape { n_q: 2, n_kv: 5, ..AttnShape::square(1, 1, 1) };
    let seen = |align, i| {
        let band = Band::causal(&shape, align);
        (0..5).filter(|&j| band.sees(HEAD.pair(i, j))).collect::<Vec<_>>()
    };
    assert_eq!(seen(Align::BottomRight, 0), [0, 1, 2, 3]);
    assert_eq!(seen(Align::BottomRight, 1), [0, 1, 2, 3, 4]);
    assert_eq!(seen(Align::TopLeft, 0), [0]);
    assert_eq!(seen(Align::Offset(-1), 0), [] as [usize; 0]);
}

#[test]
fn dense_masks_broadcast_from_the_right() {
    let shape = AttnShape { batch: 2, n_q: 2, n_kv: 3, ..AttnShape::square(2, 1, 1) };
    let per_head = [true, false]; // (heads, 1, 1)
    let mask = DenseMask::new(&per_head, &[2, 1, 1], &shape).unwrap();
    assert!(mask.sees(Pair { batch: 1, head: 0, i: 1, j: 2 }));
    assert!(!mask.sees(Pair { batch: 1, head: 1, i: 0, j: 0 }));
    let wrong = DenseMask::new(&per_head, &[2], &shape).unwrap_err().to_string();
    assert!(wrong.contains("n_kv is 2") && wrong.contains("1 or 3"), "{wrong}");
}

/// `spans` and `cover` say neither too little nor too much.
fn check_exact(mask: &impl Mask, shape: &AttnShape, what: &str) {
    let blocks = |n: usize| (0..n).flat_map(move |start| (start + 1..=n).map(move |end| start..end));
    for batch in 0..shape.batch {
        let head = Head { batch, head: 0 };
        for rows in blocks(shape.n_q) {
            let seen = |i: usize, j: usize| mask.sees(head.pair(i, j));
            let spans = mask.spans(head, rows.clone(), shape.n_kv);
            let keys = (0..shape.n_kv).filter(|&j| rows.clone().any(|i| seen(i, j)));
            let spanned = spans.iter().cloned().flatten();
            assert_eq!(spanned.collect::<Vec<_>>(), keys.collect::<Vec<_>>(), "{what}: {head:?} {rows:?}");
            for keys in blocks(shape.n_kv) {
                let mut pairs = rows.clone().flat_map(|i| keys.clone().map(move |j| (i, j)));
                let some = pairs.clone().any(|(i, j)| seen(i, j));
                let all = pairs.all(|(i, j)| seen(i, j));
                let want = match (some, all) {
                    (false, _) => Cover::Empty,
                    (_, true) => Cover::Full,
                    _ => Cover::Partial,
                };
                assert_eq!(
                    mask.cover(head, rows.clone(), keys.clone()),
                    want,
                    "{what}: {head:?} {rows:?} {keys:?}"
                );
            }
        }
    }
}

const SMALL: AttnShape =
    AttnShape { batch: 2, n_heads_q: 1, n_heads_kv: 1, n_q: 7, n_kv: 10, head_dim: 1, head_dim_v: 1 };

#[test]
fn masks_by_batch_entry_are_exact() {
    for offsets in [vec![3, -2], vec![0, isize::MAX], vec![isize::MIN, 5], vec![4]] {
        for (left, right) in [(None, Some(0)), (Some(2), Some(1)), (Some(0), None)] {
            let band = BandPerBatch::new(offsets.clone(), left, right, &SMALL).unwrap();
            check_exact(&band, &SMALL, &format!("{band:?}"));
        }
    }
    for lens in [vec![0, 10], vec![3, 7], vec![5]] {
        let lengths = KeyLengths::new(lens.clone(), &SMALL).unwrap();
        check_exact(&lengths, &SMALL, &format!("{lengths:?}"));
        for align in [Align::TopLeft, Align::BottomRight, Align::Offset(-4), Align::Offset(isize::MIN)] {
            let prefix = PrefixLm::new(lens.clone(), &SMALL, align).unwrap();
            check_exact(&prefix, &SMALL, &format!("{prefix:?}"));
        }
    }
}

#[test]
fn packed_documents_are_exact() {
    let documents = [
        (vec![0; 7], vec![0; 10]),
        (vec![0, 0, 0, 1, 1, 2, 3], vec![0, 0, 0, 0, 1, 1, 1, 2, 3, 3]),
        (vec![1, 1, 3, 3, 3, 4, 9], vec![0, 0, 2, 2, 3, 3, 3, 3, 3, 9]),
        (vec![9, 9, 2, 2, 2, 5, 5], vec![9, 9, 9, 2, 5, 5, 5, 5, 5, 5]),
    ];
    for (q, kv) in documents {
        let what = format!("{q:?} and {kv:?}");
        let mask = Documents::new(&q, &kv, &SMALL).unwrap();
        check_exact(&mask, &SMALL, &what);
        let causal = And(Band { offset: 3, left: None, right: Some(0) }, mask);
        check_consistent(&causal, 7, 10, &what);
    }
    let [q, kv] = [14, 20].map(|len| (0..len).map(|row| row / 5).collect::<Vec<i32>>());
    check_exact(&Documents::new(&q, &kv, &SMALL).unwrap(), &SMALL, "other documents in each batch entry");
}

#[test]
fn scattered_ids_and_spans_are_consistent() {
    let shape = AttnShape { n_q: 90, n_kv: 120, ..SMALL };
    let scattered = |n: i32| (0..n).map(|row| row * row / 7 % 5 - 2).collect::<Vec<_>>();
    let (q, kv) = (scattered(90), scattered(120));
    let documents = Documents::new(&q, &kv, &shape).unwrap();
    let spans = Spans::new(&q, &kv, &shape).unwrap();
    check_consistent(&documents, 90, 120, "documents");
    check_consistent(&spans, 90, 120, "spans");
    let causal = Band { offset: 30, left: None, right: Some(0) };
    check_consistent(&Or(causal, &spans), 90, 120, "spans in causal text");
    for (i, j) in (0..90).flat_map(|i| (0..120).map(move |j| (i, j))) {
        let pair = HEAD.pair(i, j);
        assert_eq!(documents.sees(pair), q[i] == kv[j]);
        assert_eq!(spans.sees(pair), q[i] == kv[j] && q[i] >= 0);
    }
    assert_eq!(spans.cover(HEAD, 0..90, 0..120), Cover::Partial);
}

#[test]
fn a_document_in_two_places_has_two_spans() {
    let shape = AttnShape { n_q: 1, n_kv: 100, ..SMALL };
    let mut kv = vec![0; 100];
    kv[20..70].fill(1);
    kv[80..90].fill(1);
    let mask = Documents::new(&[0], &kv, &shape).unwrap();
    assert_eq!(mask.spans(HEAD, 0..1, 100), [0..20, 70..100], "the near two are joined");
    assert_eq!(mask.cover(HEAD, 0..1, 25..60), Cover::Empty);
    assert_eq!(mask.cover(HEAD, 0..1, 70..80), Cover::Full);
}

#[test]
fn dense_masks_know_full_and_empty_tiles() {
    let shape = AttnShape { n_q: 20, n_kv: 150, ..SMALL };
    let seen: Vec<bool> = (0..20 * 150).map(|at| (at % 150 < 70) == (at / 150 < 11)).collect();
    for axes in [&[20, 150][..], &[1, 1, 20, 150]] {
        let mask = DenseMask::new(&seen, axes, &shape).unwrap();
        check_consistent(&mask, 20, 150, "dense");
        assert_eq!(mask.cover(HEAD, 0..11, 0..70), Cover::Full);
        assert_eq!(mask.cover(HEAD, 11..20, 3..70), Cover::Empty);
        assert_eq!(mask.cover(HEAD, 0..11, 0..71), Cover::Partial);
        assert_eq!(mask.cover(HEAD, 10..12, 69..70), Cover::Partial);
    }
    let rows: Vec<bool> = (0..20).map(|i| i < 5).collect();
    let rows = DenseMask::new(&rows, &[20, 1], &shape).unwrap();
    assert_eq!(rows.cover(HEAD, 0..5, 0..150), Cover::Full);
    assert_eq!(rows.cover(HEAD, 4..6, 0..1), Cover::Partial);
    let keys = DenseMask::new(&seen[..150], &[150], &shape).unwrap();
    assert_eq!(keys.cover(HEAD, 0..20, 70..150), Cover::Empty);
}

#[test]
fn what_does_not_fit_the_problem_is_refused() {
    let message = |error: crate::AttnError| error.to_string();
    let offsets = BandPerBatch::new(vec![0; 3], None, None, &SMALL).unwrap_err();
    assert_eq!(message(offsets), "offsets: batch is 3, expected 1 or 2");
    let beyond = KeyLengths::new(vec![3, 11], &SMALL).unwrap_err();
    assert_eq!(message(beyond), "key_lengths[1] is 11, expected at most n_kv = 10");
    let prefix = PrefixLm::new(vec![11], &SMALL, Align::TopLeft).unwrap_err();
    assert_eq!(message(prefix), "prefix[0] is 11, expected at most n_kv = 10");
    assert!(PrefixLm::new(vec![], &SMALL, Align::TopLeft).is_err());
    let ids = Documents::new(&[0; 7], &[0; 9], &SMALL).unwrap_err();
    assert_eq!(message(ids), "documents_kv: n_kv is 9, expected 10, or 10 for each of 2 batch entries");
    assert!(Spans::new(&[0; 13], &[0; 10], &SMALL).is_err());
    assert!(DenseMask::new(&[true], &[usize::MAX, usize::MAX], &SMALL).is_err());
}
