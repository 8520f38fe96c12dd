//! Caches: quantisation, chunking, capacity, pages; streams on them.

use attn_core::{Attention, AttnShape, Qkv, StreamShape, View, ViewMut};
use attn_flash::Flash;
use attn_flash::cache::{CacheKind, CacheShape, Kept, KvCache, PagedKvCache};
use attn_flash::engine::KvView;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;

fn rows(n: usize, width: usize, seed: u64) -> Vec<f32> {
    inputs::Problem::normal(AttnShape::square(1, n, width), seed).k
}

const SHAPE: CacheShape = CacheShape { batch: 1, n_heads_kv: 1, head_dim: 16, head_dim_v: 16 };

fn int8(cache: &KvCache) -> (Vec<i8>, Vec<f32>) {
    let (KvView::Int8 { data, scales, .. }, _) = cache.views().unwrap() else { panic!("not int8") };
    let (data, scales) = (data.head(0, 0), scales.head(0, 0));
    (data.iter().flatten().copied().collect(), scales.iter().flatten().copied().collect())
}

#[test]
fn quantisation_errs_by_half_a_scale_at_most() {
    let mut x = rows(50, 16, 1);
    x[..16].fill(0.0);
    x[16..32].iter_mut().for_each(|x| *x *= 1e-38);
    x[32..48].iter_mut().for_each(|x| *x *= 1e37);
    let mut cache = KvCache::new(SHAPE, CacheKind::Int8).unwrap();
    let view = View::contiguous("x", &x, [1, 1, 50, 16]).unwrap();
    cache.append(view, view).unwrap();
    let (data, scales) = int8(&cache);
    for (t, row) in x.chunks(16).enumerate() {
        let max = row.iter().fold(0.0f64, |max, x| max.max(f64::from(x.abs())));
        let scale = f64::from(scales[t]);
        assert!((scale - max / 127.0).abs() <= 1e-7 * max + 1.5e-45, "row {t}: {scale:e}");
        for (x, q) in row.iter().zip(&data[t * 16..]) {
            let error = (f64::from(*x) - scale * f64::from(*q)).abs();
            // The scale itself is rounded to f32.
            assert!(error <= 0.5 * scale + 2e-7 * max + 2e-43, "row {t}: {x:e} as {q}, scale {scale:e}");
        }
        assert!(max == 0.0 || data[t * 16..][..16].iter().any(|q| q.unsigned_abs() >= 126), "row {t}");
    }
}

#[test]
fn capacity_truncation_and_refusals() {
    let x = rows(8, 16, 2);
    let view = |n| View::contiguous("x", &x[..n * 16], [1, 1, n, 16]).unwrap();
    let mut fixed = KvCache::with_capacity(SHAPE, CacheKind::F16, 5).unwrap();
    assert_eq!(fixed.bytes(), 2 * 5 * 16 * 2);
    fixed.append(view(4), view(4)).unwrap();
    let error = fixed.append(view(2), view(2)).unwrap_err().to_string();
    assert!(error.contains('6') && error.contains("capacity 5") && fixed.len() == 4, "{error}");
    fixed.truncate(1);
    fixed.append(view(4), view(4)).unwrap();
    assert_eq!((fixed.len(), fixed.capacity()), (5, 5));
    fixed.clear();
    assert!(fixed.is_empty());
    assert!(fixed.append(view(2), view(3)).unwrap_err().to_string().contains("v: length is 3, expected 2"));
    let narrow = View::contiguous("x", &x[..8], [1, 1, 1, 8]).unwrap();
    assert!(fixed.append(narrow, view(1)).unwrap_err().to_string().contains("k: width is 8, expected 16"));
    assert!(KvCache::new(CacheShape { head_dim: 0, ..SHAPE }, CacheKind::F32).is_err());
}

#[test]
fn chunks_and_evictions_do_not_change_what_is_stored() {
    let x = rows(40, 16, 3);
    let all = View::contiguous("x", &x, [1, 1, 40, 16]).unwrap();
    let mut whole = KvCache::new(SHAPE, CacheKind::Int8).unwrap();
    whole.append(all, all).unwrap();
    let mut pieces = KvCache::new(SHAPE, CacheKind::Int8).unwrap();
    for (start, end) in [(0, 1), (1, 1), (1, 18), (18, 39), (39, 40)] {
        pieces.append(all.narrow(start..end), all.narrow(start..end)).unwrap();
    }
    assert_eq!(int8(&whole), int8(&pieces));
    pieces.keep(Kept { sinks: 3, last: Some(10) });
    let ((data, scales), (kept, kept_scales)) = (int8(&whole), int8(&pieces));
    assert_eq!(kept, [&data[..3 * 16], &data[30 * 16..]].concat());
    assert_eq!(kept_scales, [&scales[..3], &scales[30..]].concat());
}

#[test]
fn pages_are_taken_and_given_back() {
    let x = rows(20, 16, 4);
    let all = View::contiguous("x", &x, [1, 1, 20, 16]).unwrap();
    let mut cache = PagedKvCache::with_pages(SHAPE, CacheKind::Bf16, 4, 6).unwrap();
    let (a, b) = (cache.add(), cache.add());
    cache.append(a, all.narrow(0..9), all.narrow(0..9)).unwrap();
    cache.append(b, all.narrow(0..12), all.narrow(0..12)).unwrap();
    assert_eq!((cache.free_pages(), cache.len(a).unwrap(), cache.len(b).unwrap()), (0, 9, 12));
    cache.append(a, all.narrow(0..3), all.narrow(0..3)).unwrap();
    let error = cache.append(a, all.narrow(0..1), all.narrow(0..1)).unwrap_err().to_string();
    assert!(error.contains("pages needed") && cache.len(a).unwrap() == 12, "{error}");
    cache.truncate(a, 5).unwrap();
    assert_eq!(cache.free_pages(), 1);
    cache.remove(b).unwrap();
    assert_eq!(cache.free_pages(), 4);
    assert!(cache.remove(b).is_err() && cache.table(&[a, b]).is_err() && cache.append(b, all, all).is_err());
    let c = cache.add();
    assert!(c != b && cache.len(b).is_err(), "an old name does not reach the new sequence");
    cache.append(c, all.narrow(0..16), all.narrow(0..16)).unwrap();
    assert_eq!((cache.free_pages(), cache.is_empty()), (0, false));
}

#[test]
fn streams_equal_one_causal_pass_whatever_the_cache_and_the_chunks() {
    let shape = AttnShape { n_heads_q: 4, n_heads_kv: 2, batch: 2, ..AttnShape::square(1, 90, 24) };
    let data = inputs::Problem::normal(shape, 6);
    let x = data.qkv().unwrap();
    // Values are of size 1: an int8 number errs by up to 3 / 254, a score by about as much.
    let kinds =
        [(CacheKind::F32, 4e-6), (CacheKind::F16, 4e-3), (CacheKind::Bf16, 3e-2), (CacheKind::Int8, 6e-2)];
    for flash in [Flash::causal(), Flash { window_left: Some(7), ..Flash::causal() }] {
        let want: Vec<f64> = {
            let mut out = vec![0.0f32; shape.out().iter().product()];
            flash.forward(x, ViewMut::contiguous("out", &mut out, shape.out()).unwrap().into()).unwrap();
            out.into_iter().map(f64::from).collect()
        };
        for (kind, atol) in kinds {
            let mut streamed = Vec::new();
            for chunks in [vec![90], vec![1; 90], vec![33, 1, 1, 5, 50]] {
                let mut state = flash.start_with_cache(StreamShape::of(&x), kind).unwrap();
                let mut out = vec![f32::NAN; want.len()];
                let mut start = 0;
                for n in chunks {
                    let rows = start..start + n;
                    let cut = Qkv::new(
                        x.q().narrow(rows.clone()),
                        x.k().narrow(rows.clone()),
                        x.v().narrow(rows.clone()),
                    );
                    let strides = [4 * 90 * 24, 90 * 24, 24, 1];
                    let place = ViewMut::new("out", &mut out[start * 24..], [2, 4, n, 24], strides).unwrap();
                    state.append(cut.unwrap(), place.into()).unwrap();
                    start = rows.end;
                }
                assert!(state.len() == 90 && state.bytes() > 0);
                assert_close(&format!("{kind:?}"), &out, &want, Tol::AllClose { atol, rtol: 0.0 });
                streamed.push(out);
            }
            let first: Vec<f64> = streamed[0].iter().map(|x| f64::from(*x)).collect();
            for other in &streamed[1..] {
                assert_close("chunks", other, &first, Tol::AllClose { atol: 4e-6, rtol: 4e-6 });
            }
        }
    }
}
