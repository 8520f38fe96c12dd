//! Decoding from a million cached tokens: Quest's choice of pages, DeepSeek sparse attention's choice of tokens, and their
//! attention, and native sparse attention with its three branches, beside exact attention over the same cache in the same run;
//! and a cache that evicts.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{Problem, measure};
use attn_core::{AttnShape, Qkv, StreamShape, StreamState, Streaming, ViewMut};
use attn_flash::Flash;
use attn_flash::engine::Problem as Keys;
use attn_sparse::{
    Decided, Decider, Decision, Dsa, EvictionPolicy, KvEviction, Nsa, Quest, Router, SparseAttention,
};
use criterion::{Criterion, criterion_group, criterion_main};

fn chosen(c: &mut Criterion) {
    let quest = SparseAttention::new(Quest::default());
    for (head_dim, group) in [(64, 1), (64, 4), (128, 1), (128, 4)] {
        let n_kv = 1 << 20;
        let shape =
            AttnShape { n_heads_q: group, n_q: 1, n_kv, n_heads_kv: 1, ..AttnShape::square(1, 1, head_dim) };
        let problem = Problem::new(shape);
        let x = problem.qkv();
        let mut out = vec![0.0f32; shape.out().iter().product()];
        let name = format!("decode 1M d={head_dim} group={group}");
        let exact = measure(c, &name, "exact", 0, &mut || {
            let out = ViewMut::contiguous("out", &mut out, shape.out()).expect("the shape fits");
            Flash::causal().call().forward(Keys::batch(x), out.into(), None).expect("the case is valid");
        });
        let mut memory = quest.decider.memory(&StreamShape::of(&x)).expect("Quest has one");
        let mut step = || {
            // As after a token: the last page is new.
            memory.truncate(n_kv - 1);
            let decision = memory.decide(&x).expect("the case is valid");
            let out = ViewMut::contiguous("out", &mut out, shape.out()).expect("the shape fits");
            quest.attend_decided(&decision, x, out.into(), None).expect("the case is valid");
        };
        step(); // the bounds of the whole cache
        let pages = measure(c, &name, "quest", 0, &mut step);
        let dsa = Dsa { top_k: 2048, index_dim: None };
        let mut index = dsa.summary(&StreamShape::of(&x)).expect("the sizes are served");
        dsa.append(&mut index, x.k());
        let tokens = measure(c, &name, "dsa", 0, &mut || {
            let chosen = dsa.choose(&index, x.q(), &shape).expect("the case is valid");
            let decision = Decision::row_by_row(chosen);
            let attention = SparseAttention::new(Decided(decision.clone()));
            let out = ViewMut::contiguous("out", &mut out, shape.out()).expect("the shape fits");
            attention.attend_decided(&decision, x, out.into(), None).expect("the case is valid");
        });
        let mut stream = Nsa::default().stream(StreamShape::of(&x)).expect("the sizes are served");
        stream.append_keys(x.k().narrow(0..n_kv - 1), x.v().narrow(0..n_kv - 1)).expect("the rows fit");
        let last = Qkv::new(*x.q(), x.k().narrow(n_kv - 1..n_kv), x.v().narrow(n_kv - 1..n_kv));
        let last = last.expect("the rows fit");
        // Each token makes the cache longer, by next to nothing.
        let branches = measure(c, &name, "nsa", 0, &mut || {
            let out = ViewMut::contiguous("out", &mut out, shape.out()).expect("the shape fits");
            stream.append(last, out.into()).expect("the rows fit");
        });
        for (what, chosen) in [("quest", pages), ("dsa", tokens), ("nsa", branches)] {
            if let (Some(exact), Some(chosen)) = (exact, chosen) {
                let times = exact / chosen;
                println!("{name}: exact {:.2} ms, {what} {:.2} ms, {times:.1}x", 1e3 * exact, 1e3 * chosen);
            }
        }
    }
}

fn eviction(c: &mut Criterion) {
    let shape = AttnShape::square(1, 4096, 64);
    let problem = Problem::new(shape);
    let x = problem.qkv();
    let part = |rows: std::ops::Range<usize>| {
        Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows))
            .expect("the rows fit")
    };
    let mut out = vec![0.0f32; 2048 * 64];
    for (name, policy) in [
        ("h2o", EvictionPolicy::h2o(256, 512)),
        ("tova", EvictionPolicy::tova(512)),
        ("snapkv", EvictionPolicy::snap_kv(32, 5, 512)),
        ("streaming-llm", EvictionPolicy::streaming_llm(4, 512)),
    ] {
        let mut state = KvEviction::new(policy).start(StreamShape::of(&x)).expect("it streams");
        let mut append = |rows: std::ops::Range<usize>| {
            let part = part(rows);
            let rows = &mut out[..part.shape().rows() * part.shape().head_dim_v];
            let out = ViewMut::contiguous("out", rows, part.shape().out()).expect("the shape fits");
            state.append(part, out.into()).expect("the rows fit");
        };
        append(0..2048);
        let seconds = measure(c, "evict to 512 of 64", name, 0, &mut || append(2048..2304));
        if let Some(seconds) = seconds {
            println!("{name}: {:.2} microseconds a token", 1e6 * seconds / 256.0);
        }
    }
}

criterion_group!(benches, chosen, eviction);
criterion_main!(benches);
