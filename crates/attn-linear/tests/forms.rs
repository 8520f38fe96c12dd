//! The engine's forms agree: chunked, recurrent, quadratic in f64, recurrence in f64.

use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnError, AttnShape, DType, Element, OutMut, Qkv, View, ViewMut};
use attn_linear::engine::{Decay, Normaliser, Spec, State, naive};
use attn_linear::feature_map::EluPlusOne;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use half::{bf16, f16};
use proptest::prelude::*;
use std::sync::Arc;

const TOL: Tol = Tol::ScaledMax(4e-6);

fn plain() -> Spec {
    Spec {
        name: "plain",
        causal: true,
        scale: 0.3,
        features: None,
        decay: Decay::None,
        normaliser: Normaliser::None,
        chunk_len: 16,
    }
}

fn elu() -> Spec {
    let normaliser = Normaliser::SumPlus { eps: 1e-10 };
    Spec { name: "elu", features: Some(Arc::new(EluPlusOne)), normaliser, ..plain() }
}

/// Slow, fast, immediate and no decay in the heads.
fn fading(heads: usize) -> Spec {
    let log_decay = [-0.03, -2.0, f32::NEG_INFINITY, 0.0].into_iter().cycle().take(heads).collect();
    Spec { name: "fading", decay: Decay::PerHead(log_decay), ..plain() }
}

fn fading_elu(heads: usize) -> Spec {
    Spec { decay: fading(heads).decay, ..elu() }
}

fn specs(heads: usize) -> [Spec; 4] {
    [plain(), elu(), fading(heads), fading_elu(heads)]
}

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q, n_kv, head_dim: 5, head_dim_v: 19 }
}

fn run(spec: &Spec, x: Qkv<'_>, state: Option<&mut State>) -> Vec<f32> {
    let sizes = x.shape().out();
    let mut out = vec![f32::NAN; sizes.iter().product()];
    spec.forward(x, ViewMut::contiguous("out", &mut out, sizes).unwrap().into(), state).unwrap();
    out
}

/// A state that sums of keys and values could have left; `z` is positive.
fn some_state(spec: &Spec, shape: &AttnShape, seed: u64) -> State {
    let sizes = spec.state_shape(shape);
    let rows = AttnShape::square(sizes.memories(), sizes.key_dim, sizes.value_dim);
    let numbers = Problem::normal(rows, seed);
    let z = || numbers.k[..sizes.memories() * sizes.key_dim].iter().map(|z| 1.0 + z.abs()).collect();
    State::new(sizes, numbers.v, spec.has_normaliser().then(z)).unwrap()
}

fn close_state(what: &str, got: &State, want: &naive::State64) {
    assert_close(&format!("{what}: s"), got.s(), &want.s, TOL);
    if let Some(z) = got.z() {
        assert_close(&format!("{what}: z"), z, &want.z, TOL);
    }
}

#[test]
fn every_form_gives_the_definition_for_every_chunk_and_length() {
    for n in [0, 1, 2, 4, 5, 15, 16, 17, 33, 64, 67] {
        let problem = Problem::normal(shape(n, n), n as u64);
        let x = problem.qkv().unwrap();
        for spec in specs(4) {
            let want = naive::quadratic(&spec, &x, None).unwrap();
            let (again, state64) = naive::recurrence(&spec, &x, None).unwrap();
            assert_close("recurrence", &again.out, &want.out, Tol::ScaledMax(1e-12));
            // Chunks of up to 4 tokens run the recurrent form, the others the chunked one.
            for chunk_len in [1, 4, 7, 16, 64, 1000] {
                let spec = Spec { chunk_len, ..spec.clone() };
                let what = format!("{} n {n} chunk {chunk_len}", spec.name);
                assert_close(&what, &run(&spec, x, None), &want.out, TOL);
                let mut state = State::zero(spec.state_shape(&x.shape()), spec.has_normaliser());
                assert_close(&what, &run(&spec, x, Some(&mut state)), &want.out, TOL);
                close_state(&what, &state, &state64);
            }
        }
    }
}

#[test]
fn every_isa_gives_the_definition_in_every_width() {
    for isa in Isa::available() {
        for (head_dim, head_dim_v) in [(1, 1), (3, 2), (8, 70), (16, 16), (33, 40), (64, 64)] {
            let sizes = AttnShape { batch: 1, n_heads_q: 2, head_dim, head_dim_v, ..shape(37, 37) };
            let problem = Problem::normal(sizes, 3);
            let x = problem.qkv().unwrap();
            for spec in specs(2) {
                for chunk_len in [3, 20] {
                    let spec = Spec { chunk_len, ..spec.clone() };
                    let want = naive::quadratic(&spec, &x, None).unwrap();
                    let got = with_isa(isa, || run(&spec, x, None)).unwrap();
                    let what = format!("{isa} {} {head_dim} x {head_dim_v} chunk {chunk_len}", spec.name);
                    assert_close(&what, &got, &want.out, TOL);
                }
            }
        }
    }
}

#[test]
fn an_initial_state_is_the_memory_before_the_first_key() {
    let problem = Problem::normal(shape(21, 21), 5);
    let x = problem.qkv().unwrap();
    for spec in specs(4) {
        let initial = some_state(&spec, &x.shape(), 9);
        let want = naive::quadratic(&spec, &x, Some(&initial)).unwrap();
        let (again, state64) = naive::recurrence(&spec, &x, Some(&initial)).unwrap();
        assert_close("recurrence", &again.out, &want.out, Tol::ScaledMax(1e-12));
        let mut state = initial.clone();
        assert_close(spec.name, &run(&spec, x, Some(&mut state)), &want.out, TOL);
        close_state(spec.name, &state, &state64);
    }
}

#[test]
fn queries_stand_at_the_last_keys() {
    for (n_q, n_kv) in [(1, 40), (7, 40), (18, 21), (40, 7), (40, 0), (0, 5)] {
        let problem = Problem::normal(shape(n_q, n_kv), 11);
        let x = problem.qkv().unwrap();
        for spec in specs(4) {
            let want = naive::quadratic(&spec, &x, None).unwrap();
            assert_close(&format!("{} {n_q} x {n_kv}", spec.name), &run(&spec, x, None), &want.out, TOL);
        }
    }
    // The whole, from its last queries: keys that no query stands at go into the state all the same.
    let problem = Problem::normal(shape(0, 13), 12);
    let (spec, x) = (elu(), problem.qkv().unwrap());
    let mut state = State::zero(spec.state_shape(&x.shape()), true);
    run(&spec, x, Some(&mut state));
    let rows: f64 = (0..13).map(|j| EluPlusOneAt(&problem).key(0, 0, j)).sum();
    assert_close("z", &state.z().unwrap()[..1], &[rows], TOL);
}

/// The first feature of a key.
struct EluPlusOneAt<'a>(&'a Problem);

impl EluPlusOneAt<'_> {
    fn key(&self, batch: usize, head: usize, j: usize) -> f64 {
        let mut row = vec![0.0; self.0.shape.head_dim];
        self.0.qkv().unwrap().k().read_row(batch, head, j, &mut row);
        if row[0] > 0.0 { row[0] + 1.0 } else { row[0].exp() }
    }
}

#[test]
fn without_causal_every_query_sees_every_key() {
    for (n_q, n_kv) in [(1, 1), (9, 30), (30, 9), (70, 70), (3, 0)] {
        let problem = Problem::normal(shape(n_q, n_kv), 13);
        let x = problem.qkv().unwrap();
        for spec in [plain(), elu()] {
            for chunk_len in [1, 7, 64] {
                let spec = Spec { causal: false, chunk_len, ..spec.clone() };
                let want = naive::quadratic(&spec, &x, None).unwrap();
                assert_close(&format!("{} {n_q} x {n_kv}", spec.name), &run(&spec, x, None), &want.out, TOL);
            }
        }
    }
}

#[test]
fn half_types_are_widened_exactly() {
    fn check<E: Element>() {
        let problem = Problem::normal(shape(35, 35), 17);
        let round = |x: &[f32]| x.iter().map(|x| E::store(*x)).collect::<Vec<E>>();
        let (q, k, v) = (round(&problem.q), round(&problem.k), round(&problem.v));
        let s = problem.shape;
        let view = |name, data, axes| View::contiguous(name, data, axes).unwrap();
        let x = Qkv::new(view("q", &q, s.q()), view("k", &k, s.k()), view("v", &v, s.v())).unwrap();
        for spec in specs(4) {
            let want = naive::quadratic(&spec, &x, None).unwrap();
            let mut out = vec![E::store(f32::NAN); s.out().iter().product()];
            let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
            spec.forward(x, view.into(), None).unwrap();
            let got: Vec<f32> = out.iter().map(|x| x.load()).collect();
            let tol = Tol::ScaledMax(4e-6 + E::DTYPE.roundoff());
            assert_close(&format!("{} {}", E::DTYPE, spec.name), &got, &want.out, tol);
        }
    }
    check::<bf16>();
    check::<f16>();
}

#[test]
fn large_inputs_do_not_overflow() {
    let mut problem = Problem::normal(shape(40, 40), 19).scale_queries(1e4).scale_values(1e4);
    problem.k.iter_mut().for_each(|k| *k *= 1e4);
    let x = problem.qkv().unwrap();
    for spec in specs(4) {
        let want = naive::quadratic(&spec, &x, None).unwrap();
        assert_close(spec.name, &run(&spec, x, None), &want.out, TOL);
    }
}

#[test]
fn a_slow_decay_is_not_rounded_away() {
    // A head that remembers a million tokens: gamma = 1 - 2^-20 is one of 17 f32 below 1.
    let log_decay = (-(-20f64).exp2()).ln_1p() as f32;
    let spec = Spec { decay: Decay::PerHead(vec![log_decay]), ..plain() };
    let n = 20_000;
    let problem =
        Problem { q: vec![1.0; n], k: vec![1.0; n], v: vec![1.0; n], shape: AttnShape::square(1, n, 1) };
    let want = spec.scale as f64 * (n as f64 * f64::from(log_decay)).exp_m1() / f64::from(log_decay).exp_m1();
    for chunk_len in [1, 64] {
        let got = run(&Spec { chunk_len, ..spec.clone() }, problem.qkv().unwrap(), None)[n - 1];
        assert!((f64::from(got) - want).abs() < 2e-5 * want, "chunk {chunk_len}: {got} {want}");
    }
}

#[test]
fn nan_and_infinity_reach_only_what_sees_them() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (spec, chunk_len) in specs(4).into_iter().flat_map(|spec| [(spec.clone(), 3), (spec, 32)]) {
            let spec = Spec { chunk_len, ..spec };
            let clean = Problem::normal(shape(40, 40), 23);
            let before = run(&spec, clean.qkv().unwrap(), None);
            for tensor in ["q", "k", "v"] {
                let mut problem = clean.clone();
                let row = match tensor {
                    "q" => problem.q_row(1, 2, 21),
                    "k" => problem.k_row(1, 1, 21),
                    _ => problem.v_row(1, 1, 21),
                };
                row.fill(bad);
                let after = run(&spec, problem.qkv().unwrap(), None);
                let width = problem.shape.head_dim_v;
                let rows = before.chunks_exact(width).zip(after.chunks_exact(width)).enumerate();
                for (at, (before, after)) in rows {
                    let (batch, head, i) = (at / 160, at / 40 % 4, at % 40);
                    let sees = match tensor {
                        "q" => batch == 1 && head == 2 && i == 21,
                        _ => batch == 1 && head / 2 == 1 && i >= 21,
                    };
                    let what = format!("{bad} in {tensor}, {} chunk {chunk_len}, row {at}", spec.name);
                    if !sees {
                        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(before), bits(after), "{what}");
                    } else if bad.is_nan() && i == 21 {
                        assert!(after.iter().all(|x| x.is_nan()), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn two_threads_give_the_same_bits_as_one() {
    let sizes = AttnShape { head_dim: 32, head_dim_v: 32, ..shape(300, 300) };
    let problem = Problem::normal(sizes, 29);
    for spec in specs(4) {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&spec, problem.qkv().unwrap(), None))
        };
        let (one, two) = (on(1), on(2));
        assert!(one.iter().zip(&two).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", spec.name);
    }
}

#[test]
fn what_cannot_be_computed_is_refused_and_nothing_written() {
    let problem = Problem::normal(shape(6, 4), 31);
    let refuse = |spec: &Spec, state: Option<&mut State>| {
        let mut out = vec![7.0f32; problem.shape.out().iter().product()];
        let view: OutMut<'_> = ViewMut::contiguous("out", &mut out, problem.shape.out()).unwrap().into();
        let error = spec.forward(problem.qkv().unwrap(), view, state).unwrap_err();
        assert!(out.iter().all(|x| *x == 7.0), "{error}");
        error
    };
    let says = |error: AttnError, words: &[&str]| {
        let text = error.to_string();
        words.iter().for_each(|word| assert!(text.contains(word), "`{text}` lacks `{word}`"));
    };
    says(refuse(&Spec { scale: f32::NAN, ..plain() }, None), &["scale", "NaN"]);
    says(refuse(&Spec { chunk_len: 0, ..plain() }, None), &["chunk_len", "0"]);
    says(refuse(&Spec { normaliser: Normaliser::SumPlus { eps: -1.0 }, ..plain() }, None), &["eps", "-1"]);
    says(refuse(&Spec { causal: false, ..fading(4) }, None), &["fading", "causal"]);
    says(refuse(&fading(3), None), &["log_decay", "3", "4"]);
    for g in [0.5, f32::NAN] {
        says(refuse(&Spec { decay: Decay::PerHead(vec![g; 4]), ..plain() }, None), &["log_decay"]);
    }
    let mut state = State::zero(elu().state_shape(&shape(4, 4)), true);
    says(refuse(&elu(), Some(&mut state)), &["elu", "6 queries", "4 keys"]);
    says(refuse(&plain(), Some(&mut state)), &["state", "normaliser"]);
    let mut narrow = State::zero(plain().state_shape(&AttnShape::square(4, 4, 5)), false);
    says(refuse(&plain(), Some(&mut narrow)), &["state", "batch", "1", "2"]);
}

#[test]
fn cost_counts_the_multiply_adds_of_the_chunked_form() {
    for (n_q, n_kv) in [(0, 0), (1, 1), (7, 7), (64, 64), (70, 100), (100, 70)] {
        let sizes = shape(n_q, n_kv);
        let (key_dim, value_dim) = (sizes.head_dim as u64, sizes.head_dim_v as u64);
        for chunk_len in [1, 7, 64, usize::MAX] {
            let seen = n_q.min(n_kv);
            let inside: usize = (0..seen).map(|i| 1 + i % chunk_len).sum();
            let products = inside as u64 * (key_dim + value_dim) + (n_q + n_kv) as u64 * key_dim * value_dim;
            let cost = Spec { chunk_len, ..plain() }.cost(&sizes, DType::F32);
            assert_eq!(cost.flops, 2 * 8 * products, "{n_q} x {n_kv} chunk {chunk_len}");
        }
    }
    // Options that `forward` refuses have no meaningful cost, but asking for it is harmless.
    assert_eq!(
        Spec { chunk_len: 0, ..plain() }.cost(&shape(5, 5), DType::F32).bytes_moved,
        shape(5, 5).io_bytes(DType::F32)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn splitting_a_sequence_changes_nothing(
        pieces in prop::collection::vec(0usize..50, 1..5),
        chunk_len in 1usize..40,
        which in 0usize..4,
        seed in any::<u64>(),
    ) {
        let n: usize = pieces.iter().sum();
        let problem = Problem::normal(shape(n, n), seed);
        let x = problem.qkv().unwrap();
        let spec = Spec { chunk_len, ..specs(4)[which].clone() };
        let want = naive::quadratic(&spec, &x, None).unwrap();
        let (_, end) = naive::recurrence(&spec, &x, None).unwrap();

        let mut state = State::zero(spec.state_shape(&x.shape()), spec.has_normaliser());
        let sizes = x.shape().out();
        let mut whole = vec![f32::NAN; sizes.iter().product()];
        let mut first = 0;
        for piece in pieces {
            let rows = first..first + piece;
            let part = Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows)).unwrap();
            let out = run(&spec, part, Some(&mut state));
            for at in 0..sizes[0] * sizes[1] {
                let to = (at * n + first) * sizes[3];
                whole[to..to + piece * sizes[3]].copy_from_slice(&out[at * piece * sizes[3]..][..piece * sizes[3]]);
            }
            first += piece;
        }
        assert_close(spec.name, &whole, &want.out, TOL);
        close_state(spec.name, &state, &end);
    }
}
