//! Decoding on tensors from contiguous and paged caches.

use super::naive::{max_difference, random};
use attn_core::candle::CandleAttention;
use attn_core::candle::candle_core::{Result, Tensor, Var};
use attn_flash::Flash;
use attn_flash::cache::{CacheKind, CacheShape, KvCache, PagedKvCache};

/// How far rounding may lead.
const KINDS: [(CacheKind, f32); 4] =
    [(CacheKind::F32, 1e-6), (CacheKind::F16, 3e-3), (CacheKind::Bf16, 2e-2), (CacheKind::Int8, 2e-2)];
const SHAPE: CacheShape = CacheShape { batch: 2, n_heads_kv: 2, head_dim: 16, head_dim_v: 8 };

fn rows(t: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    t.narrow(2, start, len)
}

#[test]
fn a_cache_gives_what_one_pass_gives() -> Result<()> {
    let (q, k, v) = (random((2, 4, 20, 16))?, random((2, 2, 20, 16))?, random((2, 2, 20, 8))?);
    let want = Flash::causal().forward_t(&q, &k, &v)?;
    let call = Flash::causal().call();
    for (kind, bound) in KINDS {
        let mut cache = KvCache::new(SHAPE, kind)?;
        for (start, len) in [(0, 13), (13, 1), (14, 1), (15, 5)] {
            cache.append_t(&rows(&k, start, len)?, &rows(&v, start, len)?)?;
            let got = call.attend_cache_t(&rows(&q, start, len)?, &cache)?;
            let error = max_difference(&got, &rows(&want, start, len)?)?;
            assert!(error < bound, "{kind:?} from {start}: {error}");
        }
        assert_eq!(cache.len(), 20);
    }
    Ok(())
}

#[test]
fn pages_give_what_each_sequence_gives_alone() -> Result<()> {
    let (q, k, v) = (random((2, 4, 20, 16))?, random((2, 2, 20, 16))?, random((2, 2, 20, 8))?);
    let one = |t: &Tensor, b: usize| t.narrow(0, b, 1);
    // The second sequence is shorter; its query is its own last token.
    let lens = [20, 7];
    for (kind, bound) in KINDS {
        let mut cache = PagedKvCache::new(SHAPE, kind, 4)?;
        let sequences = [cache.add(), cache.add()];
        let (mut queries, mut want) = (Vec::new(), Vec::new());
        for b in [1, 0] {
            let len = lens[b];
            let (q, k, v) = (one(&q, b)?, one(&k, b)?, one(&v, b)?);
            for start in (0..len).step_by(3) {
                let n = 3.min(len - start);
                cache.append_t(sequences[b], &rows(&k, start, n)?, &rows(&v, start, n)?)?;
            }
            let whole =
                Flash::causal().forward_t(&rows(&q, 0, len)?, &rows(&k, 0, len)?, &rows(&v, 0, len)?)?;
            queries.push(rows(&q, len - 1, 1)?);
            want.push(rows(&whole, len - 1, 1)?);
        }
        let table = cache.table(&[sequences[1], sequences[0]])?;
        let call = Flash::causal().call();
        let got = call.attend_pages_t(&Tensor::cat(&queries, 0)?, &cache, &table)?;
        let error = max_difference(&got, &Tensor::cat(&want, 0)?)?;
        assert!(error < bound, "{kind:?}: {error}");
    }
    Ok(())
}

#[test]
fn gradients_are_refused_not_dropped() -> Result<()> {
    let (k, v) = (random((2, 2, 3, 16))?, random((2, 2, 3, 8))?);
    let q = Var::from_tensor(&random((2, 4, 3, 16))?)?;
    let mut cache = KvCache::new(SHAPE, CacheKind::F32)?;
    cache.append_t(&k, &v)?;
    let error = |out: Tensor| out.sum_all().unwrap().backward().unwrap_err().to_string();
    let cached = error(Flash::causal().call().attend_cache_t(&q, &cache)?);
    assert!(cached.contains("cache"), "{cached}");
    let streamed = error(Flash::causal().stream_t(&q, &k, &v)?.append_t(&q, &k, &v)?);
    assert!(streamed.contains("stream"), "{streamed}");
    Ok(())
}

#[test]
fn what_does_not_fit_a_cache_is_named() -> Result<()> {
    let mut cache = KvCache::new(SHAPE, CacheKind::F32)?;
    let (k, v) = (random((2, 2, 3, 16))?, random((2, 2, 3, 8))?);
    let error = |r: Result<()>| r.unwrap_err().to_string();
    assert!(error(cache.append_t(&k, &k)).contains("v: width is 16"));
    assert!(error(cache.append_t(&random((2, 3, 3, 16))?, &v)).contains("k: n_heads_kv is 3"));
    assert!(error(cache.append_t(&k.t()?, &v)).starts_with("k"));
    assert!(error(cache.append_t(&k.squeeze(0)?.flatten(0, 1)?, &v)).contains("k's shape"));
    assert_eq!(cache.len(), 0, "nothing was appended");
    cache.append_t(&k, &v)?;
    let q = random((2, 5, 1, 16))?;
    let found = Flash::causal().call().attend_cache_t(&q, &cache).unwrap_err().to_string();
    assert!(found.contains("n_heads_q") && found.contains('5'), "{found}");
    Ok(())
}
