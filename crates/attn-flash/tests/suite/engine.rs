//! The softmax engine against the f64 oracle: every mask, score function, block size and instruction set.

use attn_core::exact::{Exact, Reference};
use attn_core::mask::{And, Band, DenseMask, KeysBelow, Mask, Or, Pair, Predicate, SeeAll};
use attn_core::merge::merge_into;
use attn_core::score::{Alibi, Bias, ScoreFn, ScoreMod, SoftCap, Then, Unchanged};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, Qkv, View, ViewMut};
use attn_flash::TileSizes;
use attn_flash::engine::{Spec, attend_any};

/// Deterministic numbers of about unit variance.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut uniform = move || {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect()
}

struct Problem {
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    fn new(shape: AttnShape) -> Self {
        let len = |axes: [usize; 4]| axes.iter().product();
        Self {
            q: numbers(len(shape.q()), 1),
            k: numbers(len(shape.k()), 2),
            v: numbers(len(shape.v()), 3),
            shape,
        }
    }

    fn qkv(&self) -> Qkv<'_> {
        let view = |name, data, shape| View::contiguous(name, data, shape).unwrap();
        let s = &self.shape;
        Qkv::new(view("q", &self.q, s.q()), view("k", &self.k, s.k()), view("v", &self.v, s.v())).unwrap()
    }

    fn run(&self, spec: &DynSpec<'_>) -> (Vec<f32>, Vec<f32>) {
        // NaN, so that a row nobody writes is seen.
        let mut out = vec![f32::NAN; self.shape.out().iter().product()];
        let mut lse = vec![f32::NAN; self.shape.rows()];
        let view = ViewMut::contiguous("out", &mut out, self.shape.out()).unwrap();
        attend_any(self.qkv().into(), view.into(), Some(&mut lse), spec).unwrap();
        (out, lse)
    }

    fn exact(&self, mask: &dyn Mask, score_mod: &dyn ScoreMod) -> Reference {
        Exact { softmax_scale: Some(f64::from(SCALE)), mask, score_mod, ..Exact::default() }
            .all(&self.qkv())
            .unwrap()
    }
}

const SCALE: f32 = 0.25;

/// Trait objects: one kernel for all masks and score functions, else this file compiles for minutes.
type DynSpec<'a> = Spec<'a, dyn Mask + 'a, dyn ScoreMod + 'a>;

fn spec<'a>(mask: &'a dyn Mask, score_mod: &'a dyn ScoreMod) -> DynSpec<'a> {
    Spec::new(SCALE, mask, score_mod)
}

/// NaN must meet NaN and infinities must be equal: `<=` is false for NaN.
#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let ok = got == want
            || (got.is_nan() && want.is_nan())
            || (got - want).abs() <= bound * want.abs().max(1.0);
        assert!(ok, "{what}[{at}]: got {got:e}, want {want:e}");
    }
}

fn check(what: &str, problem: &Problem, mask: &dyn Mask, score_mod: &dyn ScoreMod) {
    check_within(4e-6, what, problem, mask, score_mod);
}

fn check_within(bound: f64, what: &str, problem: &Problem, mask: &dyn Mask, score_mod: &dyn ScoreMod) {
    let want = problem.exact(mask, score_mod);
    let tiles = [None, Some(TileSizes::new(32, 1).unwrap()), Some(TileSizes::new(96, 50).unwrap())];
    for isa in Isa::available() {
        for tiles in tiles {
            let spec = Spec { tiles, ..spec(mask, score_mod) };
            let (out, lse) = with_isa(isa, || problem.run(&spec)).unwrap();
            let what = format!("{what} {:?} {isa} {tiles:?}", problem.shape);
            assert_close(&format!("{what}: out"), &out, &want.out, bound);
            assert_close(&format!("{what}: lse"), &lse, want.lse.as_ref().unwrap(), 2e-6);
        }
    }
}

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 1, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

#[test]
fn every_mask_at_every_tile_edge_equals_the_oracle() {
    for (n_q, n_kv) in [(0, 3), (3, 0), (1, 1), (31, 33), (32, 32), (33, 257), (65, 128), (130, 129)] {
        let problem = Problem::new(shape(n_q, n_kv));
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        check("all", &problem, &SeeAll, &Unchanged);
        check("causal", &problem, &causal, &Unchanged);
        check("top-left", &problem, &Band { offset: 0, ..causal }, &Unchanged);
        check("window", &problem, &Band { left: Some(5), right: Some(3), ..causal }, &Unchanged);
        let sinks = And(causal, Or(KeysBelow(3), Band { left: Some(7), ..causal }));
        check("sinks", &problem, &sinks, &Unchanged);
        check("closure", &problem, &Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2), &Unchanged);
        check("nobody", &problem, &Predicate(|_| false), &Unchanged);
        let seen: Vec<bool> = (0..n_q * n_kv).map(|x| x % 3 == 0 && (x / n_kv) % 4 != 1).collect();
        let dense = DenseMask::new(&seen, &[n_q, n_kv], &problem.shape).unwrap();
        check("dense", &problem, &dense, &Unchanged);
    }
}

#[test]
fn score_mods_equal_the_oracle() {
    let problem = Problem::new(shape(40, 70));
    let s = &problem.shape;
    let mut bias = numbers(s.n_heads_q * s.n_q * s.n_kv, 9);
    bias.iter_mut().step_by(11).for_each(|b| *b = f32::NEG_INFINITY);
    bias[5 * s.n_kv..6 * s.n_kv].fill(f32::NEG_INFINITY); // a row hidden by its bias alone
    let bias = Bias::new(&bias, &[s.n_heads_q, s.n_q, s.n_kv], s).unwrap();
    let causal = Band { offset: 30, left: None, right: Some(0) };
    check("softcap", &problem, &SeeAll, &SoftCap::new(2.0).unwrap());
    check("alibi", &problem, &causal, &Alibi::new(Alibi::default_slopes(2), s, 30).unwrap());
    check("bias", &problem, &causal, &bias);
    check("cap then bias", &problem, &SeeAll, &Then(SoftCap::new(2.0).unwrap(), bias));
    check("closure", &problem, &causal, &ScoreFn(|score, p: Pair| score * (1.0 + 0.1 * p.head as f32)));
}

#[test]
fn a_key_that_stands_for_several_counts_several_times() {
    // Key 1 repeated four times equals one key with a bias of ln 4 and the mean of the four values.
    let (n_q, width) = (5, 4);
    let few = Problem::new(AttnShape { n_q, n_kv: 3, ..AttnShape::square(1, 1, width) });
    let mut many = Problem::new(AttnShape { n_q, n_kv: 6, ..AttnShape::square(1, 1, width) });
    many.q.clone_from(&few.q);
    for (j, from) in [0, 1, 1, 1, 1, 2].into_iter().enumerate() {
        many.k[j * width..][..width].copy_from_slice(&few.k[from * width..][..width]);
        let spread = [0.0, -3.0, 1.0, 4.0, -2.0, 0.0][j];
        for c in 0..width {
            many.v[j * width + c] = few.v[from * width + c] + spread;
        }
    }
    let key_bias = [0.0, 4f32.ln(), 0.0];
    let (out, lse) = few.run(&Spec { key_bias: Some(&key_bias), ..spec(&SeeAll, &Unchanged) });
    let want = many.exact(&SeeAll, &Unchanged);
    assert_close("out", &out, &want.out, 4e-6);
    assert_close("lse", &lse, &want.lse.unwrap(), 2e-6);
}

#[test]
fn what_a_row_does_not_see_never_reaches_it() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 31, 40, 69] {
            let mut problem = Problem::new(shape(70, 70));
            let (d, d_v) = (problem.shape.head_dim, problem.shape.head_dim_v);
            problem.k[place * d + 2] = poison;
            problem.v[place * d_v + 1] = poison;
            let unseen = Predicate(move |p: Pair| p.j != place);
            check("unseen", &problem, &unseen, &Unchanged);
            problem.k[place * d + 2] = 0.5;
            let causal = Band { offset: 0, left: Some(20), right: Some(0) };
            check("seen by some", &problem, &causal, &Unchanged);
        }
    }
}

#[test]
fn a_nan_query_spoils_its_own_row_alone() {
    let mut problem = Problem::new(shape(40, 40));
    problem.q[7 * problem.shape.head_dim] = f32::NAN;
    check("nan query", &problem, &SeeAll, &Unchanged);
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    for factor in [1e2f32, 1e4, -1e4] {
        let mut problem = Problem::new(shape(37, 150));
        problem.q.iter_mut().for_each(|x| *x *= factor);
        let (out, lse) = problem.run(&spec(&SeeAll, &Unchanged));
        let want = problem.exact(&SeeAll, &Unchanged);
        assert!(out.iter().chain(&lse).all(|x| x.is_finite()), "{factor}");
        // A score of size s carries an error of s * 2^-23, which its exponential turns into a relative one.
        let bound = f64::from(factor.abs()) * 3e-6;
        let worst =
            lse.iter().zip(want.lse.unwrap()).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
        assert!(worst <= bound, "{factor}: log-sum-exp off by {worst:e}");
        assert_close("out", &out, &want.out, bound);
    }
}

#[test]
fn halves_of_the_keys_merge_to_the_whole() {
    let problem = Problem::new(shape(33, 100));
    let causal = Band { offset: 10, left: None, right: Some(0) };
    let whole = problem.exact(&causal, &Unchanged);
    for cut in [0, 1, 50, 100] {
        let (mut out, mut lse) = problem.run(&spec(&And(causal, KeysBelow(cut)), &Unchanged));
        let rest = And(causal, Predicate(move |p: Pair| p.j >= cut));
        let (part_out, part_lse) = problem.run(&spec(&rest, &Unchanged));
        merge_into(&mut out, &mut lse, &part_out, &part_lse).unwrap();
        assert_close("out", &out, &whole.out, 4e-6);
        assert_close("lse", &lse, whole.lse.as_ref().unwrap(), 2e-6);
    }
}

#[test]
fn bad_arguments_are_errors_and_nothing_is_written() {
    let problem = Problem::new(shape(4, 6));
    let mut out = vec![7.0f32; problem.shape.out().iter().product()];
    let mut run = |lse: Option<&mut [f32]>, key_bias: Option<&[f32]>, softmax_scale: f32| {
        let view = ViewMut::contiguous("out", &mut out, problem.shape.out()).unwrap();
        let spec = Spec { key_bias, softmax_scale, ..spec(&SeeAll, &Unchanged) };
        attend_any(problem.qkv().into(), view.into(), lse, &spec).unwrap_err().to_string()
    };
    let short_lse = run(Some(&mut [0.0; 7]), None, 1.0);
    assert!(short_lse.contains("lse: rows is 7, expected 8"), "{short_lse}");
    let short_bias = run(None, Some(&[0.0; 5]), 1.0);
    assert!(short_bias.contains("key_bias: elements is 5, expected n_kv = 6"), "{short_bias}");
    let no_scale = run(None, None, f32::NAN);
    assert!(no_scale.contains("softmax_scale is NaN"), "{no_scale}");
    assert!(out.iter().all(|x| *x == 7.0));
    assert!(
        TileSizes::new(33, 64).is_err() && TileSizes::new(32, 0).is_err() && TileSizes::new(0, 1).is_err()
    );
}

#[test]
fn scores_as_large_as_numbers_get_keep_their_differences() {
    // What padding by the most negative number does: all keys are equally hopeless, hence equally weighed.
    for (n_q, n_kv) in [(1, 70), (40, 70)] {
        let problem = Problem::new(shape(n_q, n_kv));
        for fill in [f32::MIN, -1e30, 1e30, 3e38] {
            let bias = vec![fill; n_kv];
            let bias = Bias::new(&bias, &[n_kv], &problem.shape).unwrap();
            check(&format!("bias {fill:e}"), &problem, &SeeAll, &bias);
            let half = ScoreFn(move |s, p: Pair| if p.j.is_multiple_of(2) { s + fill } else { fill });
            check(&format!("half {fill:e}"), &problem, &SeeAll, &half);
        }
    }
}

#[test]
fn scores_may_rise_by_any_amount_from_tile_to_tile() {
    // A reference that former tiles set is then too low: a little, so that weights are merely large; by as much as they can
    // hold; or by so much that they are infinite. Each query rises at another key.
    for n_q in [9, 32, 45] {
        let mut problem = Problem::new(shape(n_q, 400));
        for rise in [3.0f32, 8.0, 40.0, 87.0, 88.5, 120.0, 1e3, 1e6] {
            let steps = ScoreFn(move |s: f32, p: Pair| {
                let at = 130 + 7 * (p.i % 5) + p.head;
                s + rise * (p.j / at) as f32
            });
            // A score of 3 rises rounds to other neighbours than that of the definition: two units in the last place.
            let bound = 4e-6 + f64::from(3.0 * rise) * 2f64.powi(-22);
            check_within(bound, &format!("rise by {rise}"), &problem, &SeeAll, &steps);
        }
        // A neighbour that is NaN hides nothing.
        problem.q[3 * problem.shape.head_dim] = f32::NAN;
        let steps = ScoreFn(|s: f32, p: Pair| if p.j > 300 { s + 200.0 } else { s });
        check_within(1e-4, "rise beside NaN", &problem, &SeeAll, &steps);
    }
}
