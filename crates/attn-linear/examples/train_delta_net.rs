//! Trains a small gated-delta-net block to recall: pairs of a key and a value are shown, then keys alone, and the value that
//! belongs to each is asked for.
//!
//! ```text
//! cargo run --release -p attn-linear --example train_delta_net
//! ```
//!
//! Queries, keys, values, decays, write strengths and the memory that every sequence starts with are all learned through
//! `loss.backward()`. Beside it the same block with plain linear attention in its place, which cannot overwrite.
#![allow(clippy::print_stdout)]

use attn_core::registry::find;
use attn_linear::recurrent::GatedDeltaNet;
use attn_linear::typed::{GatedDelta, Plain};
use attn_linear::{Linear, LinearAttention, TensorState};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{
    AdamW, Embedding, Init, Linear as Dense, Module, Optimizer, ParamsAdamW, RmsNorm, VarBuilder, VarMap,
    embedding, linear, linear_no_bias, loss, ops, rms_norm,
};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::time::{Duration, Instant};

const STEPS: usize = 150;
const BATCH: usize = 32;
/// Keys are the tokens `0..SYMBOLS`, values those behind them.
const SYMBOLS: usize = 8;
const PAIRS: usize = 12;
const ASKED: usize = 6;
const WIDTH: usize = 64;
const HEADS: usize = 2;
const HEAD_DIM: usize = 32;

/// What stands where attention would.
#[derive(Clone, Copy, PartialEq)]
enum Mixer {
    GatedDelta,
    Linear,
}

struct Block {
    embedding: Embedding,
    /// What the token before was: a value has to know its key.
    shifted: Dense,
    q: Dense,
    k: Dense,
    v: Dense,
    decay: Dense,
    beta: Dense,
    start: Tensor,
    /// Of what each head has read.
    norm: RmsNorm,
    out: Dense,
    head: Dense,
    mixer: Mixer,
}

impl Block {
    fn new(vb: VarBuilder<'_>, mixer: Mixer) -> Result<Self> {
        let inner = HEADS * HEAD_DIM;
        let dense = |name: &str, to| linear_no_bias(WIDTH, to, vb.pp(name));
        Ok(Self {
            embedding: embedding(2 * SYMBOLS, WIDTH, vb.pp("embedding"))?,
            shifted: dense("shifted", WIDTH)?,
            q: dense("q", inner)?,
            k: dense("k", inner)?,
            v: dense("v", inner)?,
            decay: linear(WIDTH, HEADS, vb.pp("decay"))?,
            beta: linear(WIDTH, HEADS, vb.pp("beta"))?,
            start: vb.get_with_hints((1, HEADS, HEAD_DIM, HEAD_DIM), "start", Init::Const(0.0))?,
            norm: rms_norm(HEAD_DIM, 1e-5, vb.pp("norm"))?,
            out: linear_no_bias(inner, WIDTH, vb.pp("out"))?,
            head: dense("head", 2 * SYMBOLS)?,
            mixer,
        })
    }

    /// `tokens (batch, n)` to logits `(batch, n, 2 SYMBOLS)`.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, n) = tokens.dims2()?;
        let x = self.embedding.forward(tokens)?;
        let before = x.narrow(1, 0, n - 1)?.pad_with_zeros(1, 1, 0)?;
        let x = (&x + self.shifted.forward(&before)?)?;
        let rows = |layer: &Dense| layer.forward(&x)?.reshape((batch, n, HEADS, HEAD_DIM))?.transpose(1, 2);
        let (q, k, v) = (rows(&self.q)?, rows(&self.k)?, rows(&self.v)?);
        let initial = self.start.broadcast_as((batch, HEADS, HEAD_DIM, HEAD_DIM))?.contiguous()?;
        let state = TensorState::new([("initial_state", initial)]);
        let mixed = match self.mixer {
            Mixer::GatedDelta => {
                let gates = |layer: &Dense| layer.forward(&x)?.transpose(1, 2);
                // A natural log of a number in (0, 1), near 0 at first.
                let log_decay = (ops::sigmoid(&(gates(&self.decay)? - 4.0)?)? * -1.0)?;
                let beta = ops::sigmoid(&gates(&self.beta)?)?;
                let attention = LinearAttention::<GatedDeltaNet>::configured([("scale", "1")])?;
                attention
                    .on_tensors(GatedDelta { q, k, v, log_decay, beta })
                    .initial_state(&state)
                    .forward()?
            }
            Mixer::Linear => {
                let attention = LinearAttention::<Linear>::configured([("causal", "true")])?;
                attention.on_tensors(Plain { q, k, v }).initial_state(&state).forward()?
            }
        };
        // `forward_diff`: its faster sibling drops gradients without a word.
        let mixed = self.norm.forward_diff(&mixed.transpose(1, 2)?.contiguous()?)?;
        let mixed = mixed.reshape((batch, n, HEADS * HEAD_DIM))?;
        self.head.forward(&(x + self.out.forward(&mixed)?)?)
    }
}

/// A batch: `tokens (BATCH, n)`, the places where a value is asked for, and that value.
fn recall(rng: &mut ChaCha8Rng) -> Result<(Tensor, Vec<usize>, Tensor)> {
    let n = 2 * PAIRS + ASKED;
    let (mut tokens, mut wanted) = (Vec::with_capacity(BATCH * n), Vec::with_capacity(BATCH * ASKED));
    for _ in 0..BATCH {
        // Keys come again with another value: the last one counts.
        let mut held = [None; SYMBOLS];
        for _ in 0..PAIRS {
            let (key, value) = (rng.random_range(0..SYMBOLS), rng.random_range(0..SYMBOLS));
            held[key] = Some(value);
            tokens.extend([key as u32, (SYMBOLS + value) as u32]);
        }
        let mut known: Vec<usize> = (0..SYMBOLS).filter(|key| held[*key].is_some()).collect();
        known.shuffle(rng);
        for key in known.iter().cycle().take(ASKED) {
            tokens.push(*key as u32);
            wanted.extend(held[*key].map(|value| (SYMBOLS + value) as u32));
        }
    }
    let places = (2 * PAIRS..n).collect();
    Ok((Tensor::from_vec(tokens, (BATCH, n), &Device::Cpu)?, places, Tensor::new(wanted, &Device::Cpu)?))
}

struct Run {
    block: Block,
    optimiser: AdamW,
    time: Duration,
}

impl Run {
    /// The same weights for the same seed.
    fn new(mixer: Mixer, seed: u64) -> Result<Self> {
        let variables = VarMap::new();
        let block = Block::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu), mixer)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut named: Vec<(String, Var)> = {
            let variables = variables.data().lock().expect("nobody panicked with it");
            variables.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
        };
        named.sort_by(|a, b| a.0.cmp(&b.0));
        for (_, var) in named.iter().filter(|(_, var)| var.rank() == 2) {
            let scale = (var.dims()[1] as f32).powf(-0.5);
            let numbers = (0..var.elem_count()).map(|_| scale * rng.sample::<f32, _>(StandardNormal));
            var.set(&Tensor::from_vec(numbers.collect::<Vec<_>>(), var.dims(), &Device::Cpu)?)?;
        }
        let params = ParamsAdamW { lr: 5e-3, weight_decay: 0.0, ..ParamsAdamW::default() };
        let optimiser = AdamW::new(named.into_iter().map(|(_, var)| var).collect(), params)?;
        Ok(Self { block, optimiser, time: Duration::ZERO })
    }

    /// The loss in nats an asked value, and the share that was right.
    fn step(&mut self, tokens: &Tensor, places: &[usize], wanted: &Tensor) -> Result<(f32, f32)> {
        let start = Instant::now();
        let logits = self.block.forward(tokens)?.narrow(1, places[0], places.len())?;
        let logits = logits.reshape((BATCH * places.len(), 2 * SYMBOLS))?;
        let loss = loss::cross_entropy(&logits, wanted)?;
        self.optimiser.backward_step(&loss)?;
        self.time += start.elapsed();
        let right = logits.argmax(D::Minus1)?.eq(wanted)?.to_dtype(DType::F32)?.mean_all()?;
        Ok((loss.to_scalar()?, right.to_scalar()?))
    }
}

fn main() -> Result<()> {
    let [delta, linear] = ["gated-deltanet", "linear"]
        .map(|name| find(&attn_linear::registry(), name).map(|entry| entry.summary));
    println!("{}\nbeside\n{}\n", delta?, linear?);
    println!(
        "{HEADS} heads of {HEAD_DIM}; {PAIRS} pairs of {SYMBOLS} keys and values, {ASKED} keys asked for; batches of {BATCH}; AdamW.\n"
    );
    println!("step | gated delta rule | linear attention");
    println!("     |   loss    right  |   loss    right");
    let (mut delta, mut linear) = (Run::new(Mixer::GatedDelta, 1)?, Run::new(Mixer::Linear, 1)?);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for step in 0..STEPS {
        let (tokens, places, wanted) = recall(&mut rng)?;
        let (a, b) = (delta.step(&tokens, &places, &wanted)?, linear.step(&tokens, &places, &wanted)?);
        if step % 15 == 0 || step + 1 == STEPS {
            println!("{step:4} | {:7.4}  {:6.1}% | {:7.4}  {:6.1}%", a.0, 100.0 * a.1, b.0, 100.0 * b.1);
        }
    }
    let ms = |run: &Run| run.time.as_secs_f64() * 1e3 / STEPS as f64;
    println!(
        "\nA step takes {:.1} ms with the gated delta rule, {:.1} ms with linear attention.",
        ms(&delta),
        ms(&linear)
    );
    let learned = delta.block.start.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
    println!("The memory that sequences start with has grown from 0 to a norm of {learned:.3}.");
    Ok(())
}
