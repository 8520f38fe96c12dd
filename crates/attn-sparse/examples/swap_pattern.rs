//! A candle attention module before and after its pattern is swapped: full causal attention, then a sliding window.
//!
//! ```text
//! cargo run --release -p attn-sparse --example swap_pattern
//! ```
//!
//! The module (projections with grouped heads, attention, output projection) holds its attention as a field, so that the
//! swap is one line where the module is made. Weights stay as they are. The example compares outputs and time, takes
//! gradients through the window, and decodes token by token with a cache that forgets what the window no longer sees.
#![allow(clippy::print_stdout)]

use attn_core::Attention;
use attn_core::candle::CandleAttention;
use attn_core::candle::candle_core::{Device, Result, Tensor, Var};
use attn_sparse::{SlidingWindow, SparseAttention};
use std::sync::Arc;
use std::time::Instant;

const WIDTH: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = WIDTH / HEADS;

/// The weights of the projections, `(width in, width out)`.
#[derive(Clone)]
struct Weights {
    q: Var,
    k: Var,
    v: Var,
    out: Var,
}

impl Weights {
    fn random(device: &Device) -> Result<Self> {
        let linear = |to| Var::randn(0f32, (WIDTH as f32).powf(-0.5), (WIDTH, to), device);
        let kv_width = KV_HEADS * HEAD_DIM;
        Ok(Self { q: linear(WIDTH)?, k: linear(kv_width)?, v: linear(kv_width)?, out: linear(WIDTH)? })
    }
}

struct SelfAttention {
    weights: Weights,
    attention: Arc<dyn Attention>,
}

impl SelfAttention {
    /// Queries, keys and values of `x (batch, length, width)`, each `(batch, heads, length, head width)`.
    fn heads(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, n, _) = x.dims3()?;
        let split = |layer: &Var, heads: usize| {
            x.broadcast_matmul(layer)?.reshape((batch, n, heads, HEAD_DIM))?.transpose(1, 2)
        };
        let Weights { q, k, v, .. } = &self.weights;
        Ok([split(q, HEADS)?, split(k, KV_HEADS)?, split(v, KV_HEADS)?])
    }

    fn joined(&self, attended: &Tensor) -> Result<Tensor> {
        attended.transpose(1, 2)?.flatten_from(2)?.broadcast_matmul(&self.weights.out)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads(x)?;
        self.joined(&self.attention.forward_t(&q, &k, &v)?)
    }

    /// The same, token by token; also says how many bytes the cache holds in the end.
    fn decode(&self, x: &Tensor) -> Result<(Tensor, usize)> {
        let [q, k, v] = self.heads(x)?;
        let mut stream = self.attention.stream_t(&q, &k, &v)?;
        let mut rows = Vec::new();
        for at in 0..x.dim(1)? {
            let of = |t: &Tensor| t.narrow(2, at, 1);
            rows.push(stream.append_t(&of(&q)?, &of(&k)?, &of(&v)?)?);
        }
        Ok((self.joined(&Tensor::cat(&rows, 2)?)?, stream.state().bytes()))
    }
}

/// The last `window` keys, the query's own included.
fn last(window: usize) -> Arc<dyn Attention> {
    Arc::new(SparseAttention::new(SlidingWindow::causal(window)))
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

fn main() -> Result<()> {
    let (device, window) = (Device::Cpu, 512);
    let weights = Weights::random(&device)?;
    let before = SelfAttention { weights: weights.clone(), attention: last(usize::MAX) };
    // The swap; the weights are the same.
    let after = SelfAttention { weights, attention: last(window) };

    println!("length   full causal   window of {window}   largest difference of outputs");
    for n in [256, 512, 2048, 8192] {
        let x = Tensor::randn(0f32, 1.0, (1, n, WIDTH), &device)?;
        let timed = |module: &SelfAttention| -> Result<(Tensor, f64)> {
            module.forward(&x)?;
            let start = Instant::now();
            Ok((module.forward(&x)?, 1e3 * start.elapsed().as_secs_f64()))
        };
        let ((full, full_ms), (windowed, window_ms)) = (timed(&before)?, timed(&after)?);
        let difference = largest_difference(&full, &windowed)?;
        println!("{n:6} {full_ms:10.1} ms {window_ms:12.1} ms   {difference:.2e}");
        let first = |t: &Tensor| t.narrow(1, 0, window.min(n));
        let same = largest_difference(&first(&full)?, &first(&windowed)?)?;
        assert!(same < 1e-4, "the first {window} positions see all earlier keys either way");
    }

    let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (1, 1024, WIDTH), &device)?)?;
    let loss = after.forward(&x)?.narrow(1, 1023, 1)?.sqr()?.sum_all()?;
    let grads = loss.backward()?;
    let reached = grads.get(&x).map(|grad| grad.abs()?.sum(2)?.squeeze(0)?.to_vec1::<f32>()).transpose()?;
    let first = reached.as_ref().and_then(|rows| rows.iter().position(|row| *row > 0.0)).unwrap_or(1024);
    println!("\nThe last of 1024 outputs depends on inputs from position {first} on, says its gradient.");

    let x = Tensor::randn(0f32, 1.0, (1, 2048, WIDTH), &device)?;
    for (name, module) in [("full causal", &before), ("windowed", &after)] {
        let (decoded, bytes) = module.decode(&x)?;
        let apart = largest_difference(&decoded, &module.forward(&x)?)?;
        println!(
            "Decoding 2048 tokens, {name}: {:5} KiB of cache, {apart:.0e} from the prefill.",
            bytes / 1024
        );
    }
    Ok(())
}
