//! The largest scores.

use super::rank::{index_of, indices, is_visible, keep_largest, rank};

/// Indices of the `k` largest scores, ascending; fewer if fewer are visible (above -inf). Time `O(n + k log k)`.
///
/// ```
/// use attn_sparse::select::top_k;
///
/// assert_eq!(top_k(&[1.0, 3.0, f32::NEG_INFINITY, 3.0, 2.0], 2), [1, 3]);
/// assert_eq!(top_k(&[5.0, 5.0, 5.0], 2), [0, 1]);
/// ```
///
/// # Panics
/// If there are more than 2^32 scores.
pub fn top_k(scores: &[f32], k: usize) -> Vec<usize> {
    top_k_with(scores, k, &[])
}

/// [`top_k`] in which the `forced` indices take slots first, in the order given, whatever their scores; hidden ones (-inf)
/// and repeated ones take none.
///
/// # Panics
/// If there are more than 2^32 scores or a forced index is none of theirs.
pub fn top_k_with(scores: &[f32], k: usize, forced: &[usize]) -> Vec<usize> {
    let mut taken: Vec<usize> = Vec::with_capacity(forced.len().min(k));
    for index in forced {
        if taken.len() < k && is_visible(scores[*index]) && !taken.contains(index) {
            taken.push(*index);
        }
    }
    let mut ranks = visible(scores, &taken);
    keep_largest(&mut ranks, k - taken.len());
    taken.extend(indices(&ranks));
    taken.sort_unstable();
    taken
}

/// Indices of all visible scores, the largest first, of equal ones the lower index. Time `O(n log n)`.
///
/// # Panics
/// If there are more than 2^32 scores.
pub fn ranked(scores: &[f32]) -> Vec<usize> {
    let mut ranks = visible(scores, &[]);
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    ranks.into_iter().map(|rank| index_of(rank) as usize).collect()
}

/// Indices of the scores that are `threshold` or more, ascending; NaN counts as more, -inf never.
pub fn at_least(scores: &[f32], threshold: f32) -> Vec<usize> {
    let reaches = |score: f32| is_visible(score) && (score.is_nan() || score >= threshold);
    scores.iter().enumerate().filter(|(_, score)| reaches(**score)).map(|(index, _)| index).collect()
}

/// The ranks of the visible scores that are not `taken` already.
pub(super) fn visible(scores: &[f32], taken: &[usize]) -> Vec<u64> {
    assert!(u32::try_from(scores.len()).is_ok(), "{} scores are too many", scores.len());
    let mut sorted = taken.to_vec();
    sorted.sort_unstable();
    let free = |index: usize| sorted.is_empty() || sorted.binary_search(&index).is_err();
    let all = scores.iter().enumerate().filter(|(index, score)| is_visible(**score) && free(*index));
    all.map(|(index, score)| rank(*score, index as u32)).collect()
}
