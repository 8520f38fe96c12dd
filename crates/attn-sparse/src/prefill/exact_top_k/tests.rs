//! Exact top-k against sorting all scores in f64.

use super::approximate::{GROUP, Queries, Scored};
use super::*;
use attn_core::simd::with_isa;
use attn_core::tile::ByteDot;
use attn_core::{TensorView, View};

/// Numbers that repeat, so that scores tie.
fn few_values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 28) as f32 / 4.0 - 2.0
    };
    (0..len).map(|_| next()).collect()
}

/// Numbers with many digits.
fn many_values(len: usize, seed: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + 1.0) * seed).sin() * 3.0).collect()
}

struct Case {
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
}

impl Case {
    fn new(shape: AttnShape, numbers: impl Fn(usize, usize) -> Vec<f32>) -> Self {
        let len = |shape: [usize; 4]| shape.iter().product();
        Self { q: numbers(len(shape.q()), 0), k: numbers(len(shape.k()), 1), shape }
    }

    /// By definition; NaN scores are the largest.
    fn sorted(&self, top: ExactTopK, sign: f64) -> Vec<Vec<u32>> {
        let s = &self.shape;
        let mut lists = Vec::new();
        for row in 0..s.rows() {
            let (list, i) = (row / s.n_q, row % s.n_q);
            let kv_list = list / s.n_heads_q * s.n_heads_kv + s.kv_head(list % s.n_heads_q);
            let end = if top.causal { (i + 1 + s.n_kv).saturating_sub(s.n_q) } else { s.n_kv };
            let d = s.head_dim;
            let score = |j: usize| -> f64 {
                let k = &self.k[(kv_list * s.n_kv + j) * d..][..d];
                let q = &self.q[row * d..][..d];
                q.iter().zip(k).map(|(q, k)| sign * f64::from(*q) * f64::from(*k)).sum()
            };
            let mut order: Vec<(f64, u32)> = (0..end).map(|j| (score(j), j as u32)).collect();
            order.retain(|(score, _)| *score != f64::NEG_INFINITY);
            order.sort_by(|a, b| {
                let larger = b.0.partial_cmp(&a.0).unwrap_or_else(|| b.0.is_nan().cmp(&a.0.is_nan()));
                larger.then(a.1.cmp(&b.1))
            });
            order.truncate(top.top_k);
            let mut list: Vec<u32> = order.into_iter().map(|(_, j)| j).collect();
            list.sort_unstable();
            lists.push(list);
        }
        lists
    }

    #[track_caller]
    fn check(&self, top: ExactTopK) {
        let view = |data, shape| -> TensorView<'_> { View::contiguous("x", data, shape).unwrap().into() };
        let (q, k) = (view(&self.q, self.shape.q()), view(&self.k, self.shape.k()));
        let x = Qkv::new(q, k, k).unwrap();
        for sign in [1.0, -1.0, 0.0] {
            let want = self.sorted(top, sign);
            for isa in Isa::available() {
                let mut stages = vec![Stage::F32];
                stages.extend(ByteDot::detect().map(Stage::Bytes));
                for stage in stages {
                    let got = with_isa(isa, || top.lists(&x, stage, sign as f32)).unwrap();
                    assert!(got == want, "{isa} {stage:?} {top:?} {sign} {:?}", self.shape);
                }
            }
        }
    }
}

fn shapes() -> impl Iterator<Item = AttnShape> {
    let grouped = AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..AttnShape::square(1, 70, 6) };
    let square = [(1, 300, 16), (1, 33, 5), (2, 200, 1)];
    let squares = square.map(|(heads, n, d)| AttnShape::square(heads, n, d));
    let cross = [(40, 500), (3, 129), (50, 20)];
    let crosses = cross.map(|(n_q, n_kv)| AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 8) });
    squares.into_iter().chain(crosses).chain([grouped])
}

fn tops() -> impl Iterator<Item = ExactTopK> {
    let of = |top_k| [true, false].map(|causal| ExactTopK { causal, top_k, softmax_scale: None });
    [1, 2, 7, 19].into_iter().flat_map(of)
}

#[test]
fn the_choice_is_that_of_a_sort() {
    for shape in shapes() {
        let case = Case::new(shape, |len, which| many_values(len, [0.37, 0.0173][which]));
        tops().for_each(|top| case.check(top));
    }
}

#[test]
fn of_equal_scores_the_lower_keys_are_chosen() {
    for shape in shapes() {
        let case = Case::new(shape, |len, which| few_values(len, which as u32 + 3));
        tops().for_each(|top| case.check(top));
    }
}

#[test]
fn a_common_part_of_all_keys_does_not_hide_their_differences() {
    let mut case = Case::new(AttnShape::square(1, 200, 8), |len, which| many_values(len, [0.7, 0.3][which]));
    case.k.iter_mut().for_each(|k| *k = *k * 1e-3 + 50.0);
    tops().for_each(|top| case.check(top));
}

/// With so many keys, thresholds begin as a guess.
#[test]
fn a_guessed_threshold_changes_nothing() {
    let shape = AttnShape { n_q: 70, n_kv: 1300, ..AttnShape::square(1, 1, 5) };
    let many = Case::new(shape, |len, which| many_values(len, [0.37, 0.0173][which]));
    let few = Case::new(shape, |len, which| few_values(len, which as u32 + 3));
    // The sample is no sample: it holds the keys of the largest scores, or of the smallest.
    let odd = [30.0, 0.03].map(|factor| {
        let mut case = Case::new(shape, |len, which| many_values(len, [0.11, 0.013][which]));
        case.k.chunks_mut(5 * 8).for_each(|keys| keys[..5].iter_mut().for_each(|k| *k *= factor));
        case
    });
    for case in odd.iter().chain([&many, &few]) {
        for top_k in [1, 9, 19] {
            let top = ExactTopK { causal: true, top_k, softmax_scale: None };
            let view: TensorView<'_> = View::contiguous("k", &case.k, shape.k()).unwrap().into();
            let keys = Keys::new(Isa::current(), HeadRows::of(&view, 0, 0), Stage::F32);
            assert!(Guess::new(Isa::current(), &keys, top_k).is_some());
            case.check(top);
        }
    }
}

/// Queries that score all keys nearly alike, beside others: bounds tell nothing apart.
#[test]
fn a_crowd_of_equal_scores_is_scored_exactly() {
    let shape = AttnShape { n_q: 140, n_kv: 1500, ..AttnShape::square(1, 1, 6) };
    let mut case = Case::new(shape, |len, which| many_values(len, [0.37, 0.0173][which]));
    for (at, q) in case.q.chunks_mut(6).enumerate().filter(|(at, _)| at % 8 < 2) {
        q.fill(0.0);
        q[5] = (at % 8) as f32;
    }
    for (at, k) in case.k.chunks_mut(6).enumerate() {
        // The last keys are the best, by less than bounds tell: a key too many would be chosen.
        k[5] = 1.0 + at as f32 * 1e-6;
    }
    for top_k in [1, 5, 17] {
        case.check(ExactTopK { causal: true, top_k, softmax_scale: None });
    }
}

#[test]
fn keys_and_queries_without_bound_are_scored_exactly() {
    for wild in [f32::NAN, f32::INFINITY, -1e30, 3e38] {
        let mut case = Case::new(AttnShape::square(1, 150, 4), |len, which| few_values(len, which as u32));
        for j in [0, 60, 61, 149] {
            case.k[j * 4 + 1] = wild;
        }
        case.q[7 * 4] = wild;
        // Positive, so that infinite scores of both signs do not cancel to NaN in some orders only.
        case.q.iter_mut().for_each(|q| *q = if q.is_nan() { *q } else { q.abs() + 0.25 });
        for top in [1, 3, 20] {
            case.check(ExactTopK { causal: true, top_k: top, softmax_scale: None });
        }
    }
}

#[test]
fn every_score_is_between_its_bounds() {
    let case = Case::new(AttnShape::square(1, 64, 24), |len, which| many_values(len, [0.37, 0.11][which]));
    let view: TensorView<'_> = View::contiguous("k", &case.k, case.shape.k()).unwrap().into();
    for isa in Isa::available() {
        for stage in [Some(Stage::F32), ByteDot::detect().map(Stage::Bytes)].into_iter().flatten() {
            let keys = Keys::new(isa, HeadRows::of(&view, 0, 0), stage);
            let mut queries = Queries::default();
            queries.set(&case.q[..32 * 24], 24, &keys);
            for lane in 0..32 {
                let bounds = isa.run(Bounds { keys: &keys, queries: &queries, n_keys: 64, lane });
                let true_score = |j: usize| -> f64 {
                    let (q, k) = (&case.q[lane * 24..][..24], &case.k[j * 24..][..24]);
                    q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                };
                let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let most = norm(&case.q[lane * 24..][..24]) * case.k.chunks(24).map(norm).fold(0.0, f64::max);
                for j in 1..64 {
                    // The common shift is not known.
                    let want = true_score(j) - true_score(0);
                    let [lower, upper] = bounds[j].map(f64::from);
                    let [lower_0, upper_0] = bounds[0].map(f64::from);
                    let within = lower - upper_0 <= want && want <= upper - lower_0;
                    assert!(within, "{isa} {stage:?}: {want} in {:?} - {:?}", bounds[j], bounds[0]);
                    let width = upper - lower;
                    assert!(
                        width < 0.05 * most,
                        "{isa} {stage:?}: bounds {width} apart say nothing of {most}"
                    );
                }
            }
        }
    }
}

struct Bounds<'a> {
    keys: &'a Keys<'a>,
    queries: &'a Queries,
    n_keys: usize,
    lane: usize,
}

impl attn_core::simd::SimdOp for Bounds<'_> {
    type Output = Vec<[f32; 2]>;

    #[inline(always)]
    fn eval<S: attn_core::simd::Simd>(self, simd: S) -> Self::Output {
        let mut scored = Scored::default();
        let mut bounds = Vec::new();
        for first in (0..self.n_keys).step_by(GROUP) {
            let range = first..(first + GROUP).min(self.n_keys);
            scored.set(simd, self.keys, range.clone(), self.queries, &[f32::MIN; 32]);
            assert!(scored.reached[..range.len()].iter().all(|lanes| *lanes == u32::MAX));
            bounds.extend((0..range.len()).map(|key| scored.bounds(self.keys, key, self.lane)));
        }
        bounds
    }
}

/// What reaches a threshold is reported, in every lane: the lane's own threshold is between the scores.
#[test]
fn what_reaches_the_threshold_is_reported() {
    let case = Case::new(AttnShape::square(1, 60, 19), |len, which| many_values(len, [0.23, 0.41][which]));
    let view: TensorView<'_> = View::contiguous("k", &case.k, case.shape.k()).unwrap().into();
    for isa in Isa::available() {
        for stage in [Some(Stage::F32), ByteDot::detect().map(Stage::Bytes)].into_iter().flatten() {
            let keys = Keys::new(isa, HeadRows::of(&view, 0, 0), stage);
            let mut queries = Queries::default();
            queries.set(&case.q[..32 * 19], 19, &keys);
            let mut missed = 0;
            for shift in [-30.0f32, -3.0, 0.0, 0.5, 8.0] {
                let thresholds = std::array::from_fn(|lane| shift + lane as f32 * 0.3);
                missed += isa.run(Reports { keys: &keys, queries: &queries, n_keys: 60, thresholds });
            }
            assert!(missed > 1000, "{isa} {stage:?}: only {missed} of 9600 are left out");
        }
    }
}

struct Reports<'a> {
    keys: &'a Keys<'a>,
    queries: &'a Queries,
    n_keys: usize,
    thresholds: [f32; 32],
}

impl attn_core::simd::SimdOp for Reports<'_> {
    /// Scores that are not reported; all of them are below.
    type Output = usize;

    #[inline(always)]
    fn eval<S: attn_core::simd::Simd>(self, simd: S) -> usize {
        let (mut scored, mut missed) = (Scored::default(), 0);
        for first in (0..self.n_keys).step_by(GROUP) {
            let range = first..(first + GROUP).min(self.n_keys);
            scored.set(simd, self.keys, range.clone(), self.queries, &self.thresholds);
            for (key, reached) in scored.reached[..range.len()].iter().enumerate() {
                for (lane, threshold) in self.thresholds.iter().enumerate() {
                    if reached >> lane & 1 == 0 {
                        let [_, upper] = scored.bounds(self.keys, key, lane);
                        assert!(upper < *threshold, "{upper} reaches {threshold}");
                        missed += 1;
                    }
                }
            }
        }
        missed
    }
}
