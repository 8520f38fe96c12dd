//! Who sees whom on each level, and how many levels there are.
//!
//! With blocks of `b` nodes, level 0 sees the own and both neighbour blocks. Level `l >= 1` sees the neighbour blocks
//! without the quadrant that the level below has covered. Its half-blocks stand for the same tokens as the blocks of the
//! level below, so
//!
//! ```text
//! level 0    |P - Q| <= 1                        P, Q   blocks of query and key
//! level l    |P - Q| == 1 and |p - q| > 1        p, q   their half-blocks
//! ```
//!
//! and each pair of tokens is seen on the first level on which their blocks are neighbours, and on no other.

use attn_core::mask::{Cover, Head, Mask, Pair};
use std::ops::Range;

/// Levels above the tokens: the first `K` with `b 2^(K + 1) >= n` tokens, so that the last has at most two blocks.
pub(super) fn coarse_levels(n: usize, block: usize) -> usize {
    let n_blocks = n.div_ceil(block).max(1);
    (n_blocks.next_power_of_two().trailing_zeros() as usize).saturating_sub(1)
}

/// Level 0: the own block and its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NearBlocks {
    pub(super) block: usize,
}

impl NearBlocks {
    /// Visible pairs among `n` nodes.
    pub(super) fn pairs(&self, n: usize, causal: bool) -> u64 {
        let n_blocks = n.div_ceil(self.block);
        let square = |size: u64| if causal { size * (size + 1) / 2 } else { size * size };
        let size = |p: usize| self.block.min(n - p * self.block) as u64;
        let own: u64 = (0..n_blocks).map(|p| square(size(p))).sum();
        let before: u64 = (1..n_blocks).map(|p| size(p) * self.block as u64).sum();
        own + before * if causal { 1 } else { 2 }
    }
}

impl Mask for NearBlocks {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        (pair.i / self.block).abs_diff(pair.j / self.block) <= 1
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let (first, last) = (rows.start / self.block, (rows.end - 1) / self.block);
        let seen = first.saturating_sub(1) * self.block..((last + 2) * self.block).min(n_kv);
        if seen.is_empty() { Vec::new() } else { vec![seen] }
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let blocks = |range: &Range<usize>| (range.start / self.block, (range.end - 1) / self.block);
        let ((first_row, last_row), (first_key, last_key)) = (blocks(&rows), blocks(&keys));
        if first_key > last_row + 1 || first_row > last_key + 1 {
            Cover::Empty
        } else if last_key <= first_row + 1 && last_row <= first_key + 1 {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}

/// Coarse levels: the neighbour blocks without the quadrant next to the diagonal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FarBlocks {
    /// Half a block.
    pub(super) half: usize,
}

impl FarBlocks {
    /// Visible pairs among `n` nodes.
    pub(super) fn pairs(&self, n: usize, causal: bool) -> u64 {
        let size = |p: usize| self.half.min(n - p * self.half) as u64;
        // Keys before a half-block are never the last ones, hence all there.
        let before = |p: usize| (self.seen_before(p).len() * self.half) as u64;
        let before: u64 = (0..n.div_ceil(self.half)).map(|p| size(p) * before(p)).sum();
        before * if causal { 1 } else { 2 }
    }

    /// Half-blocks of the previous block that half-block `p` sees: both for the upper half, one for the lower.
    fn seen_before(&self, p: usize) -> Range<usize> {
        (p / 2 * 2).saturating_sub(2)..p.saturating_sub(1).min(p / 2 * 2)
    }

    /// Half-blocks of the next block that half-block `p` sees: both for the lower half, one for the upper.
    fn seen_after(&self, p: usize) -> Range<usize> {
        p + 2..p / 2 * 2 + 4
    }

    /// Nodes that the rows of half-block `p` see, in two sorted ranges.
    fn seen(&self, p: usize) -> [Range<usize>; 2] {
        [self.seen_before(p), self.seen_after(p)].map(|q| q.start * self.half..q.end * self.half)
    }

    fn halves(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start / self.half..(rows.end - 1) / self.half + 1
    }
}

impl Mask for FarBlocks {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        let (p, q) = (pair.i / self.half, pair.j / self.half);
        (p / 2).abs_diff(q / 2) == 1 && p.abs_diff(q) > 1
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let mut all: Vec<_> = self
            .halves(&rows)
            .flat_map(|p| self.seen(p))
            .map(|seen| seen.start..seen.end.min(n_kv))
            .filter(|seen| !seen.is_empty())
            .collect();
        all.sort_by_key(|seen| seen.start);
        all.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        all
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let mut halves = self.halves(&rows).map(|p| {
            let seen = self.seen(p);
            if seen.iter().any(|seen| seen.start <= keys.start && keys.end <= seen.end) {
                Cover::Full
            } else if seen.iter().all(|seen| seen.end <= keys.start || keys.end <= seen.start) {
                Cover::Empty
            } else {
                Cover::Partial
            }
        });
        let first = halves.next().unwrap_or(Cover::Partial);
        if halves.all(|cover| cover == first) { first } else { Cover::Partial }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::mask::{And, Band};

    const HEAD: Head = Head { batch: 0, head: 0 };
    const CAUSAL: Band = Band { offset: 0, left: None, right: Some(0) };

    /// `spans` and `cover` must agree with `sees`; inside one half-block they must be exact.
    fn check(mask: &impl Mask, n: usize, half: usize, what: &str) {
        for start in (0..n).step_by(half) {
            for end in [start + 1, start + half, start + 3 * half + 1] {
                let rows = start..end.min(n);
                let spans = mask.spans(HEAD, rows.clone(), n);
                assert!(spans.iter().all(|s| s.start < s.end && s.end <= n), "{what}: {spans:?}");
                assert!(spans.windows(2).all(|w| w[0].end <= w[1].start), "{what}: {spans:?}");
                for j in 0..n {
                    let seen = rows.clone().any(|i| mask.sees(HEAD.pair(i, j)));
                    let inside = spans.iter().any(|s| s.contains(&j));
                    let one_half = rows.len() <= half;
                    assert!(inside == seen || inside && !one_half, "{what}: {rows:?}, key {j}, {spans:?}");
                }
                for keys in (0..n).flat_map(|a| [a..a + 1, a..(a + half).min(n), a..(a + 5 * half).min(n)]) {
                    let pairs = || rows.clone().flat_map(|i| keys.clone().map(move |j| HEAD.pair(i, j)));
                    match mask.cover(HEAD, rows.clone(), keys.clone()) {
                        Cover::Empty => assert!(!pairs().any(|p| mask.sees(p)), "{what}: {rows:?} {keys:?}"),
                        Cover::Full => assert!(pairs().all(|p| mask.sees(p)), "{what}: {rows:?} {keys:?}"),
                        Cover::Partial => {}
                    }
                }
            }
        }
    }

    #[test]
    fn spans_and_cover_agree_with_sees() {
        for block in [2, 4, 8] {
            let half = block / 2;
            for n in [1, half, block, block + 1, 4 * block, 5 * block + half, 6 * block - 1] {
                let what = format!("block {block}, n {n}");
                check(&NearBlocks { block }, n, half, &what);
                check(&FarBlocks { half }, n, half, &what);
                check(&And(Some(CAUSAL), NearBlocks { block }), n, half, &what);
                check(&And(Some(CAUSAL), FarBlocks { half }), n, half, &what);
            }
        }
    }

    #[test]
    fn tiles_inside_half_blocks_are_never_partial() {
        let far = FarBlocks { half: 4 };
        for (p, q) in (0..10).flat_map(|p| (0..10).map(move |q| (p, q))) {
            let cover = far.cover(HEAD, p * 4..p * 4 + 4, q * 4..q * 4 + 4);
            let seen = far.sees(HEAD.pair(p * 4, q * 4));
            assert_eq!(cover, if seen { Cover::Full } else { Cover::Empty }, "{p} {q}");
        }
    }

    #[test]
    fn pairs_counts_what_the_masks_see() {
        let count = |mask: &dyn Mask, n: usize| {
            let pairs = (0..n).flat_map(|i| (0..n).map(move |j| HEAD.pair(i, j)));
            pairs.filter(|&p| mask.sees(p)).count() as u64
        };
        for block in [2, 4, 6, 16] {
            let (near, far) = (NearBlocks { block }, FarBlocks { half: block / 2 });
            for n in (0..5 * block + 2).chain([64]) {
                assert_eq!(near.pairs(n, false), count(&near, n), "block {block}, n {n}");
                assert_eq!(far.pairs(n, false), count(&far, n), "block {block}, n {n}");
                assert_eq!(near.pairs(n, true), count(&And(CAUSAL, near), n), "block {block}, n {n}");
                assert_eq!(far.pairs(n, true), count(&And(CAUSAL, far), n), "block {block}, n {n}");
            }
        }
    }

    #[test]
    fn every_pair_is_covered_exactly_once() {
        for block in [2, 4, 8] {
            let lengths = [1, 3, block, 2 * block, 2 * block + 1, 4 * block, 8 * block, 16 * block];
            for n in lengths.into_iter().chain([5 * block + 3, 7 * block - 1, 9 * block, 13 * block + 1]) {
                let (near, far) = (NearBlocks { block }, FarBlocks { half: block / 2 });
                for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let coarse = |l: usize| HEAD.pair(i >> l, j >> l);
                    let coarse_levels = 1..=coarse_levels(n, block);
                    let times = |seen: &dyn Fn(usize, Pair) -> bool| {
                        (0..=*coarse_levels.end()).filter(|&l| seen(l, coarse(l))).count()
                    };
                    let both = |l: usize, p| if l == 0 { near.sees(p) } else { far.sees(p) };
                    assert_eq!(times(&both), 1, "block {block}, n {n}: ({i}, {j})");
                    let causal = |l: usize, p| both(l, p) && CAUSAL.sees(p);
                    assert_eq!(times(&causal), usize::from(j <= i), "block {block}, n {n}: ({i}, {j})");
                }
            }
        }
    }

    #[test]
    fn short_sequences_have_no_coarse_level() {
        let levels: Vec<_> = [0, 1, 8, 16, 17, 32, 33, 64, 65].map(|n| coarse_levels(n, 8)).into();
        assert_eq!(levels, [0, 0, 0, 0, 1, 1, 2, 2, 3]);
    }
}
