//! The model against an independent forward pass in f64, and its promises about length, causality and bad input.

mod attention;
mod byte_lm;
mod gradients;
mod llama;
mod naive;
mod stories;
mod text;

use super::{ByteLm, Config, Weights};

/// Small, but with every kind of layer, and no size equal to another.
fn tiny_config() -> Config {
    Config {
        d_model: 20,
        n_heads: 2,
        head_dim: 6,
        d_ff: 28,
        n_layers: 4,
        global_layer: 2,
        window: 8,
        rope_theta: 100.0,
        norm_eps: 1e-5,
    }
}

fn tiny(seed: u64) -> ByteLm {
    ByteLm::new(tiny_config(), Weights::random(&tiny_config(), seed).unwrap()).unwrap()
}

/// Bytes without a pattern, the same ones for the same seed.
fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// Numbers between −1 and 1 without a pattern.
fn noise_f32(n: usize, seed: u64) -> Vec<f32> {
    noise(4 * n, seed)
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| i32::from_le_bytes(*b) as f32 / i32::MAX as f32)
        .collect()
}

/// Panics at the first number that is further off than f32 arithmetic in a small model explains.
#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        // `<=` is false for NaN, so NaN fails.
        assert!((got - want).abs() <= 2e-5 + 2e-5 * want.abs(), "{what}[{i}]: got {got:e}, want {want:e}");
    }
}
