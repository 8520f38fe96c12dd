//! Low-rank compositions: promises, gradients, and vectors computed by other people's packages.

use crate::differences;
use crate::golden_cases::{cases, check};
use attn_core::exact::Exact;
use attn_core::registry::{Options, find};
use attn_core::{Attention, AttnShape, ViewMut};
use attn_linear::low_rank::{Agent, Linformer, LowRankAttention, Nystrom};
use attn_linear::registry;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::inputs::Problem;

fn promises(name: &str, ranks: &[(&str, usize)]) {
    let entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    let configs: Vec<Options> = ranks.iter().map(|(key, rank)| Options::new().with(key, rank)).collect();
    conformance::check_with(&entry, &configs);
}

#[test]
fn linformer_keeps_its_promises() {
    promises("linformer", &[("rank", 1), ("rank", 7), ("rank", 16)]);
}

#[test]
fn nystromformer_keeps_its_promises() {
    promises("nystromformer", &[("landmarks", 1), ("landmarks", 3)]);
}

#[test]
fn agent_keeps_its_promises() {
    promises("agent", &[("agents", 1), ("agents", 7)]);
}

#[test]
fn gradients_equal_finite_differences() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 23, 4) };
    for (name, key) in [("linformer", "rank"), ("nystromformer", "landmarks"), ("agent", "agents")] {
        let entry = *find(&registry(), name).unwrap();
        for rank in [3, 5] {
            differences::check(&entry, &Options::new().with(key, rank), shape, 5);
        }
    }
}

#[test]
fn with_as_many_summaries_as_tokens_linformer_is_softmax_attention() {
    let problem = Problem::normal(AttnShape { batch: 2, ..AttnShape::square(2, 19, 8) }, 3);
    let x = problem.qkv().unwrap();
    let want = Exact::default().all(&x).unwrap().out;
    let run = |attention: &dyn Attention| {
        let mut out = vec![f32::NAN; want.len()];
        let view = ViewMut::contiguous("out", &mut out, x.shape().out()).unwrap();
        attention.forward(x, view.into()).unwrap();
        out
    };
    let linformer = LowRankAttention::new(Linformer { rank: 19, ..Linformer::default() });
    assert_close("linformer", &run(&linformer), &want, Tol::ScaledMax(1e-5));
    // The pseudo-inverse of the whole score matrix, once it has converged.
    let nystrom = LowRankAttention::new(Nystrom { landmarks: 19, steps: 25, ..Nystrom::default() });
    assert_close("nystromformer", &run(&nystrom), &want, Tol::ScaledMax(2e-3));
}

#[test]
fn one_agent_gives_all_queries_the_same() {
    let problem = Problem::normal(AttnShape::square(1, 12, 4), 3);
    let x = problem.qkv().unwrap();
    let mut out = vec![f32::NAN; 48];
    let agent = LowRankAttention::new(Agent { agents: 1, ..Agent::default() });
    agent.forward(x, ViewMut::contiguous("out", &mut out, [1, 1, 12, 4]).unwrap().into()).unwrap();
    let first: Vec<f64> = out[..4].iter().map(|x| f64::from(*x)).collect();
    out.chunks_exact(4).for_each(|row| assert_close("row", row, &first, Tol::ScaledMax(1e-6)));
}

#[test]
fn linformer_equals_its_package() {
    let cases = cases("linformer", "");
    assert_eq!(cases.len(), 4);
    cases.iter().for_each(|case| check(case, "linformer", &Options::new()));
}

#[test]
fn nystromformer_equals_its_packages() {
    let cases = cases("nystrom", "");
    assert_eq!(cases.len(), 5);
    for case in cases {
        let options = ["landmarks", "pinv_iters"]
            .iter()
            .fold(Options::new(), |options, name| options.with(name, &case.options[*name]));
        check(&case, "nystromformer", &options.with("init", "global"));
    }
}

#[test]
fn agent_equals_its_package() {
    let cases = cases("agent", "");
    assert_eq!(cases.len(), 2);
    cases.iter().for_each(|case| check(case, "agent", &Options::new()));
}
