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

/// A mask of blocks with lists of their own for two pairs of heads, cut by a band.
fn windows(s: &AttnShape, sizes: BlockSizes, left: usize) -> BlockMask {
    let band = Band { left: Some(left), ..Band::causal(s, Align::BottomRight) };
    let cols = s.n_kv.div_ceil(sizes.kv);
    let builder = Builder::new(s, sizes).per_head(s.n_heads_q / 2).inside(Arc::new(band));
    builder.from_rows(|_, list, row| (0..cols).filter(|col| (col + row + list) % 3 != 0).collect()).unwrap()
}

fn heads_shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { n_heads_q: 4, n_heads_kv: 2, ..shape(n_q, n_kv) }
}

#[test]
fn both_and_either_of_two_masks_see_what_they_say() {
    for (n_q, n_kv) in [(13, 17), (16, 16), (1, 5), (0, 4)] {
        let s = heads_shape(n_q, n_kv);
        for sizes in [BlockSizes::square(4), BlockSizes { q: 2, kv: 6 }, BlockSizes { q: 3, kv: 5 }] {
            let (a, b) = (windows(&s, BlockSizes::square(4), 9), windows(&s, sizes, 5));
            let full =
                Builder::new(&s, sizes).from_rows(|_, _, row| vec![row % n_kv.div_ceil(sizes.kv)]).unwrap();
            for (a, b) in [(&a, &b), (&b, &a), (&a, &full), (&full, &full)] {
                check(&a.and(b).unwrap(), |p| a.sees(p) && b.sees(p));
                check(&a.or(b).unwrap(), |p| a.sees(p) || b.sees(p));
            }
            assert!(full.or(&full).unwrap().inside().is_none(), "full blocks need no mask inside");
            assert_eq!(full.and(&full).unwrap().n_blocks(), full.n_blocks());
        }
    }
    let (a, b) = (heads_shape(8, 8), heads_shape(8, 9));
    let error = windows(&a, BlockSizes::square(2), 3).or(&windows(&b, BlockSizes::square(2), 3)).unwrap_err();
    assert!(error.to_string().contains("n_kv is 9, expected 8"), "{error}");
}

#[test]
fn bits_and_bytes_see_the_same_pairs() {
    for (n_q, n_kv) in [(13, 17), (32, 32), (1, 1), (0, 0), (130, 130)] {
        let s = AttnShape { batch: 2, ..heads_shape(n_q, n_kv) };
        for sizes in [BlockSizes::square(4), BlockSizes { q: 3, kv: 64 }, BlockSizes::square(1)] {
            let mask = windows(&s, sizes, 7);
            let (bits, read) = (mask.with_bits(), BlockMask::from_bytes(&mask.to_bytes().unwrap()).unwrap());
            for other in [&bits, &read] {
                check(other, |p| mask.sees(p));
                assert_eq!((other.n_blocks(), other.n_pairs()), (mask.n_blocks(), mask.n_pairs()));
                assert_eq!((other.shape(), other.heads(), other.batch()), (mask.shape(), 2, 1));
            }
            assert_eq!(read.to_bytes().unwrap(), bits.to_bytes().unwrap());
        }
    }
    let full = Builder::new(&shape(6, 6), BlockSizes::square(2)).from_rows(|_, _, row| vec![row]).unwrap();
    assert!(BlockMask::from_bytes(&full.to_bytes().unwrap()).unwrap().inside().is_none());
}

#[test]
fn malformed_bytes_are_refused() {
    let bytes = windows(&heads_shape(9, 9), BlockSizes::square(4), 3).to_bytes().unwrap();
    for cut in [0, 7, 8, 100, bytes.len() - 1] {
        assert!(BlockMask::from_bytes(&bytes[..cut]).is_err(), "{cut} bytes");
    }
    // Every byte of the numbers, changed: refused, or another mask that can be asked.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in header..bytes.len() {
        for change in [1, 0x80, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] ^= change;
            if let Ok(mask) = BlockMask::from_bytes(&bytes) {
                let small = mask.shape().n_q < 100 && mask.shape().n_kv < 100;
                assert!(!small || mask.n_blocks() <= 1000);
                mask.sees(HEAD.pair(0, 0));
            }
        }
    }
}

#[test]
fn the_transpose_lists_who_sees_a_block() {
    let s = AttnShape { batch: 2, ..heads_shape(11, 17) };
    let mask = windows(&s, BlockSizes { q: 2, kv: 3 }, 6);
    let columns = mask.transpose();
    assert_eq!(columns.n_block_cols(), mask.n_block_cols());
    for head in (0..2).flat_map(|batch| (0..4).map(move |head| Head { batch, head })) {
        for block in 0..mask.n_block_cols() {
            let rows = 0..mask.n_block_rows();
            let listed = rows.filter_map(|row| {
                mask.row(head, row).find(|(col, _)| *col == block).map(|(_, partial)| (row, partial))
            });
            assert!(columns.column(head, block).eq(listed), "{head:?}, block {block}");
        }
    }
}

#[test]
fn statistics_count_pairs_and_blocks() {
    let s = shape(10, 10);
    let causal = Arc::new(Band::causal(&s, Align::BottomRight));
    let mask = Builder::new(&s, BlockSizes::square(4)).inside(causal).from_inside().unwrap();
    let found = mask.statistics();
    assert_eq!((found.pairs, found.blocks, found.partial), (55, 6, 3));
    assert_eq!(found.keys_per_query, Spread { min: 1, mean: 5.5, max: 10 });
    assert_eq!(found.blocks_per_row, Spread { min: 1, mean: 2.0, max: 3 });
    assert_eq!((found.pair_density, found.block_density), (0.55, 6.0 / 9.0));
    assert!(found.to_string().contains("55 pairs (55.00 %)"), "{found}");
    let nothing = Builder::new(&shape(0, 4), BlockSizes::square(4)).from_inside().unwrap().statistics();
    assert_eq!((nothing.pairs, nothing.pair_density), (0, 0.0));
}

#[test]
fn spans_that_are_seen_are_said_to_be() {
    let s = shape(8, 12);
    let lists = [vec![0, 2], vec![0, 2], vec![1], vec![]];
    let mask =
        Builder::new(&s, BlockSizes { q: 2, kv: 3 }).from_rows(|_, _, row| lists[row].clone()).unwrap();
    assert!(mask.sees_spans(HEAD, 0..4) && mask.sees_spans(HEAD, 5..6) && mask.sees_spans(HEAD, 6..8));
    assert!(!mask.sees_spans(HEAD, 3..5) && !mask.sees_spans(HEAD, 5..7));
    let band = Arc::new(Band::causal(&s, Align::BottomRight));
    let cut = Builder::new(&s, BlockSizes::square(4)).inside(band).from_inside().unwrap();
    assert!(!cut.sees_spans(HEAD, 0..2));
    for row in 0..8 {
        // One row sees what the mask inside leaves of its blocks.
        let spans = cut.spans(HEAD, row..row + 1, 12);
        assert!(
            cut.sees_spans(HEAD, row..row + 1) && spans == std::slice::from_ref(&(0..row + 5)),
            "{spans:?}"
        );
    }
    assert_eq!(cut.spans(HEAD, 0..2, 12).first(), Some(&(0..6)), "cut to what the mask inside can see");
    let s = heads_shape(8, 8);
    let lists = windows(&s, BlockSizes::square(2), 3);
    assert!(lists.is_shared_by(0, 0..2) && lists.is_shared_by(0, 2..4) && !lists.is_shared_by(0, 1..3));
}
