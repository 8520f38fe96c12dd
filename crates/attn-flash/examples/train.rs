//! Trains a small language model on this file twice, once with attention in candle's operations and once with ours.
//!
//! ```text
//! cargo run --release -p attn-flash --example train
//! ```
//!
//! Both start from the same weights and read the same text, so the losses have to agree. Attention is causal with grouped
//! heads, a learned sink for each head and rotary positions; all gradients come from `loss.backward()`.
#![allow(clippy::print_stdout)]

use attn_flash::Flash;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::rotary_emb::rope_slow;
use candle_nn::{
    AdamW, Embedding, Init, Linear, Module, Optimizer, ParamsAdamW, RmsNorm, VarBuilder, VarMap, embedding,
    linear_no_bias, loss, ops, rms_norm,
};
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::time::{Duration, Instant};

/// What is learned, byte by byte.
const TEXT: &str = include_str!("train.rs");
const STEPS: usize = 30;
const CONTEXT: usize = 768;
const LAYERS: usize = 2;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

/// `q (1, HEADS, n, HEAD_DIM)`, `k` and `v (1, KV_HEADS, n, HEAD_DIM)`, `sinks (HEADS)` -> `(1, HEADS, n, HEAD_DIM)`.
type Attention = fn(&Tensor, &Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn ours(q: &Tensor, k: &Tensor, v: &Tensor, sinks: &Tensor) -> Result<Tensor> {
    Flash::causal().call().on_tensors().sinks(sinks).forward_t(q, k, v)
}

/// The definition: the sink is one more score, whose weight goes nowhere.
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, sinks: &Tensor) -> Result<Tensor> {
    let n = q.dim(2)?;
    let repeated = |t: &Tensor| {
        let shape = (1, KV_HEADS, HEADS / KV_HEADS, n, HEAD_DIM);
        t.unsqueeze(2)?.broadcast_as(shape)?.reshape((1, HEADS, n, HEAD_DIM))
    };
    let scores = (q.contiguous()?.matmul(&repeated(k)?.t()?)? * (HEAD_DIM as f64).powf(-0.5))?;
    let hidden = (0..n * n).map(|at| if at % n > at / n { f32::NEG_INFINITY } else { 0.0 }).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(hidden, (n, n), q.device())?)?;
    let sinks = sinks.reshape((1, HEADS, 1, 1))?.broadcast_as((1, HEADS, n, 1))?;
    // `softmax_last_dim` would be faster and has no gradient.
    let weights = ops::softmax(&Tensor::cat(&[&scores, &sinks.contiguous()?], D::Minus1)?, D::Minus1)?;
    weights.narrow(D::Minus1, 0, n)?.contiguous()?.matmul(&repeated(v)?)
}

struct Layer {
    norms: [RmsNorm; 2],
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    sinks: Tensor,
}

impl Layer {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        let linear = |name: &str, from, to| linear_no_bias(from, to, vb.pp(name));
        Ok(Self {
            norms: [rms_norm(WIDTH, 1e-5, vb.pp("norm1"))?, rms_norm(WIDTH, 1e-5, vb.pp("norm2"))?],
            q: linear("q", WIDTH, HEADS * HEAD_DIM)?,
            k: linear("k", WIDTH, KV_HEADS * HEAD_DIM)?,
            v: linear("v", WIDTH, KV_HEADS * HEAD_DIM)?,
            out: linear("out", HEADS * HEAD_DIM, WIDTH)?,
            up: linear("up", WIDTH, 4 * WIDTH)?,
            down: linear("down", 4 * WIDTH, WIDTH)?,
            sinks: vb.get_with_hints(HEADS, "sinks", Init::Const(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor, [cos, sin]: [&Tensor; 2], attention: Attention) -> Result<Tensor> {
        let n = x.dim(1)?;
        // `forward_diff` and `rope_slow`: their faster siblings drop gradients without a word.
        let normed = self.norms[0].forward_diff(x)?;
        let heads =
            |layer: &Linear, heads| layer.forward(&normed)?.reshape((1, n, heads, HEAD_DIM))?.transpose(1, 2);
        let (q, k) = (heads(&self.q, HEADS)?, heads(&self.k, KV_HEADS)?);
        let (q, k) = (rope_slow(&q, cos, sin)?, rope_slow(&k, cos, sin)?);
        let attended = attention(&q, &k, &heads(&self.v, KV_HEADS)?, &self.sinks)?;
        let attended = attended.transpose(1, 2)?.reshape((1, n, HEADS * HEAD_DIM))?;
        let x = (x + self.out.forward(&attended)?)?;
        let inner = self.up.forward(&self.norms[1].forward_diff(&x)?)?.silu()?;
        x + self.down.forward(&inner)?
    }
}

struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    angles: [Tensor; 2],
    attention: Attention,
}

impl Model {
    fn new(vb: VarBuilder<'_>, attention: Attention) -> Result<Self> {
        let angle = |at: usize| {
            let (position, pair) = (at / (HEAD_DIM / 2), at % (HEAD_DIM / 2));
            position as f32 * 1000f32.powf(-2.0 * pair as f32 / HEAD_DIM as f32)
        };
        let angles = (0..CONTEXT * HEAD_DIM / 2).map(angle).collect();
        let angles = Tensor::from_vec(angles, (CONTEXT, HEAD_DIM / 2), vb.device())?;
        Ok(Self {
            embedding: embedding(256, WIDTH, vb.pp("embedding"))?,
            layers: (0..LAYERS).map(|l| Layer::new(vb.pp(l))).collect::<Result<_>>()?,
            norm: rms_norm(WIDTH, 1e-5, vb.pp("norm"))?,
            head: linear_no_bias(WIDTH, 256, vb.pp("head"))?,
            angles: [angles.cos()?, angles.sin()?],
            attention,
        })
    }

    /// The mean loss of `bytes[1..]`, each predicted from those before it, in nats.
    fn loss(&self, bytes: &[u8]) -> Result<Tensor> {
        let bytes = Tensor::new(bytes.iter().map(|b| u32::from(*b)).collect::<Vec<_>>(), &Device::Cpu)?;
        let n = bytes.dim(0)? - 1;
        let mut x = self.embedding.forward(&bytes.narrow(0, 0, n)?)?.unsqueeze(0)?;
        for layer in &self.layers {
            x = layer.forward(&x, self.angles.each_ref(), self.attention)?;
        }
        let logits = self.head.forward(&self.norm.forward_diff(&x.squeeze(0)?)?)?;
        loss::cross_entropy(&logits, &bytes.narrow(0, 1, n)?)
    }
}

/// A model, its optimiser, and the time its steps took.
struct Run {
    variables: VarMap,
    model: Model,
    optimiser: AdamW,
    time: Duration,
}

impl Run {
    /// The same weights for the same seed.
    fn new(attention: Attention, seed: u64) -> Result<Self> {
        let variables = VarMap::new();
        let model = Model::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu), attention)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for (name, var) in named(&variables) {
            // Norms start at one and sinks at zero; what multiplies starts small.
            if let [_, width] = var.dims() {
                let scale = if name.starts_with("embedding") { 0.5 } else { (*width as f32).powf(-0.5) };
                let numbers = (0..var.elem_count()).map(|_| scale * rng.sample::<f32, _>(StandardNormal));
                var.set(&Tensor::from_vec(numbers.collect::<Vec<_>>(), var.dims(), &Device::Cpu)?)?;
            }
        }
        let params = ParamsAdamW { lr: 4e-3, weight_decay: 0.0, ..ParamsAdamW::default() };
        let optimiser = AdamW::new(named(&variables).into_iter().map(|(_, var)| var).collect(), params)?;
        Ok(Self { variables, model, optimiser, time: Duration::ZERO })
    }

    fn step(&mut self, bytes: &[u8]) -> Result<f32> {
        let start = Instant::now();
        let loss = self.model.loss(bytes)?;
        self.optimiser.backward_step(&loss)?;
        self.time += start.elapsed();
        loss.to_scalar()
    }
}

/// Variables in the order of their names: a map has none.
fn named(variables: &VarMap) -> Vec<(String, Var)> {
    let variables = variables.data().lock().expect("nobody panicked with it");
    let mut named: Vec<_> = variables.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

fn main() -> Result<()> {
    println!(
        "{LAYERS} layers, {WIDTH} wide, {HEADS} query heads of {HEAD_DIM} on {KV_HEADS} key/value heads, learned sinks; bytes of this"
    );
    println!("file, {CONTEXT} at a time; AdamW; {} threads.\n", candle_core::utils::get_num_threads());
    println!("step | loss in nats a byte  | difference");
    println!("     |    naive       ours  |");
    let (mut naive, mut ours) = (Run::new(naive, 1)?, Run::new(ours, 1)?);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let text = TEXT.as_bytes();
    for step in 0..STEPS {
        let first = rng.random_range(0..text.len() - CONTEXT);
        let bytes = &text[first..=first + CONTEXT];
        let losses = [naive.step(bytes)?, ours.step(bytes)?];
        if step % 3 == 0 || step + 1 == STEPS {
            let [a, b] = losses;
            println!("{step:4} | {a:9.5}  {b:9.5} | {:9.1e}", (a - b).abs());
        }
    }
    let ms = |run: &Run| run.time.as_secs_f64() * 1e3 / STEPS as f64;
    println!(
        "\nA step takes {:.1} ms with the naive attention, {:.1} ms with ours ({:.1} times as fast).",
        ms(&naive),
        ms(&ours),
        ms(&naive) / ms(&ours)
    );
    let mut furthest = (0.0, String::new());
    for ((name, a), (_, b)) in named(&naive.variables).into_iter().zip(named(&ours.variables)) {
        let difference = (a.as_tensor() - b.as_tensor())?.abs()?.max_all()?.to_scalar::<f32>()?;
        if difference > furthest.0 {
            furthest = (difference, name);
        }
    }
    println!("After {STEPS} steps the weights differ by at most {:.1e} (in {}).", furthest.0, furthest.1);
    for (name, var) in named(&ours.variables).iter().filter(|(name, _)| name.ends_with("sinks")) {
        println!("{name}: {:.3?}", var.to_vec1::<f32>()?);
    }
    Ok(())
}
