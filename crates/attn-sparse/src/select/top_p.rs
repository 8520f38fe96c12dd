//! The fewest entries that hold a share of the whole.

use super::rank::{index_of, is_visible};
use super::top_k::visible;

/// The softmax of scores; all zero where none is visible.
pub fn softmax(scores: &[f32]) -> Vec<f32> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return vec![0.0; scores.len()];
    }
    let mut weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
    weights.iter_mut().for_each(|weight| *weight = (f64::from(*weight) / sum) as f32);
    weights
}

/// Indices of the fewest weights, largest first, whose sum reaches `share` of the sum of all, ascending. Weights are
/// non-negative and need not sum to 1; hidden entries are -inf and never taken. A `share` of 1 or more takes all others, zeros
/// included. At least one is taken if one is visible. Sums are in f64, in the order of selection.
///
/// Time `O(n log n)`.
///
/// ```
/// use attn_sparse::select::top_p;
///
/// assert_eq!(top_p(&[0.1, 0.5, 0.1, 0.3], 0.8), [1, 3]);
/// assert_eq!(top_p(&[0.1, 0.5, f32::NEG_INFINITY, 0.0], 1.0), [0, 1, 3]);
/// ```
///
/// # Panics
/// If there are more than 2^32 weights.
pub fn top_p(weights: &[f32], share: f64) -> Vec<usize> {
    top_p_with(weights, share, &[])
}

/// [`top_p`] in which the `forced` indices are taken first, whatever their weights, which count; hidden ones are not taken.
///
/// # Panics
/// If there are more than 2^32 weights or a forced index is none of theirs.
pub fn top_p_with(weights: &[f32], share: f64, forced: &[usize]) -> Vec<usize> {
    let mut taken: Vec<usize> = forced.iter().copied().filter(|index| is_visible(weights[*index])).collect();
    taken.sort_unstable();
    taken.dedup();
    let mut sum: f64 = taken.iter().map(|index| f64::from(weights[*index])).sum();
    let wanted = if share >= 1.0 { f64::INFINITY } else { share * total(weights) };
    for (index, weight) in falling(weights, &taken) {
        // Written so that a NaN sum goes on.
        if sum >= wanted && !taken.is_empty() {
            break;
        }
        sum += weight;
        taken.push(index);
    }
    taken.sort_unstable();
    taken
}

/// Indices of the most weights, largest first, whose sum stays within `share` of the sum of all, ascending; at least one if
/// one is visible. One entry fewer than [`top_p`] unless the share is met exactly; a `share` of 1 or more takes all.
///
/// ```
/// use attn_sparse::select::top_p_within;
///
/// assert_eq!(top_p_within(&[0.125, 0.5, 0.125, 0.25], 0.8), [1, 3]);
/// assert_eq!(top_p_within(&[0.125, 0.5, 0.125, 0.25], 0.1), [1]);
/// ```
///
/// # Panics
/// If there are more than 2^32 weights.
pub fn top_p_within(weights: &[f32], share: f64) -> Vec<usize> {
    let wanted = if share >= 1.0 { f64::INFINITY } else { share * total(weights) };
    let (mut taken, mut sum) = (Vec::new(), 0.0);
    for (index, weight) in falling(weights, &[]) {
        sum += weight;
        if sum > wanted && !taken.is_empty() {
            break;
        }
        taken.push(index);
    }
    taken.sort_unstable();
    taken
}

/// The sum of the visible weights.
fn total(weights: &[f32]) -> f64 {
    weights.iter().filter(|weight| is_visible(**weight)).map(|weight| f64::from(*weight)).sum()
}

/// The visible weights that are not `taken` yet, largest first, with their indices.
fn falling(weights: &[f32], taken: &[usize]) -> Vec<(usize, f64)> {
    let mut ranks = visible(weights, taken);
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let indices = ranks.into_iter().map(|rank| index_of(rank) as usize);
    indices.map(|index| (index, f64::from(weights[index]))).collect()
}
