//! `linear`, `linear-elu` and `retnet`: more or fewer keys than queries, no order, given states, other storage.

use crate::differences;
use attn_core::registry::{Options, find};
use attn_core::{Attention, AttnShape, DType, Element, Qkv, StreamShape, Streaming, View, ViewMut};
use attn_linear::matrix_state::{Inputs, StateVariant};
use attn_linear::{Linear, LinearAttention, LinearElu, RetNet, registry};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use half::{bf16, f16};

const TOL: Tol = Tol::ScaledMax(4e-6);

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q, n_kv, head_dim: 5, head_dim_v: 19 }
}

fn elu(causal: bool, chunk_len: usize) -> LinearAttention<LinearElu> {
    LinearAttention::new(LinearElu { causal, chunk_len, ..LinearElu::default() })
}

fn linear(causal: bool, chunk_len: usize) -> LinearAttention<Linear> {
    LinearAttention::new(Linear { causal, chunk_len, scale: Some(0.3) })
}

/// Slow, fast, immediate and no decay in the heads.
fn retnet(chunk_len: usize) -> LinearAttention<RetNet> {
    let log_decay = Some(vec![-0.03, -2.0, f32::NEG_INFINITY, 0.0]);
    LinearAttention::new(RetNet { log_decay, chunk_len, ..RetNet::default() })
}

fn run(attention: &dyn Attention, x: Qkv<'_>) -> Vec<f32> {
    let sizes = x.shape().out();
    let mut out = vec![f32::NAN; sizes.iter().product()];
    attention.forward(x, ViewMut::contiguous("out", &mut out, sizes).unwrap().into()).unwrap();
    out
}

/// The quadratic form, written out: `feature` of q and k, `gamma` of a head, `eps` where there is a norm.
fn quadratic(
    problem: &Problem,
    causal: bool,
    feature: fn(f64) -> f64,
    gamma: impl Fn(usize) -> f64,
    scale: f64,
    eps: Option<f64>,
) -> Vec<f64> {
    let (s, x) = (problem.shape, problem.qkv().unwrap());
    let mut out = Vec::new();
    for at in 0..s.batch * s.n_heads_q * s.n_q {
        let (batch, head, i) = (at / (s.n_heads_q * s.n_q), at / s.n_q % s.n_heads_q, at % s.n_q);
        let (mut q, mut k, mut v) = (vec![0.0; s.head_dim], vec![0.0; s.head_dim], vec![0.0; s.head_dim_v]);
        x.q().read_row(batch, head, i, &mut q);
        let (mut sum, mut norm) = (vec![0.0; s.head_dim_v], 0.0);
        let seen = if causal { (i + s.n_kv + 1).saturating_sub(s.n_q) } else { s.n_kv };
        for j in 0..seen {
            x.k().read_row(batch, s.kv_head(head), j, &mut k);
            x.v().read_row(batch, s.kv_head(head), j, &mut v);
            let weight: f64 = q.iter().zip(&k).map(|(q, k)| feature(*q) * feature(*k)).sum();
            let weight = weight * scale * if causal { gamma(head).powi((seen - 1 - j) as i32) } else { 1.0 };
            sum.iter_mut().zip(&v).for_each(|(sum, v)| *sum += weight * v);
            norm += weight;
        }
        let divisor = eps.map_or(1.0, |eps| norm + eps);
        out.extend(sum.iter().map(|x| if divisor == 0.0 { 0.0 } else { x / divisor }));
    }
    out
}

fn elu_plus_one(x: f64) -> f64 {
    if x > 0.0 { x + 1.0 } else { x.exp() }
}

#[test]
fn outputs_are_those_of_the_quadratic_form_wherever_queries_stand() {
    let sizes =
        [(1, 1), (5, 5), (17, 17), (64, 64), (1, 40), (7, 40), (18, 21), (40, 7), (40, 0), (0, 5), (70, 70)];
    for (n_q, n_kv) in sizes {
        let problem = Problem::normal(shape(n_q, n_kv), (n_q + n_kv) as u64);
        let x = problem.qkv().unwrap();
        for chunk_len in [1, 7, 16, 64] {
            let what = format!("{n_q} x {n_kv} chunk {chunk_len}");
            let check = |attention: &dyn Attention, want: Vec<f64>| {
                let what = format!("{} {what}", attention.name());
                assert_close(&what, &run(attention, x), &want, TOL);
                let definition = attention.definition(&x).unwrap().out;
                let narrow: Vec<f32> = definition.iter().map(|x| *x as f32).collect();
                assert_close(&format!("definition, {what}"), &narrow, &want, TOL);
            };
            let decay = |head: usize| [(-0.03f32).exp(), (-2.0f32).exp(), 0.0, 1.0].map(f64::from)[head];
            let scale = f64::from((5.0f32).sqrt().recip());
            check(&retnet(chunk_len), quadratic(&problem, true, |x| x, decay, scale, None));
            for causal in [true, false] {
                let want = quadratic(&problem, causal, |x| x, |_| 1.0, f64::from(0.3f32), None);
                check(&linear(causal, chunk_len), want);
                let want = quadratic(&problem, causal, elu_plus_one, |_| 1.0, 1.0, Some(1e-10));
                check(&elu(causal, chunk_len), want);
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
        for attention in [&retnet(16) as &dyn Attention, &elu(true, 16), &elu(false, 16), &linear(true, 16)] {
            let want = attention.definition(&x).unwrap().out;
            let mut out = vec![E::store(f32::NAN); s.out().iter().product()];
            attention.forward(x, ViewMut::contiguous("out", &mut out, s.out()).unwrap().into()).unwrap();
            let got: Vec<f32> = out.iter().map(|x| x.load()).collect();
            let tol = Tol::ScaledMax(4e-6 + E::DTYPE.roundoff());
            assert_close(&format!("{} {}", E::DTYPE, attention.name()), &got, &want, tol);
        }
    }
    check::<bf16>();
    check::<f16>();
}

#[test]
fn a_state_carries_keys_that_came_before() {
    fn check<V: StateVariant>(attention: &LinearAttention<V>) {
        // The last 9 queries of 30, in one call and through the state of the first 21 keys.
        let problem = Problem::normal(shape(9, 30), 5);
        let x: Inputs<'_> = problem.qkv().unwrap().into();
        let want: Vec<f64> = run(attention, problem.qkv().unwrap()).iter().map(|x| f64::from(*x)).collect();
        let piece = |queries: std::ops::Range<usize>, keys: std::ops::Range<usize>| {
            Inputs::new(x.q.narrow(queries), x.k.narrow(keys.clone()), x.v.narrow(keys))
        };
        let mut memory = attention.memory(&piece(0..9, 21..30)).unwrap();
        attention
            .forward_inputs(
                &piece(0..0, 0..21),
                ViewMut::contiguous("out", &mut [] as &mut [f32], [2, 4, 0, 19]).unwrap().into(),
                Some(&mut memory),
            )
            .unwrap();
        let mut out = vec![f32::NAN; want.len()];
        let view = ViewMut::contiguous("out", &mut out, [2, 4, 9, 19]).unwrap();
        attention.forward_inputs(&piece(0..9, 21..30), view.into(), Some(&mut memory)).unwrap();
        assert_close(V::NAME, &out, &want, TOL);
    }
    check(&retnet(7));
    check(&linear(true, 7));
    check(&elu(true, 7));
}

#[test]
fn gradients_equal_finite_differences() {
    for (n_q, n_kv) in [(20, 20), (6, 20), (20, 6)] {
        let shape =
            AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, n_q, n_kv, ..AttnShape::square(2, 20, 4) };
        for (name, causal) in [
            ("linear", true),
            ("linear", false),
            ("linear-elu", true),
            ("linear-elu", false),
            ("retnet", true),
        ] {
            let entry = *find(&registry(), name).unwrap();
            let check = if name == "linear-elu" { differences::check_rounded } else { differences::check };
            check(&entry, &Options::new().with("causal", causal).with("chunk_len", 7), shape, 3);
        }
    }
}

#[test]
fn what_cannot_be_computed_is_refused_and_nothing_written() {
    fn refuse<V: StateVariant>(attention: &LinearAttention<V>, with_state: bool, words: &[&str]) {
        let problem = Problem::normal(shape(6, 4), 31);
        let mut out = vec![7.0f32; problem.shape.out().iter().product()];
        let view = ViewMut::contiguous("out", &mut out, problem.shape.out()).unwrap();
        let x: Inputs<'_> = problem.qkv().unwrap().into();
        let square = Inputs::new(x.q.narrow(0..4), x.k, x.v);
        let mut memory = with_state.then(|| attention.memory(&square).unwrap());
        let text = attention.forward_inputs(&x, view.into(), memory.as_mut()).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(text.contains(word), "`{text}` lacks `{word}`"));
        assert!(out.iter().all(|x| *x == 7.0), "{text}");
    }
    let bad = |log_decay: Vec<f32>| {
        LinearAttention::new(RetNet { log_decay: Some(log_decay), ..RetNet::default() })
    };
    refuse(&bad(vec![-1.0; 3]), false, &["log_decay", "3", "4"]);
    refuse(&bad(vec![0.5; 4]), false, &["log_decay", "0.5"]);
    refuse(&bad(vec![f32::NAN; 4]), false, &["log_decay", "NaN"]);
    refuse(&LinearAttention::new(Linear { scale: Some(f32::NAN), ..Linear::default() }), false, &["scale"]);
    refuse(&linear(true, 0), false, &["chunk_len", "0"]);
    refuse(&LinearAttention::new(LinearElu { eps: -1.0, ..LinearElu::default() }), false, &["eps", "-1"]);
    refuse(&elu(true, 16), true, &["linear-elu", "6 queries", "4 keys"]);
    let stream = StreamShape::of(&Problem::normal(shape(4, 4), 1).qkv().unwrap());
    assert!(linear(false, 16).as_streaming().is_none());
    assert!(linear(false, 16).start(stream).is_err_and(|e| e.to_string().contains("causal")));
}

#[test]
fn cost_counts_the_multiply_adds_of_the_chunked_form() {
    for (n_q, n_kv) in [(0, 0), (1, 1), (7, 7), (64, 64), (70, 100), (100, 70)] {
        let sizes = shape(n_q, n_kv);
        let (key_dim, value_dim) = (sizes.head_dim as u64, sizes.head_dim_v as u64);
        let state = (n_q + n_kv) as u64 * key_dim * value_dim;
        for chunk_len in [1, 7, 64, usize::MAX] {
            let inside: usize = (0..n_q.min(n_kv)).map(|i| 1 + i % chunk_len).sum();
            let products = inside as u64 * (key_dim + value_dim) + state;
            let cost = linear(true, chunk_len).cost(&sizes, DType::F32);
            assert_eq!(cost.flops, 2 * 8 * products, "{n_q} x {n_kv} chunk {chunk_len}");
        }
        assert_eq!(linear(false, 64).cost(&sizes, DType::F32).flops, 2 * 8 * state);
    }
}
