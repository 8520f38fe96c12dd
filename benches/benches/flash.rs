//! Exact attention: share of the FMA peak forward and backward, and the factor over what candle users have (matmul, softmax,
//! matmul; candle-nn's CPU flash attention) in the same run.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{
    Problem, Setting, backward, candle_attention, candle_nn_attention, causal_mask, forward, forward_stored,
    measure,
};
use attn_core::AttnShape;
use attn_core::simd::Isa;
use attn_core::tile::Bf16Dot;
use attn_flash::{Flash, HalfProducts, Naive};
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};

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

/// Half types: widened to f32, and bf16 multiplied as it is. Native products do up to twice the f32 peak.
fn halves(c: &mut Criterion) {
    let with = |half_products, flash| Flash { half_products, ..flash };
    for head_dim in [64, 128] {
        let problem = Problem::new(AttnShape::square(1, 4096, head_dim));
        for (name, flash) in [("full", Flash::full()), ("causal", Flash::causal())] {
            for threads in [1, 2] {
                let at = Setting::threads(threads);
                let name = |what: &str| format!("flash {what} {name} d={head_dim} n=4096");
                let widen = with(HalfProducts::Widen, flash);
                forward_stored::<bf16>(c, &name("bf16 widened"), &widen, &problem, at);
                forward_stored::<f16>(c, &name("f16 widened"), &widen, &problem, at);
                if Bf16Dot::detect().is_some() {
                    let native = with(HalfProducts::Native, flash);
                    forward_stored::<bf16>(c, &name("bf16 native"), &native, &problem, at);
                }
            }
        }
    }
}

/// Many short sequences, and grouped heads.
fn other_shapes(c: &mut Criterion) {
    let short = AttnShape { batch: 32, ..AttnShape::square(64, 128, 64) };
    let grouped = AttnShape { n_heads_q: 8, n_heads_kv: 2, ..AttnShape::square(1, 2048, 64) };
    for (name, shape) in [("batch 32, 64 heads, n=128", short), ("8 heads on 2, n=2048", grouped)] {
        let problem = Problem::new(shape);
        for threads in [1, 2] {
            forward(
                c,
                &format!("flash causal {name}"),
                &Flash::causal(),
                &problem,
                Setting::threads(threads),
            );
        }
    }
}

/// Counted as 2.5 times the forward pass: five products instead of two.
fn gradients(c: &mut Criterion) {
    for head_dim in [64, 128] {
        let problem = Problem::new(AttnShape::square(1, 4096, head_dim));
        for (name, flash) in [("full", Flash::full()), ("causal", Flash::causal())] {
            for threads in [1, 2] {
                let name = format!("flash backward {name} d={head_dim} n=4096");
                backward(c, &name, &flash, &problem, Setting::threads(threads));
            }
        }
    }
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
        let mut softmax = || drop(pool.install(|| candle_attention(&q, &k, &v, mask)).expect("candle's"));
        let mut nn =
            || drop(pool.install(|| candle_nn_attention(&q, &k, &v, mask.is_some())).expect("candle's"));
        let peers: [(&str, &mut dyn FnMut()); 2] =
            [("matmul, softmax, matmul", &mut softmax), ("candle-nn cpu flash attention", &mut nn)];
        for (peer, once) in peers {
            let theirs = measure(c, &name, peer, 0, once);
            if let (Some(theirs), Some(ours)) = (theirs, ours) {
                let factor = theirs / ours;
                println!(
                    "{name}: {peer} {theirs:.4} s, ours {ours:.4} s: {factor:.1} times faster (1 thread)"
                );
            }
        }
    }
}

criterion_group!(benches, shares, halves, other_shapes, gradients, against_candle);
criterion_main!(benches);
