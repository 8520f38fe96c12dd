//! One integer that orders a score and its index: the larger score first, of equal ones the lower index.

/// Scores in ascending order as integers; `-0` and `0` are equal, every NaN is above all numbers.
#[inline(always)]
pub(crate) fn ordered(score: f32) -> u32 {
    if score.is_nan() {
        return u32::MAX;
    }
    // Adding zero turns -0 into 0. Bits of positive numbers order as they are, those of negative ones backwards.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// The largest rank belongs to what is selected first. Indices are below 2^32.
#[inline(always)]
pub(crate) fn rank(score: f32, index: u32) -> u64 {
    u64::from(ordered(score)) << 32 | u64::from(!index)
}

/// The index in a rank.
#[inline(always)]
pub(crate) fn index_of(rank: u64) -> u32 {
    !(rank as u32)
}

/// Whether a score may be selected at all.
#[inline(always)]
pub(crate) fn is_visible(score: f32) -> bool {
    // NaN is.
    score != f32::NEG_INFINITY
}

/// Keeps the `k` largest ranks, in no order.
pub(crate) fn keep_largest(ranks: &mut Vec<u64>, k: usize) {
    if k == 0 {
        ranks.clear();
    } else if ranks.len() > k {
        ranks.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        ranks.truncate(k);
    }
}

/// The indices of ranks, ascending.
pub(crate) fn indices(ranks: &[u64]) -> Vec<usize> {
    let mut indices: Vec<usize> = ranks.iter().map(|rank| index_of(*rank) as usize).collect();
    indices.sort_unstable();
    indices
}

/// The score in a rank.
#[inline(always)]
pub(crate) fn score_of(rank: u64) -> f32 {
    score_of_key((rank >> 32) as u32)
}

/// The score that [`ordered`] made an integer of.
#[inline(always)]
pub(crate) fn score_of_key(ordered: u32) -> f32 {
    if ordered >> 31 == 1 { f32::from_bits(ordered & !(1 << 31)) } else { f32::from_bits(!ordered) }
}
