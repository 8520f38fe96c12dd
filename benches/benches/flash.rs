//! Exact attention: share of the FMA peak, and the factor over candle's matmul, softmax, matmul in the same run.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{Problem, Setting, candle_attention, causal_mask, forward, measure};
use attn_core::AttnShape;
use attn_core::simd::Isa;
use attn_flash::{Flash, Naive};
use criterion::{Criterion, criterion_group, criterion_main};

fn shares(c: &mut Criterion) {
    for head_dim in [64, 128] {
        for n in [4096, 16384] {
            let problem = Problem::new(AttnShape::square(1, n, head_dim));
            for (name, flash) in [("full", Flash::full()), ("causal", Flash::causal())] {
                let name = format!("flash {name} d={head_dim} n={n}");
                forward(c, &name, &flash, &problem, Setting::threads(1));
                forward(c, &name, &flash, &problem, Setting::threads(2));
            }
        }
    }
    let problem = Problem::new(AttnShape::square(1, 4096, 64));
    for isa in Isa::available() {
        forward(c, &format!("flash full {isa}"), &Flash::full(), &problem, Setting { threads: 1, isa });
    }
    forward(c, "naive full", &Naive::default(), &problem, Setting::threads(1));
}

fn against_candle(c: &mut Criterion) {
    let problem = Problem::new(AttnShape::square(1, 4096, 64));
    let (q, k, v) = problem.tensors().expect("candle tensors");
    let mask = causal_mask(4096).expect("a mask");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread pool");
    for (name, flash, mask) in [("full", Flash::full(), None), ("causal", Flash::causal(), Some(&mask))] {
        use attn_core::candle::CandleAttention;
        let name = format!("candle tensors {name}");
        let mut once = || drop(pool.install(|| flash.forward_t(&q, &k, &v)).expect("ours"));
        let ours = measure(c, &name, "attn-flash", 0, &mut once);
        let mut once = || drop(pool.install(|| candle_attention(&q, &k, &v, mask)).expect("candle's"));
        let theirs = measure(c, &name, "matmul, softmax, matmul", 0, &mut once);
        if let (Some(theirs), Some(ours)) = (theirs, ours) {
            let factor = theirs / ours;
            println!("{name}: candle {theirs:.4} s, ours {ours:.4} s: {factor:.1} times faster (1 thread)");
        }
    }
}

criterion_group!(benches, shares, against_candle);
criterion_main!(benches);
