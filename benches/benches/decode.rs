//! Decoding: one query a head against a long cache; share of the memory's read bandwidth, measured before and after.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{Problem, measure};
use attn_core::limits::{Level, read_bandwidth};
use attn_core::simd::Isa;
use attn_core::{AttnShape, ViewMut};
use attn_flash::Flash;
use attn_flash::cache::{CacheKind, CacheShape, KvCache};
use criterion::{Criterion, criterion_group, criterion_main};

fn decode(c: &mut Criterion) {
    let (n_heads_kv, n_kv, head_dim) = (8, 65536, 128);
    for kind in [CacheKind::F32, CacheKind::Bf16, CacheKind::F16, CacheKind::Int8] {
        for group in [1, 4] {
            let n_heads_q = n_heads_kv * group;
            let shape =
                AttnShape { n_q: 1, n_kv, n_heads_q, n_heads_kv, ..AttnShape::square(1, 1, head_dim) };
            let cache_shape = CacheShape { batch: 1, n_heads_kv, head_dim, head_dim_v: head_dim };
            let mut cache = KvCache::with_capacity(cache_shape, kind, n_kv).expect("a cache");
            let problem = Problem::new(shape);
            cache.append(*problem.qkv().k(), *problem.qkv().v()).expect("the rows fit");
            for threads in [1, 2] {
                let pool =
                    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
                let mut out = vec![0.0f32; shape.out().iter().product()];
                let mut once = || {
                    pool.install(|| {
                        let view = ViewMut::contiguous("out", &mut out, shape.out())?;
                        let queries = *problem.qkv().q();
                        Flash::causal().call().forward(cache.problem(queries)?, view.into(), None)
                    })
                    .expect("the case is valid");
                };
                let limit =
                    || read_bandwidth(Isa::current(), threads, Level::Memory).expect("the machine's limit");
                let before = limit();
                let name = format!("decode {kind:?} group={group}");
                let measured = measure(c, &name, &format!("{threads} threads"), 0, &mut once);
                let Some(seconds) = measured else { continue };
                let (limit, rate) = (before.max(limit()), cache.bytes() as f64 / seconds / 1e9);
                println!(
                    "{name}: {:.2} ms, {rate:.1} GB/s = {:.1} % of {limit:.1} ({threads} threads)",
                    1e3 * seconds,
                    100.0 * rate / limit
                );
            }
        }
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
