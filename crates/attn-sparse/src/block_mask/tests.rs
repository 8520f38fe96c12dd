//! Block masks against the pairs that they are made from.

use super::*;
use attn_core::mask::{Align, Band, DenseMask, SeeAll};

const HEAD: Head = Head { batch: 0, head: 0 };

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 4) }
}

/// Every pair, every tile and every span of `mask` agree with `wanted`.
fn check(mask: &BlockMask, wanted: impl Fn(Pair) -> bool) {
    let s = *mask.shape();
    for head in (0..s.n_heads_q).map(|head| Head { batch: 0, head }) {
        for i in 0..s.n_q {
            let seen: Vec<bool> = (0..s.n_kv).map(|j| mask.sees(head.pair(i, j))).collect();
            let want: Vec<bool> = (0..s.n_kv).map(|j| wanted(head.pair(i, j))).collect();
            assert_eq!(seen, want, "row {i} of {head:?} in {mask:?}");
        }
        for (rows, keys) in [(0..1, 0..1), (0..3, 2..7), (2..9, 0..s.n_kv), (5..6, 3..4), (0..s.n_q, 4..5)] {
            let (rows, keys) = (rows.start..rows.end.min(s.n_q), keys.start..keys.end.min(s.n_kv));
            if rows.is_empty() || keys.is_empty() {
                continue;
            }
            let pairs = rows.clone().flat_map(|i| keys.clone().map(move |j| (i, j)));
            let seen = pairs.filter(|&(i, j)| wanted(head.pair(i, j))).count();
            match mask.cover(head, rows.clone(), keys.clone()) {
                Cover::Empty => assert_eq!(seen, 0),
                Cover::Full => assert_eq!(seen, rows.len() * keys.len()),
                Cover::Partial => {}
            }
            let spans = mask.spans(head, rows.clone(), s.n_kv);
            assert!(spans.windows(2).all(|pair| pair[0].end < pair[1].start), "{spans:?}");
            for (i, j) in rows.clone().flat_map(|i| keys.clone().map(move |j| (i, j))) {
                let spanned = spans.iter().any(|span| span.contains(&j));
                assert!(spanned || !wanted(head.pair(i, j)), "{i}, {j} is outside of {spans:?}");
            }
            for j in keys {
                let mut scores = vec![1.0; rows.len()];
                mask.hide(head, rows.clone(), j, &mut scores);
                for (i, score) in rows.clone().zip(scores) {
                    assert_eq!(score == 1.0, wanted(head.pair(i, j)), "{i}, {j}");
                }
            }
        }
    }
}

#[test]
fn lists_of_blocks_see_their_blocks_alone() {
    for (n_q, n_kv) in [(12, 12), (10, 7), (1, 1), (3, 20)] {
        for sizes in [BlockSizes { q: 4, kv: 4 }, BlockSizes { q: 3, kv: 2 }, BlockSizes::square(1)] {
            let cols = usize::div_ceil(n_kv, sizes.kv);
            let lists = |row: usize| vec![row * 5 % cols, (row + 2) % cols];
            let mask = Builder::new(&shape(n_q, n_kv), sizes).from_rows(|_, _, row| lists(row)).unwrap();
            check(&mask, |p| lists(p.i / sizes.q).contains(&(p.j / sizes.kv)));
        }
    }
}

#[test]
fn the_mask_inside_cuts_the_listed_blocks() {
    let s = shape(10, 13);
    let band = Band { left: Some(5), ..Band::causal(&s, Align::BottomRight) };
    for sizes in [BlockSizes { q: 4, kv: 3 }, BlockSizes::square(5), BlockSizes { q: 64, kv: 64 }] {
        let mask = Builder::new(&s, sizes).inside(Arc::new(band)).from_inside().unwrap();
        check(&mask, |p| band.sees(p));
        let pairs = (0..10).flat_map(|i| (0..13).map(move |j| (i, j)));
        let seen = pairs.filter(|&(i, j)| band.sees(HEAD.pair(i, j))).count();
        assert_eq!(mask.n_pairs(), seen as u64);
    }
}

#[test]
fn lists_may_differ_by_head_and_batch_entry() {
    let s = AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..AttnShape::square(1, 6, 4) };
    let builder = Builder::new(&s, BlockSizes::square(2)).per_batch().per_head(2);
    let mask = builder.from_rows(|batch, list, row| vec![(batch + list + row) % 3]).unwrap();
    for pair in (0..2).flat_map(|batch| (0..4).map(move |head| Head { batch, head }.pair(3, 4))) {
        assert_eq!(mask.sees(pair), (pair.batch + pair.head / 2 + 1) % 3 == 2, "{pair:?}");
    }
    assert!(mask.check(&s).is_ok());
    assert!(mask.check(&AttnShape { n_q: 7, ..s }).is_err());
    assert!(mask.check(&AttnShape { batch: 3, ..s }).is_err());
}

#[test]
fn dense_layouts_and_compressed_rows_say_the_same() {
    let s = shape(5, 7);
    let layout = [true, false, false, true, false, true, true, false, false, false, false, false];
    let builder = Builder::new(&s, BlockSizes::square(2));
    let dense = builder.from_dense(&layout).unwrap();
    let csr = builder.from_csr(&[0, 2, 4, 4], &[3, 0, 1, 2]).unwrap();
    for (i, j) in (0..5).flat_map(|i| (0..7).map(move |j| (i, j))) {
        let pair = HEAD.pair(i, j);
        assert_eq!(
            (dense.sees(pair), csr.sees(pair)),
            (layout[i / 2 * 4 + j / 2], layout[i / 2 * 4 + j / 2])
        );
    }
    let pairs = DenseMask::new(&[true; 35], &[5, 7], &s).unwrap();
    let full = builder.clone().inside(Arc::new(pairs)).from_inside().unwrap();
    assert_eq!((full.n_blocks(), full.n_pairs(), full.partial.contains(&true)), (12, 35, false));
    let all = builder.inside(Arc::new(SeeAll)).from_inside().unwrap();
    assert_eq!(all.n_pairs(), 35);
}

#[test]
fn malformed_lists_are_refused() {
    let builder = Builder::new(&shape(4, 4), BlockSizes::square(2));
    let says = |result: Result<BlockMask>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    says(builder.from_rows(|_, _, _| vec![2]), "block");
    says(builder.from_csr(&[0, 2, 4], &[0, 0, 1, 1]), "twice");
    says(builder.from_csr(&[0, 2], &[0, 1]), "row_ptr");
    says(builder.from_csr(&[0, 3, 2], &[0, 1]), "row_ptr");
    says(builder.from_dense(&[true; 3]), "layout");
    says(builder.clone().per_head(2).from_dense(&[]), "heads");
    says(Builder::new(&shape(4, 4), BlockSizes { q: 0, kv: 1 }).from_inside(), "block_q");
}
