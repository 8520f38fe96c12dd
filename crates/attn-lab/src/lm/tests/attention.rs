use candle_core::{Device, Tensor};

use super::{assert_close, noise_f32};
use crate::lm::attention::{causal_attention, window_attention};

/// `[heads, n, d]` in f64; query `i` is position `i + n_kv − n_q`.
fn naive(q: &[f32], k: &[f32], v: &[f32], heads: usize, d: usize, window: usize) -> Vec<f64> {
    let (n_q, n_kv) = (q.len() / heads / d, k.len() / heads / d);
    let at = |x: &[f32], n: usize, h: usize, i: usize, c: usize| f64::from(x[(h * n + i) * d + c]);
    let mut out = Vec::new();
    for h in 0..heads {
        for i in 0..n_q {
            let position = i + n_kv - n_q;
            let seen = (position + 1).saturating_sub(window)..position + 1;
            let weight = |j: usize| {
                let dot = (0..d).map(|c| at(q, n_q, h, i, c) * at(k, n_kv, h, j, c)).sum::<f64>();
                (dot / (d as f64).sqrt()).exp()
            };
            let sum = seen.clone().map(weight).sum::<f64>();
            for c in 0..d {
                out.push(seen.clone().map(|j| weight(j) * at(v, n_kv, h, j, c)).sum::<f64>() / sum);
            }
        }
    }
    out
}

fn tensor(x: &[f32], heads: usize, d: usize) -> Tensor {
    Tensor::from_slice(x, (heads, x.len() / heads / d, d), &Device::Cpu).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn window_attention_in_blocks_equals_naive() {
    let (heads, d) = (3, 4);
    for (n, window) in [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (24, 8), (31, 8), (12, 1), (20, 3)] {
        let [q, k, v] = [1, 2, 3].map(|seed| noise_f32(heads * n * d, seed));
        let [q_t, k_t, v_t] = [&q, &k, &v].map(|x| tensor(x, heads, d));
        let got = window_attention(&q_t, &k_t, &v_t, window).unwrap();
        assert_close(
            &format!("n {n}, window {window}"),
            &numbers(&got),
            &naive(&q, &k, &v, heads, d, window),
        );
    }
}

#[test]
fn causal_attention_in_blocks_equals_naive() {
    let (heads, d) = (2, 4);
    for (n_q, n_kv) in [(1, 1), (5, 5), (256, 256), (257, 257), (3, 300), (300, 301)] {
        let q = noise_f32(heads * n_q * d, 1);
        let [k, v] = [2, 3].map(|seed| noise_f32(heads * n_kv * d, seed));
        let got =
            causal_attention(&tensor(&q, heads, d), &tensor(&k, heads, d), &tensor(&v, heads, d)).unwrap();
        assert_close(&format!("{n_q} of {n_kv}"), &numbers(&got), &naive(&q, &k, &v, heads, d, usize::MAX));
    }
}

#[test]
fn more_queries_than_keys_is_an_error() {
    let (q, k) = (noise_f32(12, 1), noise_f32(8, 2));
    assert!(causal_attention(&tensor(&q, 1, 4), &tensor(&k, 1, 4), &tensor(&k, 1, 4)).is_err());
}
