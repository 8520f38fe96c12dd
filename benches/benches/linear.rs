//! Linear attention and its relatives, shares of limits measured in the same run: forward and backward of the FMA peak, decoding
//! of the time to read the states once; and the factor over the same chunks in candle's tensor operations.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{Problem, Setting, backward, forward, measure};
use attn_core::candle::CandleAttention;
use attn_core::limits::{Level, read_bandwidth};
use attn_core::registry::Options;
use attn_core::simd::Isa;
use attn_core::{Attention, AttnShape, StreamShape, ViewMut};
use candle_core::{Device, Result, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};

/// A variant of each class: no decay, a decay a token, a key channel, and the delta rule with each.
const VARIANTS: [&str; 6] = ["linear", "simple-gla", "gla", "deltanet", "gated-deltanet", "kda"];
const HEAD_DIM: usize = 64;
/// Chunks of the peer, which likes them longer than ours.
const CHUNKS: [usize; 2] = [64, 128];
/// Tokens that are decoded one after another before the pool's threads are left.
const TOKENS: usize = 20;

fn variant(name: &str) -> Box<dyn Attention> {
    let registry = attn_linear::registry();
    let entry = registry.iter().find(|entry| entry.name == name).expect("a registered variant");
    let has_causal = entry.options.iter().any(|option| option.name == "causal");
    let options = if has_causal { Options::new().with("causal", true) } else { Options::new() };
    entry.build(&options).expect("the defaults build")
}

/// One head, in cache and from memory; then as many heads as threads, and one head on all of them.
fn lengths(c: &mut Criterion) {
    for n in [4096, 65536, 1 << 20] {
        let problem = Problem::new(AttnShape::square(1, n, HEAD_DIM));
        for name in VARIANTS {
            for threads in [1, 2] {
                forward(c, &format!("{name} n={n}"), &*variant(name), &problem, Setting::threads(threads));
            }
        }
    }
    let problem = Problem::new(AttnShape::square(8, 65536, HEAD_DIM));
    for name in VARIANTS {
        for threads in [1, 2] {
            let name_of = format!("{name} 8 heads n=65536");
            forward(c, &name_of, &*variant(name), &problem, Setting::threads(threads));
        }
    }
}

/// Counted as 2.5 times the forward pass.
fn gradients(c: &mut Criterion) {
    let problem = Problem::new(AttnShape::square(2, 4096, HEAD_DIM));
    for name in ["linear", "simple-gla", "gla", "deltanet", "kda"] {
        for threads in [1, 2] {
            let name_of = format!("{name} backward 2 heads n=4096");
            backward(c, &name_of, &*variant(name), &problem, Setting::threads(threads));
        }
    }
}

/// One token for 32 heads whose states are 128 x 128; a decoding loop stays on the pool's threads.
fn decode(c: &mut Criterion) {
    let shape = AttnShape::square(32, 1, 128);
    let problem = Problem::new(shape);
    for name in VARIANTS {
        let attention = variant(name);
        let streaming = attention.as_streaming().expect("a variant that streams");
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            let mut state = streaming.start(StreamShape::of(&problem.qkv())).expect("a state");
            let mut out = vec![0.0f32; shape.out().iter().product()];
            let mut once = || {
                pool.install(|| {
                    (0..TOKENS).try_for_each(|_| {
                        let view = ViewMut::contiguous("out", &mut out, shape.out())?;
                        state.append(problem.qkv(), view.into())
                    })
                })
                .expect("the case is valid");
            };
            let limit =
                || read_bandwidth(Isa::current(), threads, Level::Memory).expect("the machine's limit");
            let before = limit();
            let name = format!("decode {name} 32 heads 128x128");
            let Some(seconds) = measure(c, &name, &format!("{threads} threads"), 0, &mut once) else {
                continue;
            };
            let seconds = seconds / TOKENS as f64;
            let (limit, bytes) = (before.max(limit()), state.bytes() as f64);
            let streamed = bytes / limit / 1e9;
            println!(
                "{name}: {:.1} us, {:.2} times the {:.1} us that reading the states takes ({threads} threads)",
                1e6 * seconds,
                seconds / streamed,
                1e6 * streamed
            );
        }
    }
}

/// The same chunks in tensor operations: `O = tril(Q K^T) V + Q S`, `S <- S + K^T V`.
fn chunks(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, lower: &Tensor) -> Result<Tensor> {
    let (batch, heads, n, d) = q.dims4()?;
    let chunk = lower.dim(0)?;
    let mut state = Tensor::zeros((batch, heads, d, v.dim(3)?), q.dtype(), q.device())?;
    let mut out = Vec::new();
    for at in (0..n).step_by(chunk) {
        let [q, k, v] = [q, k, v].map(|x| x.narrow(2, at, chunk).and_then(|x| x.contiguous()));
        let (q, k, v) = (q?, k?, v?);
        let turned = k.t()?.contiguous()?;
        let within = q.matmul(&turned)?.broadcast_mul(lower)?.matmul(&v)?;
        out.push(((within + q.matmul(&state)?)? * scale)?);
        state = (state + turned.matmul(&v)?)?;
    }
    Tensor::cat(&out, 2)
}

fn against_candle(c: &mut Criterion) {
    let lower = |chunk: usize| {
        let ones = (0..chunk * chunk).map(|x| if x % chunk <= x / chunk { 1.0f32 } else { 0.0 });
        Tensor::from_vec::<_, f32>(ones.collect(), (chunk, chunk), &Device::Cpu).expect("a mask")
    };
    let linear = attn_linear::LinearAttention::new(attn_linear::Linear {
        causal: true,
        ..attn_linear::Linear::default()
    });
    for n in [4096, 65536] {
        let problem = Problem::new(AttnShape::square(8, n, HEAD_DIM));
        let (q, k, v) = problem.tensors().expect("candle tensors");
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            let name = format!("candle tensors n={n} {threads} threads");
            let mut once = || drop(pool.install(|| linear.forward_t(&q, &k, &v)).expect("ours"));
            let ours = measure(c, &name, "attn-linear", 0, &mut once);
            let scale = 1.0 / (HEAD_DIM as f64).sqrt();
            for chunk in CHUNKS {
                let lower = lower(chunk);
                let mut peer = || drop(pool.install(|| chunks(&q, &k, &v, scale, &lower)).expect("candle's"));
                let theirs = measure(c, &name, &format!("chunks of {chunk}"), 0, &mut peer);
                if let (Some(theirs), Some(ours)) = (theirs, ours) {
                    println!(
                        "{name}: chunks of {chunk} {theirs:.4} s, ours {ours:.4} s: {:.1} times faster",
                        theirs / ours
                    );
                }
            }
        }
    }
}

criterion_group!(benches, lengths, gradients, decode, against_candle);
criterion_main!(benches);
