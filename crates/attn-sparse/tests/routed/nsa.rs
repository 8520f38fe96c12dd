//! Native sparse attention: stored cases, the definition in f64, special cases, gradients.

use super::golden::{cases, options, run, size};
use super::promises::{parse, tensors};
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band};
use attn_core::registry::{NamedTensor, NamedTensors, find};
use attn_core::{AttnShape, StreamShape, ViewMut};
use attn_sparse::{Nsa, NsaGates, NsaInputs};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

#[test]
fn stored_choices_branches_and_sums() {
    for case in cases("nsa", 4) {
        let [block, n_selected, window] =
            ["block_size", "block_counts", "window"].map(|name| size(&case, name));
        let nsa = Nsa {
            compress_len: block,
            compress_stride: block,
            select_len: block,
            n_selected,
            window,
            softmax_scale: None,
        };
        let y = nsa.forward_with(&NsaInputs::new(case.inputs.qkv().unwrap())).unwrap();
        let slots = case.given.require("block_index").unwrap().data.to_f64();
        for (row, (got, slots)) in y.selected.iter().zip(slots.chunks_exact(n_selected)).enumerate() {
            let mut want: Vec<usize> = slots.iter().filter(|x| **x >= 0.0).map(|x| *x as usize).collect();
            want.sort_unstable();
            assert_eq!(got, &want, "{} row {row}", case.case);
        }
        let options = options(&[
            ("compress_len", block),
            ("compress_stride", block),
            ("select_len", block),
            ("n_selected", n_selected),
            ("window", window),
        ]);
        case.assert_outputs(&run("nsa", &options, &case.inputs));
        let mut given = case.inputs.clone();
        given.0.insert("block_index".into(), case.given.require("block_index").unwrap().clone());
        case.assert_outputs(&run("nsa", &options, &given));
    }
}

#[test]
fn every_promise_is_kept_where_choices_matter() {
    let configurations = [
        "compress_len=8 compress_stride=4 select_len=8 n_selected=4 window=16",
        "compress_len=5 compress_stride=5 select_len=7 n_selected=2 window=0",
    ];
    let entries = attn_sparse::registry();
    conformance::check_with(find(&entries, "nsa").unwrap(), &configurations.map(parse));
}

fn constant(s: &AttnShape, gates: [f32; 3]) -> [Vec<f32>; 3] {
    gates.map(|gate| vec![gate; s.rows()])
}

#[test]
fn one_branch_that_sees_everything_is_dense_causal_attention() {
    let s = AttnShape { n_heads_kv: 1, n_q: 90, ..AttnShape::square(2, 130, 16) };
    let problem = Problem::normal(s, 3);
    let x = problem.qkv().unwrap();
    let causal = Band::causal(&s, Align::BottomRight);
    let want = Exact { mask: &causal, ..Exact::default() }.all(&x).unwrap().out;
    let small = Nsa { compress_len: 8, compress_stride: 4, select_len: 8, ..Nsa::default() };
    for (nsa, gates) in [
        (Nsa { window: 1000, n_selected: 3, ..small }, [0.0, 0.0, 1.0]),
        (Nsa { window: 10, n_selected: 17, ..small }, [0.0, 1.0, 0.0]),
    ] {
        let [compress, select, window] = constant(&s, gates);
        let gates = NsaGates { compress: &compress, select: &select, window: Some(&window) };
        let y = nsa.forward_with(&NsaInputs { gates: Some(gates), ..NsaInputs::new(x) }).unwrap();
        assert_close("out", &y.out, &want, Tol::ScaledMax(4e-6));
    }
}

/// Rows of a head.
fn rows(data: &[f64], head: usize, n: usize, width: usize) -> Vec<&[f64]> {
    data[head * n * width..][..n * width].chunks_exact(width).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Softmax over some keys: probabilities and output.
fn attend(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], width: usize) -> (Vec<f64>, Vec<f64>) {
    let scores: Vec<f64> = keys.iter().map(|k| dot(q, k) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    let p: Vec<f64> = exp.iter().map(|x| x / sum).collect();
    let out = (0..width).map(|c| p.iter().zip(values).map(|(p, v)| p * v[c]).sum()).collect();
    (p, out)
}

/// Means of the blocks that end within the first `n` rows.
fn means(rows: &[&[f64]], nsa: &Nsa, n: usize) -> Vec<Vec<f64>> {
    let (l, t) = (nsa.compress_len, nsa.compress_stride);
    let starts = (0..n).step_by(t).take_while(|start| start + l <= n);
    let mean =
        |start: usize, c: usize| rows[start..start + l].iter().map(|row| row[c]).sum::<f64>() / l as f64;
    starts.map(|start| (0..rows[0].len()).map(|c| mean(start, c)).collect()).collect()
}

/// The definition: `sum(out * w)` and the selected blocks, with inputs q, k, v and three gates.
fn naive(
    nsa: &Nsa,
    s: &AttnShape,
    at: &[Vec<f64>],
    w: &[f64],
    held: Option<&[Vec<usize>]>,
) -> (f64, Vec<Vec<usize>>) {
    let (mut loss, mut selected) = (0.0, Vec::new());
    let group = s.group_size();
    for kv in 0..s.n_heads_kv {
        let (k, v) = (rows(&at[1], kv, s.n_kv, s.head_dim), rows(&at[2], kv, s.n_kv, s.head_dim_v));
        for i in 0..s.n_q {
            let p = i + s.n_kv - s.n_q;
            let (ck, cv) = (means(&k, nsa, p + 1), means(&v, nsa, p + 1));
            let n_blocks = p / nsa.select_len + 1;
            let mut importance = vec![0.0; n_blocks];
            let mut compressed = Vec::new();
            for h in kv * group..(kv + 1) * group {
                let q = rows(&at[0], h, s.n_q, s.head_dim)[i];
                let (p, out) = attend(q, &ck, &cv, s.head_dim_v);
                for (c, p) in p.iter().enumerate() {
                    for j in c * nsa.compress_stride..c * nsa.compress_stride + nsa.compress_len {
                        importance[j / nsa.select_len] += p;
                    }
                }
                compressed.push(out);
            }
            let own = n_blocks - 1;
            importance[0] = f64::INFINITY;
            importance[own] = f64::INFINITY;
            importance[own.saturating_sub(1)] = f64::INFINITY;
            let mut order: Vec<usize> = (0..n_blocks).collect();
            order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]).then(a.cmp(b)));
            order.truncate(nsa.n_selected);
            order.sort_unstable();
            let blocks = held.map_or(order, |held| held[kv * s.n_q + i].clone());
            let keys: Vec<usize> = blocks
                .iter()
                .flat_map(|b| b * nsa.select_len..(b + 1) * nsa.select_len)
                .filter(|j| *j <= p)
                .collect();
            let window: Vec<usize> = ((p + 1).saturating_sub(nsa.window)..=p).collect();
            let of =
                |rows: &[&[f64]], keys: &[usize]| keys.iter().map(|j| rows[*j].to_vec()).collect::<Vec<_>>();
            for (h, compressed) in (kv * group..(kv + 1) * group).zip(compressed) {
                let q = rows(&at[0], h, s.n_q, s.head_dim)[i];
                let select = attend(q, &of(&k, &keys), &of(&v, &keys), s.head_dim_v).1;
                let slide = attend(q, &of(&k, &window), &of(&v, &window), s.head_dim_v).1;
                let row = h * s.n_q + i;
                for c in 0..s.head_dim_v {
                    let parts = [compressed[c], select[c], slide[c]];
                    let out: f64 = parts.iter().enumerate().map(|(g, x)| at[3 + g][row] * x).sum();
                    loss += w[row * s.head_dim_v + c] * out;
                }
            }
            selected.push(blocks);
        }
    }
    (loss, selected)
}

#[test]
fn choices_and_gradients_follow_the_definition() {
    let s = AttnShape { n_heads_kv: 1, n_q: 30, head_dim_v: 3, ..AttnShape::square(2, 37, 4) };
    for (l, t, select_len) in [(4, 2, 8), (3, 3, 3), (6, 4, 5), (2, 3, 4)] {
        let nsa = Nsa {
            compress_len: l,
            compress_stride: t,
            select_len,
            n_selected: 4,
            window: 5,
            softmax_scale: None,
        };
        let problem = Problem::normal(s, (l * t) as u64);
        let gates = Problem::normal(AttnShape { head_dim: 3, ..s }, 9).q;
        let gate = |g: usize| -> Vec<f32> { gates.iter().skip(g).step_by(3).copied().collect() };
        let [compress, select, window] = [gate(0), gate(1), gate(2)];
        let grad_o = Problem::normal(AttnShape { head_dim: 3, ..s }, 10).q;

        let mut given: NamedTensors = tensors(&problem);
        let [b, h, n, _] = s.out();
        for (name, gate) in [("gate_compress", &compress), ("gate_select", &select), ("gate_window", &window)]
        {
            given.0.insert(name.into(), NamedTensor::f32(name, &[b, h, n], gate.clone()).unwrap());
        }
        given.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &s.out(), grad_o.clone()).unwrap());
        let options = options(&[
            ("compress_len", l),
            ("compress_stride", t),
            ("select_len", select_len),
            ("n_selected", 4),
            ("window", 5),
        ]);
        let got = run("nsa", &options, &given);

        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let at = [&problem.q, &problem.k, &problem.v, &compress, &select, &window].map(|x| wide(x)).to_vec();
        let w = wide(&grad_o);
        let (loss, selected) = naive(&nsa, &s, &at, &w, None);
        let y = nsa.forward_with(&NsaInputs::new(problem.qkv().unwrap())).unwrap();
        assert_eq!(y.selected, selected, "l {l} t {t} l' {select_len}");
        let out = wide(got.f32("o").unwrap().unwrap().1);
        assert_close("loss", &[dot(&out, &w)], &[loss], Tol::ScaledMax(1e-5));

        let names =
            ["grad.q", "grad.k", "grad.v", "grad.gate_compress", "grad.gate_select", "grad.gate_window"];
        let grads = names.map(|name| wide(got.f32(name).unwrap().unwrap().1));
        let claim = |x: usize| Claim { name: names[x], at: &at[x], gradient: &grads[x] };
        let claims: Vec<_> = (0..6).map(claim).collect();
        let check = GradientCheck { tol: Tol::ScaledMax(1e-5), sample: Some(25), ..GradientCheck::default() };
        check.check(|at| naive(&nsa, &s, at, &w, Some(&selected)).0, &claims).unwrap();
    }
}

#[test]
fn compressed_blocks_may_be_given() {
    let s = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 40, 4) };
    let (problem, options) =
        (Problem::normal(s, 2), parse("compress_len=4 compress_stride=4 select_len=8 n_selected=3 window=6"));
    let mean = |x: &[f32]| -> Vec<f32> {
        let mean = |block: &[f32]| {
            (0..4).map(|c| block.iter().skip(c).step_by(4).sum::<f32>() / 4.0).collect::<Vec<_>>()
        };
        x.chunks_exact(16).flat_map(mean).collect()
    };
    let mut given = tensors(&problem);
    let want = run("nsa", &options, &given);
    for (name, rows) in [("k_compress", &problem.k), ("v_compress", &problem.v)] {
        given.0.insert(name.into(), NamedTensor::f32(name, &[1, 1, 10, 4], mean(rows)).unwrap());
    }
    given.0.insert("grad_o".into(), want.require("o").unwrap().clone());
    let got = run("nsa", &options, &given);
    let want = want.require("o").unwrap().data.to_f64();
    assert_close("out", got.f32("o").unwrap().unwrap().1, &want, Tol::ScaledMax(1e-6));
    assert!(got.require("grad.k_compress").unwrap().data.to_f64().iter().any(|x| *x != 0.0));
    given.0.insert("k_compress".into(), NamedTensor::f32("k", &[1, 1, 9, 4], vec![0.0; 36]).unwrap());
    let entries = attn_sparse::registry();
    let error = find(&entries, "nsa").unwrap().run(&options, &given).unwrap_err().to_string();
    assert!(error.contains("k_compress") || error.contains("v_compress"), "{error}");
}

#[test]
fn a_stream_holds_a_summary_that_is_small_beside_its_cache() {
    let s = AttnShape::square(1, 4096, 32);
    let problem = Problem::normal(s, 1);
    let x = problem.qkv().unwrap();
    let attention = find(&attn_sparse::registry(), "nsa").unwrap().build(&parse("")).unwrap();
    let mut state = attention.as_streaming().unwrap().start(StreamShape::of(&x)).unwrap();
    let mut out = vec![0.0; s.rows() * 32];
    state.append(x, ViewMut::contiguous("out", &mut out, s.out()).unwrap().into()).unwrap();
    let summary = state.bytes() as f64 / (2 * 4 * 4096 * 32) as f64 - 1.0;
    assert!(summary > 0.05 && summary < 0.25, "{summary}");
}
