//! MagicPIG: samples against a count of collisions, weights against the definition, limits, statistics, gradients.

use super::choices::{check, dot, rows};
use super::golden::run;
use super::promises::{parse, tensors};
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band, Pair};
use attn_core::registry::{NamedTensor, find};
use attn_core::score::ScoreMod;
use attn_core::{Attention, AttnShape, Qkv, StreamShape, ViewMut};
use attn_sparse::{MagicPig, Routed};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use std::sync::Arc;

const SMALL: MagicPig = MagicPig {
    n_bits: 3,
    n_tables: 6,
    n_sinks: 2,
    window: 3,
    calibration_len: 9,
    seed: 0,
    projections: None,
    means: None,
};

/// Projections `[width, n_tables, n_bits]` that are none of the variant's own.
fn projections(pig: &MagicPig, width: usize) -> Arc<[f32]> {
    let n = width * pig.n_tables * pig.n_bits;
    (0..n).map(|at| ((at * at + 3 * at + 1) as f32 * 0.731).sin() - 0.02).collect()
}

/// Rows less their centre: the mean of the first rows after the sinks, or what is given.
fn centred(pig: &MagicPig, k: &[Vec<f64>], given: Option<&[f32]>) -> Vec<Vec<f64>> {
    let width = k[0].len();
    let first = &k[pig.n_sinks.min(k.len())..pig.calibration_len.min(k.len())];
    let mean = |c: usize| first.iter().map(|key| key[c]).sum::<f64>() / first.len().max(1) as f64;
    let centre: Vec<f64> =
        (0..width).map(|c| given.map_or_else(|| mean(c), |given| f64::from(given[c]))).collect();
    k.iter().map(|key| key.iter().zip(&centre).map(|(x, m)| x - m).collect()).collect()
}

fn codes(pig: &MagicPig, row: &[f64], projections: &[f32]) -> Vec<Vec<bool>> {
    let n = pig.n_tables * pig.n_bits;
    let bit =
        |at: usize| (0..row.len()).map(|c| row[c] * f64::from(projections[c * n + at])).sum::<f64>() >= 0.0;
    (0..pig.n_tables).map(|t| (0..pig.n_bits).map(|b| bit(t * pig.n_bits + b)).collect()).collect()
}

/// Whether a query that sees `visible` keys takes key `j` without sampling.
fn is_forced(pig: &MagicPig, j: usize, visible: usize) -> bool {
    let learned = if pig.means.is_some() { 0 } else { pig.calibration_len };
    visible <= learned || j < pig.n_sinks || j + pig.window >= visible
}

#[test]
fn sampled_keys_collide_in_two_tables() {
    let few_tables = MagicPig { n_bits: 1, n_tables: 2, ..SMALL };
    let no_sinks = MagicPig { n_bits: 5, n_tables: 40, n_sinks: 0, window: 1, calibration_len: 1, ..SMALL };
    let given_centre = MagicPig { means: Some([0.3f32; 24].into()), ..SMALL };
    for pig in [SMALL, few_tables, no_sinks, given_centre] {
        for width in [12, 8, 3] {
            let (mut pig, known) = (pig.clone(), projections(&pig, width));
            pig.projections = Some(known.clone());
            let n_heads_kv = [2, 2, 1][[12, 8, 3].iter().position(|w| *w == width).unwrap_or(0)];
            pig.means = pig.means.map(|means| means[..n_heads_kv * width].into());
            check_width(&pig, width, &known);
        }
    }
}

/// The inputs of [`check`] whose rows have this width.
fn check_width(pig: &MagicPig, width: usize, known: &[f32]) {
    let problem_of = |s: &AttnShape| s.head_dim == width;
    for (seed, s) in super::choices::shapes().into_iter().enumerate().filter(|(_, s)| problem_of(s)) {
        let problem = Problem::normal(s, seed as u64);
        let x = problem.qkv().unwrap();
        let decision = Routed::new(pig.clone()).decide(&x).unwrap();
        for (batch, head) in (0..s.batch).flat_map(|b| (0..s.n_heads_q).map(move |h| (b, h))) {
            let (q, k) = (rows(x.q(), batch, head), rows(x.k(), batch, s.kv_head(head)));
            let given = pig.means.as_deref().map(|means| &means[s.kv_head(head) * width..][..width]);
            let k: Vec<_> = centred(pig, &k, given).iter().map(|key| codes(pig, key, known)).collect();
            for (i, q) in q.iter().enumerate() {
                let (own, visible) = (codes(pig, q, known), i + 1 + s.n_kv - s.n_q);
                let collides = |j: usize| own.iter().zip(&k[j]).filter(|(a, b)| a == b).count() >= 2;
                let want: Vec<usize> =
                    (0..visible).filter(|j| is_forced(pig, *j, visible) || collides(*j)).collect();
                let got = decision.selected(attn_core::mask::Head { batch, head }, i, s.n_kv);
                assert_eq!(got, want, "row {i} of head {head} in {s:?} of {pig:?}");
            }
        }
    }
}

/// The probability, summed over the numbers of collisions.
fn at_least_two(pig: &MagicPig, cos: f64) -> f64 {
    let equal = (1.0 - cos.clamp(-1.0, 1.0).acos() / std::f64::consts::PI).powi(pig.n_bits as i32);
    let l = pig.n_tables as f64;
    1.0 - (1.0 - equal).powf(l) - l * equal * (1.0 - equal).powf(l - 1.0)
}

/// Minus the logarithm of the probability of each pair, found from the vectors.
struct Weights<'a> {
    pig: &'a MagicPig,
    shape: AttnShape,
    q: Vec<Vec<Vec<f64>>>,
    k: Vec<Vec<Vec<f64>>>,
}

impl<'a> Weights<'a> {
    fn new(pig: &'a MagicPig, x: &Qkv<'_>) -> Self {
        let s = x.shape();
        let q = (0..s.n_heads_q).map(|head| rows(x.q(), 0, head)).collect();
        let k = (0..s.n_heads_kv).map(|head| centred(pig, &rows(x.k(), 0, head), None)).collect();
        Self { pig, shape: s, q, k }
    }
}

impl ScoreMod for Weights<'_> {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.apply_f64(f64::from(score), at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        let s = &self.shape;
        if is_forced(self.pig, at.j, at.i + 1 + s.n_kv - s.n_q) {
            return score;
        }
        let (q, k) = (&self.q[at.head][at.i], &self.k[s.kv_head(at.head)][at.j]);
        score - at_least_two(self.pig, dot(q, k) / (dot(q, q) * dot(k, k)).sqrt()).ln()
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

#[test]
fn sampled_keys_weigh_as_many_as_they_stand_for() {
    let s = AttnShape { n_heads_kv: 2, n_q: 60, head_dim_v: 5, ..AttnShape::square(4, 80, 8) };
    let problem = Problem::normal(s, 4);
    let (x, weights) = (problem.qkv().unwrap(), Problem::normal(s, 5).v);
    let grad_o: Vec<f32> = (0..s.rows() * 5).map(|e| weights[e % weights.len()] + e as f32 * 1e-3).collect();
    let wide: Vec<f64> = grad_o.iter().map(|x| f64::from(*x)).collect();
    let options = parse("n_bits=3 n_tables=6 n_sinks=2 window=3 calibration_len=9");
    let mut given = tensors(&problem);
    given.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &s.out(), grad_o).unwrap());
    let got = run("magicpig", &options, &given);

    let decision = Routed::new(SMALL).decide(&x).unwrap();
    let weights = Weights::new(&SMALL, &x);
    let exact = Exact { mask: decision.mask(), score_mod: &weights, ..Exact::default() };
    let want = exact.all(&x).unwrap();
    let grads = exact.backward(&x, &wide, None, |_, _| ()).unwrap();
    let all = [
        ("o", &want.out),
        ("lse", want.lse.as_ref().unwrap()),
        ("grad.q", &grads.q),
        ("grad.k", &grads.k),
        ("grad.v", &grads.v),
    ];
    for (name, want) in all {
        assert_close(name, got.f32(name).unwrap().unwrap().1, want, Tol::ScaledMax(1e-5));
    }
    assert!(SMALL.probability(0.0) < 0.5, "weights matter here");
}

fn lse(pig: MagicPig, x: Qkv<'_>) -> (Vec<f32>, Vec<f32>) {
    let s = x.shape();
    let (mut out, mut lse) = (vec![0.0; s.rows() * s.head_dim_v], vec![0.0; s.rows()]);
    let attention = Routed::new(pig);
    let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
    attention.as_softmax().unwrap().forward_with_lse(x, view.into(), &mut lse).unwrap();
    (out, lse)
}

/// The normaliser of a row is estimated without bias: over many seeds its mean is the true one. With more tables the outputs come
/// closer.
#[test]
fn estimates_are_unbiased_and_tend_to_dense_attention() {
    let s = AttnShape { n_q: 4, ..AttnShape::square(1, 400, 16) };
    let problem = Problem::normal(s, 7);
    let x = problem.qkv().unwrap();
    let causal = Band::causal(&s, Align::BottomRight);
    let want = Exact { mask: &causal, ..Exact::default() }.all(&x).unwrap();
    let normalisers = want.lse.unwrap();

    let seeds = 300;
    let (mut sums, mut squares) = (vec![0.0; s.n_q], vec![0.0; s.n_q]);
    for seed in 0..seeds {
        let pig = MagicPig { n_bits: 4, n_tables: 12, calibration_len: 30, seed, ..SMALL };
        for (row, (got, want)) in lse(pig, x).1.iter().zip(&normalisers).enumerate() {
            let share = (f64::from(*got) - want).exp();
            sums[row] += share;
            squares[row] += share * share;
        }
    }
    for (sum, squares) in sums.iter().zip(&squares) {
        let n = seeds as f64;
        let (mean, deviation) = (sum / n, (squares / n - (sum / n).powi(2)).max(0.0).sqrt());
        assert!(deviation > 0.01, "a sample varies: {deviation}");
        assert!((mean - 1.0).abs() < 4.0 * deviation / n.sqrt(), "{mean}, deviation {deviation}");
    }

    let error = |n_tables: usize| {
        let pig = MagicPig { n_bits: 4, n_tables, ..SMALL };
        let out = lse(pig, x).0;
        let apart: f64 = out.iter().zip(&want.out).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        (apart / want.out.iter().map(|x| x * x).sum::<f64>()).sqrt()
    };
    let errors = [4, 30, 100, 4000].map(error);
    assert!(errors.is_sorted_by(|a, b| a > b) && errors[0] > 0.1 && errors[3] < 1e-2, "{errors:?}");
}

/// The seed decides, and what a stream holds are its tables.
#[test]
fn one_seed_gives_one_sample() {
    let s = AttnShape::square(2, 300, 16);
    let problem = Problem::normal(s, 1);
    let x = problem.qkv().unwrap();
    let of = |seed| lse(MagicPig { seed, ..SMALL }, x).0;
    assert_eq!(of(3), of(3));
    assert_ne!(of(3), of(4));

    let attention = Routed::new(SMALL);
    let mut state = attention.as_streaming().unwrap().start(StreamShape::of(&x)).unwrap();
    let mut out = vec![0.0; s.rows() * 16];
    state.append(x, ViewMut::contiguous("out", &mut out, s.out()).unwrap().into()).unwrap();
    // Two bytes a table, a length of four, buckets, projections, and growth.
    let summary = state.bytes() - 2 * 2 * 300 * 16 * 4;
    let least = 2 * (300 * (2 * 6 + 4) + 2 * 6 * 8) + 4 * 16 * 18;
    assert!((least..3 * least).contains(&summary), "{summary}, at least {least}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let entries = attn_sparse::registry();
    let build = |options: &str| {
        find(&entries, "magicpig").unwrap().build(&parse(options)).map(drop).unwrap_err().to_string()
    };
    for (options, word) in [
        ("n_bits=13", "at most 12"),
        ("n_tables=1", "from 2"),
        ("window=0", "window"),
        ("calibration_len=4", "4 sinks"),
        ("causal=false", "causal"),
    ] {
        assert!(build(options).contains(word), "{options}: {}", build(options));
    }
    let problem = Problem::normal(AttnShape::square(2, 5, 4), 1);
    let x = problem.qkv().unwrap();
    let decide = |pig: MagicPig| Routed::new(pig).decide(&x).map(drop).unwrap_err().to_string();
    assert!(decide(MagicPig { means: Some([0.0; 4].into()), ..SMALL }).contains("means"));
    assert!(decide(MagicPig { projections: Some([0.0; 4].into()), ..SMALL }).contains("projections"));
    let unscaled = Routed { router: SMALL, softmax_scale: Some(0.0) };
    assert!(unscaled.decide(&x).unwrap_err().to_string().contains("softmax_scale"));
}

/// As named tensors: the projections and the centres.
#[test]
fn given_projections_and_centres_are_used() {
    let s = AttnShape { n_heads_kv: 2, ..AttnShape::square(4, 60, 8) };
    let problem = Problem::normal(s, 2);
    let mut given = tensors(&problem);
    let known = projections(&SMALL, 8);
    let options = parse("n_sinks=2 window=3 calibration_len=9");
    let tensor = NamedTensor::f32("projections", &[8, 6, 3], known.to_vec()).unwrap();
    given.0.insert("projections".into(), tensor);
    let pig = MagicPig { projections: Some(known), ..SMALL };
    assert_eq!(
        run("magicpig", &options, &given).f32("o").unwrap().unwrap().1,
        lse(pig.clone(), problem.qkv().unwrap()).0
    );
    let means: Vec<f32> = (0..16).map(|x| x as f32 * 0.05).collect();
    given.0.insert("means".into(), NamedTensor::f32("means", &[2, 8], means.clone()).unwrap());
    let pig = MagicPig { means: Some(means.into()), ..pig };
    assert_eq!(
        run("magicpig", &options, &given).f32("o").unwrap().unwrap().1,
        lse(pig, problem.qkv().unwrap()).0
    );
    // Every key of a hash without bits collides.
    check(MagicPig { n_bits: 0, ..SMALL }, |_, _, _, p| (0..=p).collect());
}
