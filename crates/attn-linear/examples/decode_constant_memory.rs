//! Decoding with constant memory: tokens one by one over a long run, from a state of fixed size.
//!
//! ```text
//! cargo run --release -p attn-linear --example decode_constant_memory
//! ```
//!
//! One layer of a model with 16 heads of 64. What is remembered after any number of tokens is the same few bytes, and a token
//! takes the same time; a key/value cache of the same model is what the last column says. Every fifth of the run is a line. At the
//! end the same tokens go through in one pass, and the last outputs are compared.
#![allow(clippy::print_stdout)]

use attn_core::{Attention, DType, Qkv, Result, StreamShape, StreamState, Streaming, View, ViewMut};
use attn_linear::recurrent::{GatedDeltaNet, Gla, Mamba2};
use attn_linear::{LinearAttention, matrix_state::StateVariant};
use std::time::{Duration, Instant};

const HEADS: usize = 16;
const HEAD_DIM: usize = 64;
const TOKENS: usize = 20_000;
const LINES: usize = 5;
const ROW: usize = HEADS * HEAD_DIM;

/// A token's queries, keys or values `(1, HEADS, 1, HEAD_DIM)`: numbers that look random.
fn token(at: usize, seed: usize) -> Vec<f32> {
    (0..ROW).map(|c| (((at * ROW + c) * 3 + seed) as f32 * 0.618_034).sin()).collect()
}

fn qkv<'a>(rows: &'a [Vec<f32>; 3], n: usize) -> Result<Qkv<'a>> {
    // Tokens one after the other, as a model makes them: read where they lie.
    let strides = [n * ROW, HEAD_DIM, ROW, 1];
    let [q, k, v] = [("q", 0), ("k", 1), ("v", 2)]
        .map(|(name, at)| View::new(name, &rows[at][..], [1, HEADS, n, HEAD_DIM], strides));
    Qkv::new(q?, k?, v?)
}

fn decode<V: StateVariant>(attention: &LinearAttention<V>) -> Result<()> {
    println!("\n{}", V::SUMMARY);
    println!("    tokens | us a token | state, bytes | key/value cache, bytes");
    let shape = StreamShape {
        batch: 1,
        n_heads_q: HEADS,
        n_heads_kv: HEADS,
        head_dim: HEAD_DIM,
        head_dim_v: HEAD_DIM,
        dtype: DType::F32,
    };
    let mut stream: Box<dyn StreamState> = attention.start(shape)?;
    let (mut out, mut spent) = (vec![0.0; ROW], Duration::ZERO);
    for at in 0..TOKENS {
        let rows = [token(at, 1), token(at, 2), token(at, 3)];
        let view = ViewMut::contiguous("out", &mut out, [1, HEADS, 1, HEAD_DIM])?;
        let start = Instant::now();
        stream.append(qkv(&rows, 1)?, view.into())?;
        spent += start.elapsed();
        if (at + 1) % (TOKENS / LINES) == 0 {
            let micros = spent.as_secs_f64() * 1e6 / (TOKENS / LINES) as f64;
            let cache = 2 * (at + 1) * ROW * size_of::<f32>();
            println!("{:10} | {micros:10.1} | {:12} | {cache}", stream.len(), stream.bytes());
            spent = Duration::ZERO;
        }
    }
    // The same in one pass.
    let all = [1, 2, 3].map(|seed| (0..TOKENS).flat_map(|at| token(at, seed)).collect::<Vec<f32>>());
    let mut whole = vec![0.0; TOKENS * ROW];
    let strides = [TOKENS * ROW, HEAD_DIM, ROW, 1];
    let view = ViewMut::new("out", &mut whole, [1, HEADS, TOKENS, HEAD_DIM], strides)?;
    let start = Instant::now();
    attention.forward(qkv(&all, TOKENS)?, view.into())?;
    let micros = start.elapsed().as_secs_f64() * 1e6 / TOKENS as f64;
    let last = &whole[(TOKENS - 1) * ROW..];
    let largest = last.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let apart = out.iter().zip(last).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    println!("in one pass {micros:.1} us a token; the last outputs differ by {apart:.1e} of the largest");
    Ok(())
}

fn main() -> Result<()> {
    println!("{HEADS} heads of {HEAD_DIM}, f32; {} threads.", rayon_threads());
    decode(&LinearAttention::<GatedDeltaNet>::configured([])?)?;
    decode(&LinearAttention::<Gla>::configured([])?)?;
    decode(&LinearAttention::<Mamba2>::configured([])?)
}

fn rayon_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
