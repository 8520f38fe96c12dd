//! What every layout says of itself is what its mask does, and its parts see each pair once.

use super::block_layout::SeenBlocks;
use super::tests::check;
use super::*;
use crate::{BlockLayout, Parted, Pattern};
use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};

/// The pairs of all parts are those of the mask, none twice, on self-attention and cross lengths.
fn check_parts<P: Parted + std::fmt::Debug>(pattern: P) {
    check(pattern.clone());
    for (batch, n_q, n_kv) in [(1, 40, 40), (2, 33, 33), (1, 64, 64), (1, 7, 30), (1, 30, 7)] {
        if n_q == n_kv || Pattern::cross_lengths(&pattern) {
            check_shape(&pattern, &AttnShape { batch, n_q, n_kv, ..AttnShape::square(2, 1, 4) });
        }
    }
}

fn check_shape<P: Parted + std::fmt::Debug>(pattern: &P, shape: &AttnShape) {
    let AttnShape { batch, n_heads_q, n_q, n_kv, .. } = *shape;
    let (whole, parts) = (pattern.mask(shape).unwrap(), pattern.parts(shape).unwrap());
    attn_testkit::masks::assert_consistent(&whole, shape);
    let mut pairs = 0;
    for head in (0..batch).flat_map(|batch| (0..n_heads_q).map(move |head| Head { batch, head })) {
        let mut seen = vec![0; n_q * n_kv];
        for part in &parts {
            let (rows, keys) = (part.queries.rows(head.batch, n_q), part.keys.rows(head.batch, n_kv));
            for (i, row) in rows.iter().enumerate() {
                for (j, key) in keys.iter().enumerate() {
                    seen[row * n_kv + key] += usize::from(part.mask.sees(head.pair(i, j)));
                }
            }
        }
        for (at, count) in seen.iter().enumerate() {
            let (i, j) = (at / n_kv, at % n_kv);
            let wanted = usize::from(whole.sees(head.pair(i, j)));
            pairs += wanted;
            let counted = if parts.is_empty() { wanted } else { *count };
            assert_eq!(counted, wanted, "{pattern:?}: pair {i}, {j} of {head:?} in {n_q} x {n_kv}");
        }
    }
    assert_eq!(Pattern::pairs(pattern, shape), pairs as u64, "{pattern:?} on {n_q} x {n_kv}");
    for part in &parts {
        let longest = |order: &crate::Order, n| (0..batch).map(|b| order.rows(b, n).len()).max().unwrap_or(0);
        let sorted =
            AttnShape { n_q: longest(&part.queries, n_q), n_kv: longest(&part.keys, n_kv), ..*shape };
        attn_testkit::masks::assert_consistent(&&*part.mask, &sorted);
    }
}

/// The mask's shortcuts agree with its definition.
fn check_mask<P: Pattern + std::fmt::Debug>(pattern: &P) {
    for (n_q, n_kv) in [(40, 40), (1, 20), (9, 23), (23, 9)] {
        if n_q == n_kv || Pattern::cross_lengths(pattern) {
            let shape = AttnShape { n_q, n_kv, ..AttnShape::square(2, 1, 4) };
            attn_testkit::masks::assert_consistent(&pattern.mask(&shape).unwrap(), &shape);
        }
    }
}

#[test]
fn strided_and_fixed() {
    for stride in [None, Some(1), Some(3), Some(8), Some(100)] {
        for merged in [true, false] {
            let strided = StridedAttention { stride, merged };
            check_mask(&strided);
            check_parts(strided);
            for summary in [1, 3].into_iter().filter(|c| stride.is_none_or(|l| l >= *c)) {
                let fixed = FixedAttention { stride, summary, merged };
                check_mask(&fixed);
                check(fixed);
            }
        }
    }
    let shape = AttnShape::square(1, 8, 4);
    assert!(FixedAttention { stride: Some(4), summary: 5, merged: true }.mask(&shape).is_err());
}

#[test]
fn neighbourhoods() {
    let axis = |kernel_size, dilation, stride, causal| AxisWindow { kernel_size, dilation, stride, causal };
    let axes = [
        axis(1, 1, 1, false),
        axis(3, 1, 1, false),
        axis(4, 2, 1, false),
        axis(5, 3, 2, false),
        axis(100, 1, 1, false),
        axis(3, 1, 1, true),
        axis(4, 2, 3, true),
    ];
    for a in axes {
        let one = Neighborhood { axes: [a], grid: None };
        check_mask(&one);
        check_parts(one);
        for b in axes {
            let two = Neighborhood { axes: [a, b], grid: None };
            check_mask(&two);
            check_parts(two);
        }
        let three = Neighborhood { axes: [a, axis(3, 1, 1, false), axis(2, 2, 1, a.causal)], grid: None };
        check_mask(&three);
        check_parts(three);
    }
}

#[test]
fn longformers() {
    for (window, causal) in [(0, false), (2, true), (3, false), (100, true), (100, false)] {
        for globals in [vec![], vec![0], vec![0, 5, 6, 38], (0..64).collect()] {
            let longformer = Longformer { window, causal, globals: GlobalTokens::shared(globals) };
            check_mask(&longformer);
            check_parts(longformer);
        }
    }
    let globals = GlobalTokens::per_batch(vec![vec![1, 4], vec![]]);
    let longformer = Longformer { window: 2, causal: false, globals };
    let shape = AttnShape { batch: 2, ..AttnShape::square(2, 12, 4) };
    attn_testkit::masks::assert_consistent(&longformer.mask(&shape).unwrap(), &shape);
    let one = AttnShape { batch: 3, ..shape };
    assert!(longformer.mask(&one).is_err_and(|e| e.to_string().contains("global_tokens")));
}

/// Counts, causality, and one layout for all heads or one for each.
fn check_layout<L: BlockLayout + std::fmt::Debug>(layout: L) {
    check_mask(&layout);
    let shape = AttnShape::square(3, 40, 4);
    let mask = layout.mask(&shape).unwrap();
    assert_eq!(mask.heads(), if layout.per_head() { 3 } else { 1 });
    assert_eq!(mask.n_pairs(), Pattern::pairs(&layout, &shape), "{layout:?}");
    for (row, n_blocks) in (0..23).flat_map(|n| (0..n).map(move |row| (row, n))) {
        let mut blocks = layout.row(1, row, n_blocks);
        blocks.retain(|col| *col < n_blocks && (!layout.causal() || *col <= row));
        blocks.sort_unstable();
        blocks.dedup();
        let (diagonal, last) = (blocks.contains(&row), blocks.contains(&(n_blocks - 1)));
        let wanted = SeenBlocks { blocks: blocks.len(), diagonal, last };
        assert_eq!(layout.seen(1, row, n_blocks), wanted, "{layout:?}: row {row} of {n_blocks}");
    }
    check(layout);
}

#[test]
fn block_layouts() {
    for (block, causal) in [(1, true), (3, false), (4, true), (8, false), (100, true)] {
        let globals = GlobalBlocks { starts: vec![0, 4], ends: if block == 3 { vec![2, 7] } else { vec![] } };
        for num_random_blocks in [0, 2] {
            let seed = 3;
            let local = LocalLayout { block, num_sliding_window_blocks: 3, causal };
            for different_layout_per_head in [false, true] {
                check_layout(BigBirdLayout {
                    local,
                    num_random_blocks,
                    num_global_blocks: 2,
                    different_layout_per_head,
                    seed,
                });
                check_layout(VariableLayout {
                    block,
                    num_random_blocks,
                    local_window_blocks: vec![2, 1, 3],
                    globals: globals.clone(),
                    horizontal_global_attention: !causal,
                    different_layout_per_head,
                    causal,
                    seed,
                });
                for horizontal in [false, !causal] {
                    check_layout(FixedLayout {
                        block,
                        num_local_blocks: 4,
                        num_global_blocks: 1 + num_random_blocks / 2,
                        num_different_global_patterns: if different_layout_per_head { 2 } else { 1 },
                        horizontal_global_attention: horizontal,
                        different_layout_per_head,
                        causal,
                    });
                }
            }
            for num_global_blocks in [0, 1, 2] {
                check_layout(BigBird {
                    block,
                    num_random_blocks,
                    num_window_blocks: 3,
                    num_global_blocks,
                    seed,
                    causal,
                });
            }
            check_layout(local);
            check_layout(LongformerLayout { local, globals: globals.clone() });
        }
    }
}

#[test]
fn lines_of_grids() {
    for causal in [false, true] {
        for axis in [None, Some(0), Some(1)] {
            check_parts(Axial { grid: None::<[usize; 2]>, axis, causal });
            check_parts(Axial { grid: None::<[usize; 3]>, axis, causal });
        }
    }
    let shape = AttnShape::square(1, 12, 4);
    let wrong = |axis| Axial { grid: Some([3, 4]), axis: Some(axis), causal: false }.mask(&shape);
    assert!(wrong(1).is_ok() && wrong(2).is_err());
}

#[test]
fn tokens_of_videos() {
    for (tile, window) in [([1, 1, 1], [1, 3, 5]), ([2, 3, 4], [3, 1, 2]), ([100, 2, 2], [1, 2, 9])] {
        check_parts(SlidingTile { grid: None, tile, window });
    }
    for first_frame in [true, false] {
        for frame in [1, 2, 3, 7, 16, 100] {
            check_parts(Radial { frame, first_frame });
            for kinds in [VideoKinds::Spatial, VideoKinds::Temporal, VideoKinds::Alternating] {
                for (frame_window, token_window) in [(0, 0), (1, 2), (100, 1)] {
                    check_parts(VideoHeads { frame, kinds, frame_window, token_window, first_frame });
                }
            }
        }
    }
    // Octaves beyond the size of a frame.
    let shape = AttnShape::square(1, 150, 4);
    let radial = Radial { frame: 3, first_frame: true };
    assert_eq!(radial.parts(&shape).unwrap().len(), 2);
    check_shape(&radial, &shape);
    check_shape(&Radial { frame: 3, first_frame: false }, &AttnShape::square(1, 149, 4));
}

/// A pattern whose part names rows that do not exist.
#[derive(Debug, Clone)]
struct Misplaced(crate::Part);

impl Pattern for Misplaced {
    type Mask = attn_core::mask::SeeAll;
    const NAME: &'static str = "misplaced";

    fn mask(&self, _: &AttnShape) -> attn_core::Result<Self::Mask> {
        Ok(attn_core::mask::SeeAll)
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        (shape.rows() * shape.n_kv) as u64
    }

    fn is_causal(&self) -> bool {
        false
    }
}

impl Parted for Misplaced {
    fn parts(&self, _: &AttnShape) -> attn_core::Result<Vec<crate::Part>> {
        Ok(vec![self.0.clone()])
    }
}

#[test]
fn orders_of_rows_that_do_not_exist_are_refused() {
    use crate::{Order, Part, PartedAttention};
    use attn_core::Attention;
    let shape = AttnShape::square(1, 40, 4);
    let problem = attn_testkit::inputs::Problem::normal(shape, 0);
    let good = Part::natural(std::sync::Arc::new(attn_core::mask::SeeAll));
    let wrong = [
        (Part { queries: Order::of(vec![3, 40]), ..good.clone() }, "row 40"),
        (Part { keys: Order::of(vec![41]), ..good.clone() }, "row 41"),
        (Part { keys: Order::per_batch(vec![vec![], vec![]]), ..good.clone() }, "batch"),
        (Part { source: 1, ..good }, "source"),
    ];
    for (part, word) in wrong {
        let mut out = vec![0.0; 160];
        let view = attn_core::view::ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
        let attention = PartedAttention::new(Misplaced(part));
        let error = attention.forward(problem.qkv().unwrap(), view.into()).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
