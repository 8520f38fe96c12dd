//! Decoding from a key/value cache: contiguous and paged, in f32, bf16 and int8, and as candle does it.
//!
//! ```text
//! cargo run --release -p attn-flash --example decode
//! ```
//!
//! One layer's attention of a model with 32 query heads of 128 on 8 key/value heads: a prompt goes into the cache, then
//! tokens come one by one, each appended and attended against all that came before. What each way gives is compared with
//! one causal pass over everything in f32.
#![allow(clippy::print_stdout)]

use attn_core::candle::CandleAttention;
use attn_flash::Flash;
use attn_flash::cache::{CacheKind, CacheShape, KvCache, PagedKvCache};
use candle_core::{Device, Result, Tensor};
use candle_nn::ops;
use std::time::{Duration, Instant};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const PROMPT: usize = 8192;
const TOKENS: usize = 32;
const PAGE: usize = 64;
const SHAPE: CacheShape =
    CacheShape { batch: 1, n_heads_kv: KV_HEADS, head_dim: HEAD_DIM, head_dim_v: HEAD_DIM };

/// The queries, keys and values of prompt and tokens, `(1, heads, PROMPT + TOKENS, HEAD_DIM)`.
struct Input {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Input {
    fn random() -> Result<Self> {
        let tensor = |heads| Tensor::randn(0f32, 1.0, (1, heads, PROMPT + TOKENS, HEAD_DIM), &Device::Cpu);
        Ok(Self { q: tensor(HEADS)?, k: tensor(KV_HEADS)?, v: tensor(KV_HEADS)? })
    }

    /// Keys and values of some positions: views, nothing is copied.
    fn kv(&self, start: usize, len: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.k.narrow(2, start, len)?, self.v.narrow(2, start, len)?))
    }

    /// `step(q, k, v)` for every token after the prompt, their outputs, and the time they took.
    fn decode(
        &self,
        mut step: impl FnMut(Tensor, Tensor, Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Duration)> {
        let start = Instant::now();
        let mut outputs = Vec::with_capacity(TOKENS);
        for at in PROMPT..PROMPT + TOKENS {
            let (k, v) = self.kv(at, 1)?;
            outputs.push(step(self.q.narrow(2, at, 1)?, k, v)?);
        }
        let time = start.elapsed();
        Ok((Tensor::cat(&outputs, 2)?, time))
    }
}

/// Prints a line of the table.
fn report(name: &str, bytes: usize, (out, time): (Tensor, Duration), want: &Tensor) -> Result<()> {
    let difference = (out - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    let rate = TOKENS as f64 / time.as_secs_f64();
    let read = bytes as f64 * rate / 1e9;
    println!("{name:28} | {rate:8.0} | {:8.1} | {read:8.1} | {difference:10.1e}", bytes as f64 / 1e6);
    Ok(())
}

/// candle-nn's cache, then repeated heads, matmul, softmax, matmul.
fn by_candle(input: &Input) -> Result<(usize, (Tensor, Duration))> {
    let mut cache = candle_nn::kv_cache::KvCache::new(2, PROMPT + TOKENS);
    let (k, v) = input.kv(0, PROMPT)?;
    cache.append(&k.contiguous()?, &v.contiguous()?)?;
    let repeated = |t: &Tensor| -> Result<Tensor> {
        let (b, h, n, d) = t.dims4()?;
        t.unsqueeze(2)?.broadcast_as((b, h, HEADS / KV_HEADS, n, d))?.reshape((b, HEADS, n, d))
    };
    let decoded = input.decode(|q, k, v| {
        let (k, v) = cache.append(&k.contiguous()?, &v.contiguous()?)?;
        let scores = (q.contiguous()?.matmul(&repeated(&k)?.t()?)? * (HEAD_DIM as f64).powf(-0.5))?;
        ops::softmax_last_dim(&scores)?.matmul(&repeated(&v)?)
    })?;
    Ok((2 * KV_HEADS * (PROMPT + TOKENS) * HEAD_DIM * size_of::<f32>(), decoded))
}

fn contiguous(input: &Input, kind: CacheKind) -> Result<(usize, (Tensor, Duration))> {
    let mut cache = KvCache::with_capacity(SHAPE, kind, PROMPT + TOKENS)?;
    let (k, v) = input.kv(0, PROMPT)?;
    cache.append_t(&k, &v)?;
    let call = Flash::causal().call();
    let decoded = input.decode(|q, k, v| {
        cache.append_t(&k, &v)?;
        call.attend_cache_t(&q, &cache)
    })?;
    Ok((cache.bytes(), decoded))
}

fn paged(input: &Input, kind: CacheKind) -> Result<(usize, (Tensor, Duration))> {
    let mut cache = PagedKvCache::with_pages(SHAPE, kind, PAGE, (PROMPT + TOKENS).div_ceil(PAGE))?;
    let sequence = cache.add();
    let (k, v) = input.kv(0, PROMPT)?;
    cache.append_t(sequence, &k, &v)?;
    let call = Flash::causal().call();
    let decoded = input.decode(|q, k, v| {
        cache.append_t(sequence, &k, &v)?;
        call.attend_pages_t(&q, &cache, &cache.table(&[sequence])?)
    })?;
    Ok((cache.bytes(), decoded))
}

/// Sequences of four lengths share the pages of one cache and decode together; tokens a second of all of them.
fn four_sequences(input: &Input) -> Result<()> {
    let lengths = [PROMPT, PROMPT / 2, PROMPT / 8, 100];
    let pages = lengths.iter().map(|n| (n + TOKENS).div_ceil(PAGE)).sum();
    let mut cache = PagedKvCache::with_pages(SHAPE, CacheKind::Int8, PAGE, pages)?;
    let mut sequences = Vec::new();
    for len in lengths {
        let sequence = cache.add();
        let (k, v) = input.kv(0, len)?;
        cache.append_t(sequence, &k, &v)?;
        sequences.push(sequence);
    }
    let call = Flash::causal().call();
    let (_, time) = input.decode(|q, k, v| {
        for sequence in &sequences {
            cache.append_t(*sequence, &k, &v)?;
        }
        let together = Tensor::cat(&vec![q; lengths.len()], 0)?;
        call.attend_pages_t(&together, &cache, &cache.table(&sequences)?)?.narrow(0, 0, 1)
    })?;
    println!(
        "\nFour sequences of {lengths:?} keys in one paged int8 cache of {:.1} MB: {:.0} tokens/s together.",
        cache.bytes() as f64 / 1e6,
        (lengths.len() * TOKENS) as f64 / time.as_secs_f64()
    );
    Ok(())
}

fn main() -> Result<()> {
    let input = Input::random()?;
    println!(
        "{HEADS} query heads of {HEAD_DIM} on {KV_HEADS} key/value heads, {PROMPT} keys cached, then {TOKENS} tokens one by one;"
    );
    println!(
        "{} threads; the difference is from one causal pass in f32.\n",
        candle_core::utils::get_num_threads()
    );
    // The last queries against everything: the same rows as those of a pass over all queries.
    let last = input.q.narrow(2, PROMPT, TOKENS)?;
    let want = Flash::causal().forward_t(&last, &input.k, &input.v)?;
    println!("cache                        | tokens/s | MB held  |  GB read |    largest");
    println!("                             |          |          | a second | difference");
    let (bytes, decoded) = by_candle(&input)?;
    report("f32, candle-nn and matmul", bytes, decoded, &want)?;
    for (name, kind) in [("f32", CacheKind::F32), ("bf16", CacheKind::Bf16), ("int8", CacheKind::Int8)] {
        let (bytes, decoded) = contiguous(&input, kind)?;
        report(name, bytes, decoded, &want)?;
        let (bytes, decoded) = paged(&input, kind)?;
        report(&format!("{name}, pages of {PAGE}"), bytes, decoded, &want)?;
    }
    four_sequences(&input)
}
