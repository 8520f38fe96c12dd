//! What variants of the matrix-state engine are to one another, and what packing and splitting leave as it is.

use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData, find};
use attn_core::{AttnShape, ViewMut};
use attn_linear::matrix_state::{Inputs, StateAttention, StateVariant};
use attn_linear::recurrent::{Gsa, Kda, LightNet};
use attn_linear::registry;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;

const HEADS: usize = 2;
const N: usize = 45;
const K: usize = 6;
const V: usize = 5;

/// q, k, v of order one.
fn qkv() -> NamedTensors {
    let problem = Problem::normal(AttnShape { head_dim_v: V, ..AttnShape::square(HEADS, N, K) }, 3);
    let mut all = NamedTensors::default();
    for (name, width, data) in [("q", K, problem.q), ("k", K, problem.k), ("v", V, problem.v)] {
        all.0.insert(name.into(), NamedTensor::f32(name, &[1, HEADS, N, width], data).unwrap());
    }
    all
}

/// Gates between `low` and `high`, one a token.
fn gates(low: f32, high: f32) -> Vec<f32> {
    let wave = |i: usize| 0.5 + 0.5 * (i as f32 * 1.7).sin();
    (0..HEADS * N).map(|i| low + (high - low) * wave(i)).collect()
}

fn with(mut all: NamedTensors, name: &str, width: usize, data: &[f32]) -> NamedTensors {
    let shape: &[usize] = if width == 1 { &[1, HEADS, N] } else { &[1, HEADS, N, width] };
    let wide = data.iter().flat_map(|x| std::iter::repeat_n(*x, width)).collect();
    all.0.insert(name.into(), NamedTensor::f32(name, shape, wide).unwrap());
    all
}

fn run(name: &str, options: &[(&str, &str)], tensors: &NamedTensors) -> NamedTensors {
    let options = options.iter().fold(Options::new(), |all, (key, value)| all.with(key, value));
    find(&registry(), name).unwrap().run(&options, tensors).unwrap()
}

fn equal(what: &str, a: &NamedTensors, b: &NamedTensors) {
    for name in ["o", "sT"] {
        let (a, b) = (a.f32(name).unwrap().unwrap().1, b.require(name).unwrap().data.to_f64());
        assert_close(&format!("{what}: {name}"), a, &b, Tol::ScaledMax(5e-6));
    }
}

#[test]
fn a_decay_that_all_channels_share_is_a_scalar_one() {
    let g = gates(-3.0, 0.0);
    let simple = run("simple-gla", &[], &with(qkv(), "log_decay", 1, &g));
    equal("gla", &run("gla", &[], &with(qkv(), "log_decay", K, &g)), &simple);
    let beta = gates(0.0, 2.0);
    let gated = run("gated-deltanet", &[], &with(with(qkv(), "log_decay", 1, &g), "beta", 1, &beta));
    equal("kda", &run("kda", &[], &with(with(qkv(), "log_decay", K, &g), "beta", 1, &beta)), &gated);
}

#[test]
fn without_decay_the_gated_forms_are_the_plain_ones() {
    let beta = with(qkv(), "beta", 1, &gates(0.0, 2.0));
    let plain = run("deltanet", &[], &beta);
    equal("gated", &run("gated-deltanet", &[("log_decay", "0")], &beta), &plain);
    equal("one householder", &run("deltaproduct", &[("householders", "1")], &beta), &plain);
    let linear = run("linear", &[("causal", "true")], &qkv());
    equal("gla", &run("gla", &[("log_decay", "0")], &qkv()), &linear);
    let faded = run("simple-gla", &[], &qkv());
    let beta = with(qkv(), "beta", 1, &[0.0; HEADS * N]);
    let erased = run("gated-deltanet", &[], &beta);
    assert!(erased.require("sT").unwrap().data.to_f64().iter().all(|s| *s == 0.0), "nothing was written");
    assert!(faded.require("sT").unwrap().data.to_f64().iter().any(|s| *s != 0.0));
}

#[test]
fn gates_that_agree_make_the_delta_family_one() {
    let (g, beta) = (gates(-2.0, 0.0), gates(0.0, 1.0));
    let kda = run("kda", &[], &with(with(qkv(), "log_decay", K, &g), "beta", 1, &beta));
    let all = with(with(qkv(), "log_decay", K, &g), "erase_gate", K, &beta);
    equal("gdn2", &run("gdn2", &[], &with(all, "write_gate", V, &beta)), &kda);
    let gated = with(with(qkv(), "log_decay", 1, &g), "beta", 1, &beta);
    equal("comba", &run("comba", &[("p_scale", "1")], &gated), &run("gated-deltanet", &[], &gated));
}

#[test]
fn a_diagonal_plus_low_rank_covers_the_others() {
    let g = gates(-2.0, 0.0);
    let zero = with(with(qkv(), "a", K, &[0.0; HEADS * N]), "b", K, &gates(-1.0, 1.0));
    let raw = [("qk_norm", "false")];
    let gla = run("gla", &[], &with(qkv(), "log_decay", K, &g));
    equal("a = 0", &run("dplr", &raw, &with(zero.clone(), "log_decay", K, &g)), &gla);
    let still = with(zero, "log_decay", K, &[0.0; HEADS * N]);
    equal("g = 0", &run("dplr", &[], &still), &run("dplr", &[("log_decay", "0")], &still));
    equal("iplr", &run("iplr", &[], &qkv()), &run("dplr", &[("log_decay", "0")], &qkv()));
}

#[test]
fn momentum_without_memory_is_the_delta_rule() {
    let steps = gates(0.0, 1.0);
    let none = [("log_mu", "-100"), ("log_decay", "0"), ("beta", "1")];
    let momentum = run("momentum-delta", &none, &with(qkv(), "eta", 1, &steps));
    equal("momentum", &momentum, &run("deltanet", &[], &with(qkv(), "beta", 1, &steps)));
}

#[test]
fn a_strong_regulariser_makes_mesanet_linear() {
    let solved =
        run("mesanet", &[("lambda", "1e6"), ("beta", "1"), ("log_decay", "0"), ("qk_norm", "false")], &qkv());
    let linear = run("linear", &[("causal", "true"), ("scale", "1")], &qkv());
    let got: Vec<f32> = solved.f32("o").unwrap().unwrap().1.iter().map(|o| o * 1e6).collect();
    assert_close("mesanet", &got, &linear.require("o").unwrap().data.to_f64(), Tol::ScaledMax(1e-3));
}

/// Packed sequences against runs of their own, and a sequence in two pieces against one.
fn check_packing<V: StateVariant>() {
    let attention = StateAttention::new(V::from_options(&Options::new()).unwrap());
    let all = qkv();
    let x = Inputs::of(&all, &[]).unwrap();
    let shape = [1, HEADS, N, self::V];
    let cuts = [0, 7, 7, 30, N];
    let (mut packed, mut memory) =
        (vec![f32::NAN; HEADS * N * self::V], attention.packed_memory(&x, &cuts).unwrap());
    let out = ViewMut::contiguous("out", &mut packed, shape).unwrap();
    attention.forward_packed(&x, &cuts, out.into(), Some(&mut memory)).unwrap();
    let per_sequence = memory.numbers().len() / (cuts.len() - 1);
    for (s, pair) in cuts.windows(2).enumerate() {
        let rows = pair[0]..pair[1];
        let own = Inputs::new(x.q.narrow(rows.clone()), x.k.narrow(rows.clone()), x.v.narrow(rows.clone()));
        let mut memory_of_own = attention.memory(&own).unwrap();
        let mut alone = vec![f32::NAN; HEADS * rows.len() * self::V];
        // In two pieces through the memory.
        let half = rows.len() / 2;
        for piece in [0..half, half..rows.len()] {
            let part = Inputs::new(
                own.q.narrow(piece.clone()),
                own.k.narrow(piece.clone()),
                own.v.narrow(piece.clone()),
            );
            let mut out = vec![f32::NAN; HEADS * piece.len() * self::V];
            let view = ViewMut::contiguous("out", &mut out, [1, HEADS, piece.len(), self::V]).unwrap();
            attention.forward_inputs(&part, view.into(), Some(&mut memory_of_own)).unwrap();
            for (h, rows_out) in out.chunks_exact((piece.len() * self::V).max(1)).enumerate() {
                let at = (h * rows.len() + piece.start) * self::V;
                alone[at..at + rows_out.len()].copy_from_slice(rows_out);
            }
        }
        for h in 0..HEADS {
            let got = &packed[(h * N + rows.start) * self::V..(h * N + rows.end) * self::V];
            let want = &alone[h * rows.len() * self::V..(h + 1) * rows.len() * self::V];
            let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
            assert_close(&format!("{} sequence {s}", V::NAME), got, &want, Tol::ScaledMax(1e-5));
        }
        let want: Vec<f64> = memory_of_own.numbers().iter().map(|x| f64::from(*x)).collect();
        let got = &memory.numbers()[s * per_sequence..(s + 1) * per_sequence];
        assert_close(&format!("{} memory {s}", V::NAME), got, &want, Tol::ScaledMax(1e-5));
    }
    for wrong in [&[0, 50][..], &[1, N], &[0, 9, 8, N], &[]] {
        let mut out = vec![f32::NAN; HEADS * N * self::V];
        let view = ViewMut::contiguous("out", &mut out, shape).unwrap();
        let error = attention.forward_packed(&x, wrong, view.into(), None).unwrap_err();
        assert!(error.to_string().contains("cu_seqlens"), "{error}");
    }
}

#[test]
fn nothing_crosses_the_boundary_of_packed_sequences() {
    check_packing::<Kda>();
    check_packing::<LightNet>();
    check_packing::<Gsa>();
}

#[test]
fn what_a_variant_does_not_read_is_refused() {
    let entry = *find(&registry(), "gla").unwrap();
    let wrong = with(qkv(), "beta", 1, &gates(0.0, 1.0));
    let error = entry.run(&Options::new(), &wrong).unwrap_err().to_string();
    assert!(error.contains("beta") && error.contains("log_decay"), "{error}");
    let narrow = with(qkv(), "log_decay", 1, &gates(-1.0, 0.0));
    let error = entry.run(&Options::new(), &narrow).unwrap_err().to_string();
    assert!(error.contains("log_decay") && error.contains("width"), "{error}");
    let mut short = qkv();
    short.0.insert(
        "log_decay".into(),
        NamedTensor { shape: vec![1, HEADS, N], data: TensorData::I32(vec![0; HEADS * N]) },
    );
    assert!(entry.run(&Options::new(), &short).unwrap_err().to_string().contains("log_decay"));
}
