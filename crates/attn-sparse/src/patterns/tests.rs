//! What every pattern says of itself is what its mask does.

use super::*;
use crate::Pattern;
use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};

/// Counts pairs and later keys on several shapes, cross lengths where the pattern accepts them.
pub(crate) fn check<P: Pattern + std::fmt::Debug>(pattern: P) {
    for (n_q, n_kv) in [(0, 5), (1, 1), (5, 9), (9, 5), (16, 16), (40, 40)] {
        if n_q != n_kv && !pattern.cross_lengths() {
            continue;
        }
        let shape = AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 4) };
        let mask = pattern.mask(&shape).unwrap();
        let pairs = (0..n_q).flat_map(|i| (0..n_kv).map(move |j| (i, j)));
        let head = Head { batch: 0, head: 0 };
        let seen: Vec<_> = pairs.filter(|&(i, j)| mask.sees(head.pair(i, j))).collect();
        assert_eq!(pattern.pairs(&shape), seen.len() as u64, "{pattern:?} on {n_q} x {n_kv}");
        let later = seen.iter().filter(|(i, j)| j + n_q > i + n_kv).count();
        assert!(!pattern.is_causal() || later == 0, "{pattern:?} sees {later} later keys");
    }
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
