//! What every pattern says of itself is what its mask does.

use super::*;
use crate::Pattern;
use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};

/// Counts pairs and later keys on several shapes, cross lengths where the pattern accepts them.
pub(crate) fn check<P: Pattern + std::fmt::Debug>(pattern: P) {
    check_heads(pattern, (1, 1, 1));
}

/// [`check`] with batch entries, query heads and key/value heads.
fn check_heads<P: Pattern + std::fmt::Debug>(
    pattern: P,
    (batch, n_heads_q, n_heads_kv): (usize, usize, usize),
) {
    for (n_q, n_kv) in [(0, 5), (1, 1), (5, 9), (9, 5), (16, 16), (40, 40)] {
        if n_q != n_kv && !pattern.cross_lengths() {
            continue;
        }
        let shape = AttnShape { batch, n_heads_q, n_heads_kv, n_q, n_kv, head_dim: 4, head_dim_v: 4 };
        check_shape(&pattern, &shape);
    }
}

fn check_shape<P: Pattern + std::fmt::Debug>(pattern: &P, shape: &AttnShape) {
    let AttnShape { batch, n_heads_q, n_q, n_kv, .. } = *shape;
    let mask = pattern.mask(shape).unwrap();
    let heads = (0..batch * n_heads_q).map(|at| Head { batch: at / n_heads_q, head: at % n_heads_q });
    let mut count = 0;
    for head in heads {
        let pairs = (0..n_q).flat_map(|i| (0..n_kv).map(move |j| (i, j)));
        let seen: Vec<_> = pairs.filter(|&(i, j)| mask.sees(head.pair(i, j))).collect();
        count += seen.len() as u64;
        let later = seen.iter().filter(|(i, j)| j + n_q > i + n_kv).count();
        assert!(!pattern.is_causal() || later == 0, "{pattern:?} sees {later} later keys");
        let decision = pattern.decision(shape).unwrap();
        for i in 0..n_q {
            let of_row: Vec<_> = seen.iter().filter(|pair| pair.0 == i).map(|pair| pair.1).collect();
            assert_eq!(decision.selected(head, i, n_kv), of_row, "{pattern:?}, row {i} of {n_q} x {n_kv}");
        }
    }
    assert_eq!(pattern.pairs(shape), count, "{pattern:?} on {shape:?}");
    attn_testkit::masks::assert_consistent(&mask, shape);
}

#[test]
fn counts_and_causality_are_those_of_the_mask() {
    for (left, right) in [(0, 0), (3, 0), (0, 2), (4, 4), (100, 100)] {
        check(SlidingWindow { left, right });
    }
    for (n_sinks, window) in [(0, 1), (4, 1), (4, 3), (2, 100), (100, 2)] {
        check(SinkWindow { n_sinks, window });
    }
    for chunk_len in [1, 3, 8, 100] {
        check(ChunkedCausal { chunk_len });
    }
}

#[test]
fn padding_hides_the_end_of_each_entry() {
    for causal in [true, false] {
        check_heads(Padded { lengths: vec![], causal }, (2, 2, 1));
        check_heads(Padded { lengths: vec![1], causal }, (2, 2, 2));
        check_heads(Padded { lengths: vec![0, 1], causal }, (2, 1, 1));
    }
    check_shape(
        &Padded { lengths: vec![9, 3], causal: true },
        &AttnShape { batch: 2, ..AttnShape::square(2, 9, 1) },
    );
}

#[test]
fn prefixes_see_themselves() {
    for prefix in [0, 1, 4, 100] {
        check(PrefixLm { prefix: vec![prefix] });
    }
    check_heads(PrefixLm { prefix: vec![3, 0] }, (2, 2, 1));
}

#[test]
fn spans_see_themselves() {
    for (len, every) in [(0, 3), (2, 5), (4, 4), (100, 200)] {
        check_heads(BidirectionalSpans { spans: SpanLayout::Periodic { len, every } }, (2, 2, 1));
    }
    let shape = AttnShape { batch: 2, n_q: 5, ..AttnShape::square(1, 9, 1) };
    check_shape(&BidirectionalSpans { spans: SpanLayout::Ranges(vec![1..3, 3..8]) }, &shape);
    let ids = [-1, 0, 0, 7, 7, 7, -1, 0, 0, 2, 2, -1, -5, 2, 2, 2, 2, 2];
    check_shape(&BidirectionalSpans { spans: SpanLayout::Ids(ids.to_vec()) }, &shape);
    let wrong = |spans| BidirectionalSpans { spans }.mask(&shape).unwrap_err().to_string();
    assert!(wrong(SpanLayout::Ranges(vec![4..6, 5..7])).contains("spans[1]"));
    assert!(wrong(SpanLayout::Ranges(vec![0..2, 4..10])).contains("n_kv = 9"));
    assert!(wrong(SpanLayout::Ids(vec![0; 10])).contains("span_ids"));
}

#[test]
fn documents_see_themselves() {
    for causal in [true, false] {
        for len in [1, 3, 100] {
            check_heads(Documents { layout: DocumentLayout::Equal(len), causal }, (2, 2, 1));
        }
        let shape = AttnShape { batch: 2, n_q: 5, ..AttnShape::square(2, 9, 1) };
        check_shape(&Documents { layout: DocumentLayout::Offsets(vec![0, 3, 3, 4, 9]), causal }, &shape);
        let ids = [4, 4, 0, 0, 4, 4, -1, 3, 3, 1, 1, 1, 0, 0, 0, -1, -1, 1];
        check_shape(&Documents { layout: DocumentLayout::Ids(ids.to_vec()), causal }, &shape);
        check_shape(&Documents { layout: DocumentLayout::Ids(ids[..9].to_vec()), causal }, &shape);
        for offsets in [vec![0, 8], vec![1, 9], vec![0, 5, 4, 9], vec![]] {
            let layout = DocumentLayout::Offsets(offsets);
            let error = Documents { layout, causal }.mask(&shape).unwrap_err().to_string();
            assert!(error.contains("cu_seqlens"), "{error}");
        }
    }
}

#[test]
fn buckets_see_their_neighbours() {
    for causal in [true, false] {
        for (bucket, back, forward) in [(1, 0, 0), (3, 1, 0), (4, 0, 2), (5, 2, 1), (100, 1, 1), (7, 50, 50)]
        {
            check_heads(LocalBuckets { bucket, back, forward, causal }, (2, 1, 1));
        }
    }
}

#[test]
fn dilated_windows_keep_to_their_class() {
    for causal in [true, false] {
        for (window, dilation) in [(1, 1), (1, 3), (3, 2), (2, 7), (100, 3), (2, 1000), (usize::MAX, 5)] {
            check_heads(DilatedWindow::new(window, dilation, causal), (2, 2, 1));
        }
        let per_head = DilatedWindow { window: 2, dilation: [1, 2, 2, 5].into(), causal };
        check_heads(per_head.clone(), (1, 4, 2));
        let error = per_head.mask(&AttnShape::square(3, 4, 4)).unwrap_err().to_string();
        assert!(error.contains("dilation") && error.contains('3'), "{error}");
        assert!(DilatedWindow::new(2, 0, causal).mask(&AttnShape::square(3, 4, 4)).is_err());
    }
}

#[test]
fn heads_follow_their_pattern() {
    let (full, local) = (SlidingWindow::causal(usize::MAX), SinkWindow { n_sinks: 1, window: 2 });
    for heads in [HeadChoice::Listed(vec![]), HeadChoice::Listed(vec![1, 3]), HeadChoice::Share(0.5)] {
        check_heads(PerHead { heads, first: full, second: local }, (2, 4, 2));
    }
    let half = PerHead { heads: HeadChoice::Share(0.5), first: full, second: local };
    let shape = AttnShape { n_heads_kv: 2, ..AttnShape::square(6, 9, 1) };
    let mask = half.mask(&shape).unwrap();
    let sees = |head| mask.sees(Head { batch: 0, head }.pair(8, 3));
    assert_eq!([0, 1, 2, 3, 4, 5].map(sees), [true, true, true, false, false, false]);
    for heads in [HeadChoice::Listed(vec![6]), HeadChoice::Share(1.5), HeadChoice::Share(f64::NAN)] {
        assert!(PerHead { heads, first: full, second: local }.mask(&shape).is_err());
    }
}

#[test]
fn unions_and_intersections_are_those_of_the_sets() {
    let (a, b) = (SlidingWindow { left: 3, right: 1 }, ChunkedCausal { chunk_len: 6 });
    let c = DilatedWindow::new(2, 4, false);
    check_heads(Union(a, b), (2, 2, 1));
    check_heads(Intersection(a, b), (2, 2, 1));
    check(Union(Intersection(a, c.clone()), b));
    check(Intersection(Union(a, c), b));
    let shape = AttnShape::square(1, 30, 1);
    let each = a.pairs(&shape) + b.pairs(&shape);
    assert_eq!(Union(a, b).pairs(&shape) + Intersection(a, b).pairs(&shape), each);
}

#[test]
fn streams_keep_what_both_need() {
    let (window, sinks) = (SlidingWindow::causal(9), SinkWindow { n_sinks: 2, window: 5 });
    let kept = Union(window, sinks).kept().unwrap();
    assert_eq!((kept.sinks, kept.last), (2, Some(8)));
    assert_eq!(Union(window, ChunkedCausal { chunk_len: 4 }).kept().unwrap().last, None);
    let offsets = Documents { layout: DocumentLayout::Offsets(vec![0, 4]), causal: true };
    assert!(Intersection(window, offsets).kept().is_none());
}
