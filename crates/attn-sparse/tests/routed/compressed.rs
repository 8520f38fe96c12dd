//! Compressed attention: stored cases, the definition in f64, special cases, gradients.

use super::golden::{cases, options, run, size};
use super::promises::{parse, tensors};
use attn_core::AttnShape;
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band};
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::golden::GoldenCase;
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

fn configured(case: &GoldenCase) -> Options {
    let sizes = [("rate", size(case, "compress_rate")), ("window", size(case, "window"))];
    match case.options["index_topk"].as_u64() {
        None => options(&sizes),
        Some(top_k) => options(&sizes).with("top_k", top_k),
    }
}

#[test]
fn stored_entries_and_outputs() {
    for name in ["compressed-heavy", "compressed-sparse"] {
        for case in cases(name, 1) {
            let mut given = case.inputs.clone();
            if name == "compressed-sparse" {
                // The stored choice instead of the indexer.
                given.0.retain(|name, _| !name.starts_with("index_"));
                let mask = case.given.require("compressed_mask").unwrap().clone();
                given.0.insert("compressed_mask".into(), mask);
            }
            let got = run(name, &configured(&case), &given);
            case.assert_outputs(&got);
            let entries = case.aux.require("compressed").unwrap().data.to_f64();
            assert_close(
                &case.case,
                got.f32("compressed").unwrap().unwrap().1,
                &entries,
                Tol::ScaledMax(1e-6),
            );
        }
    }
}

#[test]
fn stored_choices_of_entries() {
    for case in cases("compressed-sparse", 1) {
        let (options, floats) =
            (configured(&case), |x: &NamedTensors, name: &str| x.require(name).unwrap().data.to_f64());
        // Index keys are made as entries are.
        let mut index = case.inputs.clone();
        for (to, from) in [
            ("compress_kv", "index_kv"),
            ("compress_gate", "index_gate"),
            ("position_bias", "index_position_bias"),
        ] {
            index.0.insert(to.into(), case.inputs.require(from).unwrap().clone());
        }
        let keys = floats(&run("compressed-sparse", &options, &index), "compressed");
        let (q, w) = (floats(&case.inputs, "index_q"), floats(&case.inputs, "index_w"));
        let [_, heads, n, width] = case.inputs.require("index_q").unwrap().shape[..] else {
            panic!("four axes")
        };
        let score = |i: usize, e: usize| -> f64 {
            let product = |h: usize| {
                let q = &q[(h * n + i) * width..][..width];
                q.iter().zip(&keys[e * width..]).map(|(q, k)| q * k).sum::<f64>()
            };
            (0..heads).map(|h| w[h * n + i] * product(h).max(0.0)).sum()
        };
        let stored = floats(&case.given, "compressed_mask");
        let (top_k, n_entries) = (size(&case, "index_topk"), stored.len() / n);
        let ours = run("compressed-sparse", &options, &case.inputs);
        let mut ties = 0;
        for i in 0..n {
            let visible = (i + 1) / size(&case, "compress_rate");
            let mut order: Vec<usize> = (0..visible).collect();
            order.sort_by(|a, b| score(i, *b).total_cmp(&score(i, *a)).then(a.cmp(b)));
            order.truncate(top_k);
            let mut want: Vec<usize> = (0..n_entries).filter(|e| stored[i * n_entries + e] != 0.0).collect();
            want.sort_by(|a, b| score(i, *b).total_cmp(&score(i, *a)).then(a.cmp(b)));
            // Where relu leaves many zeros the reference takes any of them, we the first.
            let scores = |list: &[usize]| list.iter().map(|e| score(i, *e)).collect::<Vec<f64>>();
            assert_close(&format!("row {i}"), &scores(&order), &scores(&want), Tol::ScaledMax(1e-6));
            if order != want {
                ties += 1;
                continue;
            }
            let (got, want) = (floats(&ours, "o"), floats(&case.outputs, "o"));
            let d = got.len() / (2 * n);
            for row in [i, n + i] {
                let row = row * d..(row + 1) * d;
                assert_close(
                    &format!("row {i}"),
                    &got[row.clone()],
                    &want[row],
                    Tol::AllClose { atol: 2e-5, rtol: 0.0 },
                );
            }
        }
        assert!(ties < n / 4, "{ties} rows are undecided");
    }
}

#[test]
fn every_promise_is_kept_where_choices_matter() {
    let entries = attn_sparse::registry();
    let heavy = ["rate=8 window=16", "rate=3 window=1"].map(parse);
    conformance::check_with(find(&entries, "compressed-heavy").unwrap(), &heavy);
    let sparse = ["rate=4 window=10 top_k=5", "rate=3 window=2 top_k=2 index_dim=3"].map(parse);
    conformance::check_with(find(&entries, "compressed-sparse").unwrap(), &sparse);
}

#[test]
fn a_window_over_everything_without_entries_is_dense_causal_attention() {
    let s = AttnShape { n_heads_kv: 1, n_q: 90, ..AttnShape::square(2, 130, 16) };
    let problem = Problem::normal(s, 3);
    let causal = Band::causal(&s, Align::BottomRight);
    let want = Exact { mask: &causal, ..Exact::default() }.all(&problem.qkv().unwrap()).unwrap();
    for name in ["compressed-heavy", "compressed-sparse"] {
        let got = run(name, &parse("rate=131 window=130"), &tensors(&problem));
        assert_close(name, got.f32("o").unwrap().unwrap().1, &want.out, Tol::ScaledMax(4e-6));
        assert_close(
            name,
            got.f32("lse").unwrap().unwrap().1,
            &want.lse.clone().unwrap(),
            Tol::ScaledMax(4e-6),
        );
    }
    // Entries of one token each repeat the raw keys: every weight counts twice, and the output is the same.
    let got = run("compressed-heavy", &parse("rate=1 window=130"), &tensors(&problem));
    assert_close("repeated", got.f32("o").unwrap().unwrap().1, &want.out, Tol::ScaledMax(4e-6));
    let twice: Vec<f64> = want.lse.unwrap().iter().map(|lse| lse + 2f64.ln()).collect();
    assert_close("repeated", got.f32("lse").unwrap().unwrap().1, &twice, Tol::ScaledMax(4e-6));
}

const NAMES: [&str; 6] = ["q", "kv_raw", "compress_kv", "compress_gate", "position_bias", "sinks"];

/// Sizes of a naive problem: heads, tokens, width, rate, window; and the entries chosen by each row, if not all.
struct Naive<'a> {
    sizes: [usize; 5],
    chosen: Option<&'a [Vec<usize>]>,
}

impl Naive<'_> {
    /// `sum(out * w)` by the definition, with inputs in the order of [`NAMES`].
    fn loss(&self, at: &[Vec<f64>], w: &[f64]) -> f64 {
        let [heads, n, d, m, window] = self.sizes;
        let series = if self.chosen.is_some() { 2 * d } else { d };
        let entry = |e: usize| -> Vec<f64> {
            let feature = |c: usize| {
                let first = if self.chosen.is_some() { e.saturating_sub(1) } else { e };
                let slots: Vec<(f64, f64)> = (first * m..(e + 1) * m)
                    .map(|j| {
                        let column = if self.chosen.is_some() && j >= e * m { d + c } else { c };
                        let logit = at[3][j * series + column] + at[4][j % m * series + column];
                        (logit.exp(), at[2][j * series + column])
                    })
                    .collect();
                let sum: f64 = slots.iter().map(|(weight, _)| weight).sum();
                slots.iter().map(|(weight, x)| weight * x).sum::<f64>() / sum
            };
            (0..d).map(feature).collect()
        };
        let entries: Vec<Vec<f64>> = (0..n / m).map(entry).collect();
        let mut loss = 0.0;
        for (h, i) in (0..heads).flat_map(|h| (0..n).map(move |i| (h, i))) {
            let q = &at[0][(h * n + i) * d..][..d];
            let raw = ((i + 1).saturating_sub(window)..=i).map(|j| at[1][j * d..][..d].to_vec());
            let all: Vec<usize> = (0..(i + 1) / m).collect();
            let seen = self.chosen.map_or(&all, |chosen| &chosen[i]);
            let keys: Vec<Vec<f64>> = raw.chain(seen.iter().map(|e| entries[*e].clone())).collect();
            let score = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
            let exp: Vec<f64> = keys.iter().map(|k| score(k).exp()).collect();
            let sum = exp.iter().sum::<f64>() + at[5][h].exp();
            for c in 0..d {
                let out: f64 = exp.iter().zip(&keys).map(|(e, k)| e / sum * k[c]).sum();
                loss += w[(h * n + i) * d + c] * out;
            }
        }
        loss
    }
}

#[test]
fn gradients_reach_gates_bias_and_sinks() {
    for (name, sparse) in [("compressed-heavy", false), ("compressed-sparse", true)] {
        let [heads, n, d, m, window] = [2, 22, 4, 3, 5];
        let series = if sparse { 2 * d } else { d };
        let axes: [Vec<usize>; 6] = [
            vec![1, heads, n, d],
            vec![1, n, d],
            vec![1, n, series],
            vec![1, n, series],
            vec![m, series],
            vec![heads],
        ];
        let mut given = NamedTensors::default();
        for (seed, (name, axes)) in NAMES.iter().zip(&axes).enumerate() {
            let len = axes.iter().product();
            let numbers = Problem::normal(AttnShape::square(1, len, 1), seed as u64).q;
            given.0.insert(name.to_string(), NamedTensor::f32(name, axes, numbers).unwrap());
        }
        let w = Problem::normal(AttnShape::square(1, heads * n * d, 1), 8).q;
        given.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &axes[0], w.clone()).unwrap());
        // Every third of the entries that a row may see.
        let chosen: Vec<Vec<usize>> =
            (0..n).map(|i| (0..(i + 1) / m).filter(|e| (e + i) % 3 == 0).collect()).collect();
        if sparse {
            let flag = |(i, e): (usize, usize)| f32::from(u8::from(chosen[i].contains(&e)));
            let flags = (0..n).flat_map(|i| (0..n / m).map(move |e| (i, e))).map(flag).collect();
            let mask = NamedTensor::f32("compressed_mask", &[1, 1, n, n / m], flags).unwrap();
            given.0.insert("compressed_mask".into(), mask);
        }
        let got = run(name, &options(&[("rate", m), ("window", window)]), &given);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let w = wide(&w);
        let at: Vec<Vec<f64>> = NAMES.iter().map(|name| given.require(name).unwrap().data.to_f64()).collect();
        let naive = Naive { sizes: [heads, n, d, m, window], chosen: sparse.then_some(&chosen) };
        let out = got.require("o").unwrap().data.to_f64();
        let loss: f64 = out.iter().zip(&w).map(|(o, w)| o * w).sum();
        assert_close("loss", &[loss], &[naive.loss(&at, &w)], Tol::ScaledMax(1e-5));
        let grads: Vec<Vec<f64>> =
            NAMES.iter().map(|name| got.require(&format!("grad.{name}")).unwrap().data.to_f64()).collect();
        let claim = |x: usize| Claim { name: NAMES[x], at: &at[x], gradient: &grads[x] };
        let claims: Vec<_> = (0..6).map(claim).collect();
        let check = GradientCheck { tol: Tol::ScaledMax(1e-5), sample: Some(25), ..GradientCheck::default() };
        check.check(|at| naive.loss(at, &w), &claims).unwrap();
    }
}

/// Without given tensors: gradients of means, against differences of the definition over held choices.
#[test]
fn gradients_reach_the_tokens_behind_means() {
    let s = AttnShape { n_heads_kv: 1, n_q: 20, head_dim_v: 3, ..AttnShape::square(2, 25, 4) };
    // All entries are seen, so that choices hold.
    for (name, options) in
        [("compressed-heavy", "rate=4 window=5"), ("compressed-sparse", "rate=3 window=4 top_k=100")]
    {
        let (problem, w) = (Problem::normal(s, 6), Problem::normal(AttnShape { head_dim: 3, ..s }, 7).q);
        let mut given = tensors(&problem);
        given.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &s.out(), w.clone()).unwrap());
        let got = run(name, &parse(options), &given);
        let attention = find(&attn_sparse::registry(), name).unwrap().build(&parse(options)).unwrap();
        // Inputs reach the definition as f32: steps are powers of two, and the difference is as exact as they allow.
        let loss = |at: &[Vec<f64>]| -> f64 {
            let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect();
            let moved = Problem { shape: s, q: narrow(&at[0]), k: narrow(&at[1]), v: narrow(&at[2]) };
            let out = attention.definition(&moved.qkv().unwrap()).unwrap().out;
            out.iter().zip(&w).map(|(o, w)| o * f64::from(*w)).sum()
        };
        let at: Vec<Vec<f64>> =
            [&problem.q, &problem.k, &problem.v].map(|x| x.iter().map(|x| f64::from(*x)).collect()).to_vec();
        let grads = ["q", "k", "v"].map(|name| got.require(&format!("grad.{name}")).unwrap().data.to_f64());
        let claim = |x: usize| Claim { name: ["q", "k", "v"][x], at: &at[x], gradient: &grads[x] };
        let claims: Vec<_> = (0..3).map(claim).collect();
        let check = GradientCheck {
            step: 0.03125,
            tol: Tol::ScaledMax(1e-4),
            sample: Some(20),
            ..GradientCheck::default()
        };
        check.check(loss, &claims).unwrap();
    }
}
