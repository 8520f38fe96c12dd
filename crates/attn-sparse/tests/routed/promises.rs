//! Conformance where choices bite, limits in which everything is chosen, streams, gradients.

use super::golden::run;
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band};
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_core::{AttnShape, StreamShape, ViewMut};
use attn_testkit::inputs::Problem;
use attn_testkit::{compare::Tol, compare::assert_close, conformance};

pub(super) fn parse(text: &str) -> Options {
    Options::parse(text.split_whitespace()).expect("key=value")
}

/// Configurations whose choices matter at the suite's lengths, and one in which everything is chosen.
const CONFIGURATIONS: [(&str, &[&str], &str); 9] = [
    (
        "infllm-v2",
        &[
            "mean_len=8 mean_stride=4 block_len=8 top_k=4 local_blocks=2 dense_len=0",
            "mean_len=5 mean_stride=5 block_len=7 top_k=2 init_blocks=0 local_blocks=0 dense_len=30",
        ],
        "dense_len=1000",
    ),
    ("moba", &["chunk_len=16 top_k=3", "chunk_len=7 top_k=1"], "chunk_len=32 top_k=100"),
    ("dsa", &["top_k=24", "top_k=5 index_dim=2"], "top_k=1000"),
    (
        "block-indexer",
        &["block_len=16 top_k=3", "block_len=5 top_k=4 local_blocks=2"],
        "block_len=16 top_k=100",
    ),
    (
        "arkvale",
        &[
            "page_len=8 token_budget=48",
            "page_len=4 token_budget=16 first_pages=0 last_pages=1 volume=ball",
            "page_len=1 token_budget=9 last_pages=0",
        ],
        "page_len=8 token_budget=400",
    ),
    (
        "double-sparsity",
        &["top_k=12 label_dim=2", "top_k=5 calibration_len=20"],
        "top_k=400 calibration_len=1",
    ),
    (
        "magicpig",
        &[
            "n_bits=2 n_tables=4 n_sinks=1 window=4 calibration_len=6",
            "n_bits=3 n_tables=12 n_sinks=0 window=1 calibration_len=3",
        ],
        "n_bits=0 n_tables=2 calibration_len=5",
    ),
    ("loki", &["top_k=12 rank=2", "top_k=5 calibration_len=20"], "top_k=400 calibration_len=1"),
    (
        "infllm",
        &[
            "block_len=4 top_k=5 local_blocks=2",
            "block_len=7 top_k=4 n_representatives=2 init_blocks=0 local_blocks=3",
        ],
        "block_len=4 top_k=100",
    ),
];

#[test]
fn every_promise_is_kept_where_choices_matter() {
    for (name, configurations, _) in CONFIGURATIONS {
        let entries = attn_sparse::registry();
        let configurations: Vec<_> = configurations.iter().map(|c| parse(c)).collect();
        conformance::check_with(find(&entries, name).unwrap(), &configurations);
    }
}

#[test]
fn with_everything_chosen_it_is_dense_causal_attention() {
    let s = AttnShape { n_heads_kv: 1, n_q: 90, ..AttnShape::square(2, 130, 16) };
    let problem = Problem::normal(s, 3);
    let x = problem.qkv().unwrap();
    let causal = Band::causal(&s, Align::BottomRight);
    let want = Exact { mask: &causal, ..Exact::default() }.all(&x).unwrap();
    for (name, few, all) in CONFIGURATIONS {
        let got = run(name, &parse(all), &tensors(&problem));
        let (_, out) = got.f32("o").unwrap().unwrap();
        assert_close(name, out, &want.out, Tol::ScaledMax(4e-6));
        let got = run(name, &parse(few[0]), &tensors(&problem));
        let (_, out) = got.f32("o").unwrap().unwrap();
        let furthest = out.iter().zip(&want.out).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(furthest > 1e-2, "{name} {}: a choice of few keys is another result", few[0]);
    }
}

pub(super) fn tensors(problem: &Problem) -> NamedTensors {
    let s = problem.shape;
    let all = [("q", s.q(), &problem.q), ("k", s.k(), &problem.k), ("v", s.v(), &problem.v)];
    let tensor = |(name, axes, data): (&str, [usize; 4], &Vec<f32>)| {
        (name.to_string(), NamedTensor::f32(name, &axes, data.clone()).unwrap())
    };
    NamedTensors(all.into_iter().map(tensor).collect())
}

/// More queries than are chosen for at a time, against the choice as a whole.
#[test]
fn long_inputs_are_attended_block_by_block() {
    for (name, options) in
        [("moba", "chunk_len=64 top_k=3"), ("dsa", "top_k=40"), ("block-indexer", "top_k=4")]
    {
        let s = AttnShape { n_q: 2500, n_heads_kv: 1, ..AttnShape::square(2, 2900, 8) };
        let (problem, entries) = (Problem::normal(s, 8), attn_sparse::registry());
        let attention = find(&entries, name).unwrap().build(&parse(options)).unwrap();
        let x = problem.qkv().unwrap();
        let (mut out, mut lse) = (vec![f32::NAN; s.rows() * 8], vec![f32::NAN; s.rows()]);
        let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
        attention.as_softmax().unwrap().forward_with_lse(x, view.into(), &mut lse).unwrap();
        let mut whole = vec![f32::NAN; out.len()];
        let view = ViewMut::contiguous("out", &mut whole, s.out()).unwrap();
        attention.as_differentiable().unwrap().forward_saving(x, view.into()).unwrap();
        assert_eq!(out, whole, "{name}");
        assert!(lse.iter().all(|lse| lse.is_finite()));
    }
}

/// A stream holds its cache and a summary that is small beside it, and says so.
#[test]
fn streams_say_what_they_hold() {
    for (name, options, most) in
        [("moba", "chunk_len=64", 0.1), ("infllm-v2", "", 0.1), ("dsa", "", 0.2), ("block-indexer", "", 0.2)]
    {
        let s = AttnShape::square(1, 4096, 32);
        let (problem, entries) = (Problem::normal(s, 1), attn_sparse::registry());
        let attention = find(&entries, name).unwrap().build(&parse(options)).unwrap();
        let x = problem.qkv().unwrap();
        let mut state = attention.as_streaming().unwrap().start(StreamShape::of(&x)).unwrap();
        let mut out = vec![0.0; s.rows() * 32];
        state.append(x, ViewMut::contiguous("out", &mut out, s.out()).unwrap().into()).unwrap();
        let cache = (2 * 4 * 4096 * 32) as f64;
        let summary = state.bytes() as f64 / cache - 1.0;
        assert!(summary > 0.0 && summary < most, "{name}: {summary}");
    }
}

/// With the choice held, gradients are those of attention over the chosen pairs.
#[test]
fn gradients_flow_through_the_chosen_pairs() {
    let s = AttnShape { n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 50, 8) };
    let problem = Problem::normal(s, 4);
    let (x, weights) = (problem.qkv().unwrap(), Problem::normal(s, 5).v);
    let grad_o: Vec<f32> = (0..s.rows() * 5).map(|e| weights[e % weights.len()] + e as f32 * 1e-3).collect();
    let wide: Vec<f64> = grad_o.iter().map(|x| f64::from(*x)).collect();
    for (name, options) in
        [("moba", "chunk_len=8 top_k=2"), ("dsa", "top_k=6"), ("block-indexer", "block_len=4 top_k=3")]
    {
        let mut given = tensors(&problem);
        given.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &s.out(), grad_o.clone()).unwrap());
        let got = run(name, &parse(options), &given);
        let decision = chosen(name, options, &x);
        let exact = Exact { mask: decision.mask(), ..Exact::default() };
        let want = exact.backward(&x, &wide, None, |_, _| ()).unwrap();
        for (grad, want) in [("grad.q", &want.q), ("grad.k", &want.k), ("grad.v", &want.v)] {
            assert_close(
                &format!("{name} {grad}"),
                got.f32(grad).unwrap().unwrap().1,
                want,
                Tol::ScaledMax(1e-5),
            );
        }
    }
}

fn chosen(name: &str, options: &str, x: &attn_core::Qkv<'_>) -> attn_sparse::Decision {
    use attn_sparse::{BlockIndexer, Dsa, Moba, Routed};
    let size = |key: &str, default| parse(options).get_or(key, default).unwrap();
    match name {
        "moba" => Routed::new(Moba { chunk_len: size("chunk_len", 0), top_k: size("top_k", 0) }).decide(x),
        "dsa" => Routed::new(Dsa { top_k: size("top_k", 0), index_dim: None }).decide(x),
        _ => {
            let (block_len, top_k) = (size("block_len", 0), size("top_k", 0));
            Routed::new(BlockIndexer { block_len, top_k, local_blocks: 1, index_dim: None }).decide(x)
        }
    }
    .unwrap()
}
