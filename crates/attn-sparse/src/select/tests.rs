//! Selectors against sorting.

use super::rank::{index_of, rank, score_of};
use super::*;

/// Scores with many ties, some hidden.
fn scores(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    (0..n).map(|_| next()).map(|x| if x < 40 { f32::NEG_INFINITY } else { (x / 8) as f32 - 16.0 }).collect()
}

/// By definition: visible scores in falling order, lower indices first, the first `k` of them sorted.
fn sorted(scores: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|i| scores[*i] > f32::NEG_INFINITY).collect();
    order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap().then(a.cmp(b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

#[test]
fn the_largest_are_those_of_a_sort() {
    for n in [0, 1, 2, 17, 300] {
        for k in [0, 1, 2, 16, 40, 299, 300, 1000] {
            let scores = scores(n, (n + k) as u32);
            let want = sorted(&scores, k);
            assert_eq!(top_k(&scores, k), want, "{k} of {n}");
            let mut stream = TopK::new(k);
            // In any order.
            let order = (0..n).filter(|i| i % 2 == 1).chain((0..n).rev().filter(|i| i % 2 == 0));
            order.for_each(|index| stream.offer(scores[index], index));
            assert_eq!(stream.take(), want, "{k} of {n} in a stream");
            assert_eq!((stream.threshold(), stream.take().len()), (f32::NEG_INFINITY, 0));
        }
    }
}

#[test]
fn what_a_stream_may_skip_is_not_among_the_largest() {
    let scores = scores(2000, 5);
    let mut stream = TopK::new(20);
    for (index, score) in scores.iter().enumerate() {
        if *score >= stream.threshold() {
            stream.offer(*score, index);
        }
    }
    assert!(stream.threshold() > f32::NEG_INFINITY);
    assert_eq!(stream.take(), sorted(&scores, 20));
}

#[test]
fn budgets_are_monotonic() {
    let scores = scores(100, 3);
    for k in 0..100 {
        let (fewer, more) = (top_k(&scores, k), top_k(&scores, k + 1));
        assert!(fewer.iter().all(|index| more.contains(index)), "{k}");
    }
}

#[test]
fn forced_members_take_slots_first() {
    let hidden = f32::NEG_INFINITY;
    let scores = [4.0, 1.0, hidden, 3.0, 2.0];
    assert_eq!(top_k_with(&scores, 3, &[1, 1, 2]), [0, 1, 3]);
    assert_eq!(top_k_with(&scores, 1, &[4, 1]), [4]);
    assert_eq!(top_k_with(&scores, 0, &[4]), [0; 0]);
    assert_eq!(top_k_with(&scores, 9, &[3]), [0, 1, 3, 4]);
    assert_eq!(top_p_with(&[0.1, 0.2, 0.4, 0.3], 0.55, &[0, 0]), [0, 2, 3]);
    assert_eq!(top_p_with(&[0.1, 0.2, 0.4, 0.3], 0.05, &[0]), [0]);
}

#[test]
fn shares_are_reached_with_the_fewest() {
    let weights: Vec<f32> = scores(60, 9).iter().map(|score| score.max(0.0)).collect();
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    for share in [0.0, 0.01, 0.3, 0.5, 0.9, 0.999] {
        let taken = top_p(&weights, share);
        let sum = |taken: &[usize]| taken.iter().map(|i| f64::from(weights[*i])).sum::<f64>();
        assert!(sum(&taken) >= share * total && !taken.is_empty());
        let least = taken.iter().copied().min_by(|a, b| weights[*a].total_cmp(&weights[*b])).unwrap();
        let fewer: Vec<usize> = taken.iter().copied().filter(|i| *i != least).collect();
        assert!(fewer.is_empty() || sum(&fewer) < share * total, "{share}");
        assert_eq!(taken, top_k(&weights, taken.len()));
    }
    assert_eq!(top_p(&weights, 1.0), (0..60).collect::<Vec<_>>());
    assert_eq!(top_p(&[0.0, f32::NEG_INFINITY, 2.0], 1.0), [0, 2]);
    assert_eq!(top_p(&[f32::NEG_INFINITY; 3], 0.5), [0; 0]);
}

#[test]
fn shares_are_kept_within_with_the_most() {
    let weights: Vec<f32> = scores(60, 11).iter().map(|score| score.max(0.0)).collect();
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    for share in [0.2, 0.5, 0.9] {
        let (within, reaching) = (top_p_within(&weights, share), top_p(&weights, share));
        let sum = within.iter().map(|i| f64::from(weights[*i])).sum::<f64>();
        assert!(sum <= share * total);
        assert!(within.len() + 1 == reaching.len() || sum == share * total, "{share}");
    }
    assert_eq!(top_p_within(&weights, 1.0).len(), 60);
    assert_eq!(top_p_within(&weights, 0.0).len(), 1);
    assert_eq!(top_p_within(&[f32::NEG_INFINITY; 3], 0.5), [0; 0]);
}

#[test]
fn thresholds_and_softmax() {
    assert_eq!(at_least(&[1.0, f32::NEG_INFINITY, f32::NAN, 2.0, 0.0], 1.0), [0, 2, 3]);
    assert_eq!(at_least(&[1.0, f32::NEG_INFINITY], f32::NEG_INFINITY), [0]);
    let weights = softmax(&[0.0, 3f32.ln(), f32::NEG_INFINITY]);
    assert!((weights[0] - 0.25).abs() < 1e-6 && (weights[1] - 0.75).abs() < 1e-6 && weights[2] == 0.0);
    assert_eq!(softmax(&[f32::NEG_INFINITY; 2]), [0.0; 2]);
    assert_eq!(ranked(&[1.0, f32::NEG_INFINITY, 2.0, 1.0, f32::NAN]), [4, 2, 0, 3]);
}

#[test]
fn ranks_order_scores_then_indices() {
    let scores = [f32::NEG_INFINITY, -1e30, -1.0, -1e-40, 0.0, 1e-40, 1.0, f32::INFINITY];
    for pair in scores.windows(2) {
        assert!(rank(pair[0], 0) < rank(pair[1], 9));
    }
    assert!(rank(0.0, 1) > rank(0.0, 2) && rank(-0.0, 1) > rank(0.0, 2) && rank(0.0, 1) > rank(-0.0, 2));
    assert!(rank(f32::NAN, 9) > rank(f32::INFINITY, 0) && rank(-f32::NAN, 9) > rank(f32::INFINITY, 0));
    for score in scores {
        assert_eq!((score_of(rank(score, 7)), index_of(rank(score, 7))), (score, 7));
    }
    assert!(score_of(rank(f32::NAN, 0)).is_nan());
}

#[test]
fn parts_of_a_stream_merge_into_the_whole() {
    let scores = scores(3000, 5);
    for k in [0, 1, 40, 5000] {
        let mut parts = [TopK::new(k), TopK::new(k), TopK::new(k)];
        scores.iter().enumerate().for_each(|(at, score)| parts[at / 1100].offer(*score, at));
        let [mut first, second, third] = parts;
        first.merge(&third);
        first.merge(&second);
        assert_eq!(first.take(), top_k(&scores, k), "k = {k}");
    }
}
