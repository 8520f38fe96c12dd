//! Trains the byte-level language model whose weights the repository ships.
//!
//! Stage 1 learns from short contexts (512, 1024, then 2048 bytes; three stretches of four from Rust sources, the
//! others from the books); stage 2 (`--from`) continues on contexts of 4k to 32k bytes and predicts the last 2048 of
//! each, so that the global layer learns to tell what it seeks from many thousand other keys. Both are deterministic:
//! the same texts, options and machine give the same weights. The shipped weights were made by
//!
//! ```text
//! export RAYON_NUM_THREADS=1 BOOKS="--text war_and_peace.txt --text tinyshakespeare.txt"
//! train_lm $BOOKS --seed 1 --steps 5000 --stop-after 4200 --out 1.safetensors
//! train_lm $BOOKS --seed 2 --steps 400 --stop-after 100 --learning-rate 4e-4 --from 1.safetensors --out 2.safetensors
//! train_lm $BOOKS --seed 3 --steps 100 --learning-rate 6e-4 --from 2.safetensors --out 3.safetensors
//! train_lm $BOOKS --seed 4 --steps 400 --learning-rate 4e-4 --from 3.safetensors --out bytelm.safetensors
//! ```
//!
//! and `model/README.md` says what came out. Without a directory among the texts the Rust sources are those in the
//! cargo registry. The weights are written every 100 steps. `--evaluate FILE` trains nothing and prints the table of
//! losses of given weights.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use attn_lab::lm::{ByteLm, Config, Weights, text};
use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Crates that the model never sees in training, so that its loss on them is honest.
const HELD_OUT: &[&str] = &["aho-corasick-", "csv-", "indicatif-", "itertools-", "rayon-"];
/// Crates of generated bindings: millions of near-identical lines.
const GENERATED: &[&str] = &["libc-", "linux-raw-sys-", "r-efi-", "winapi", "windows", "wasi", "wit-"];
/// Larger source files are mostly tables.
const MAX_FILE_BYTES: u64 = 200_000;
/// Share of every single-file text, at its end, that is kept for evaluation.
const HELD_OUT_SHARE: f64 = 0.05;
/// Contexts of the second stage, each as often as the others, and the bytes predicted at the end of each.
const LONG_CONTEXTS: &[usize] = &[4096, 8192, 16_384, 32_768];
const LONG_TARGETS: usize = 2048;
/// Context lengths of the table at the end.
const GATE_LENGTHS: &[usize] = &[512, 1024, 2048, 4096, 8192, 16_384];

/// `steps` sets the pace of the schedules; `stop_after` and `minutes` end the run before them.
struct Options {
    texts: Vec<PathBuf>,
    steps: usize,
    stop_after: usize,
    minutes: f64,
    seed: u64,
    bytes_per_step: usize,
    learning_rate: f64,
    out: PathBuf,
    from: Option<PathBuf>,
    evaluate: Option<PathBuf>,
}

impl Options {
    fn from_args() -> Outcome<Self> {
        let mut options = Self {
            texts: Vec::new(),
            steps: 5000,
            stop_after: usize::MAX,
            minutes: f64::INFINITY,
            seed: 0,
            bytes_per_step: 4096,
            learning_rate: 3e-3,
            out: PathBuf::from("bytelm.safetensors"),
            from: None,
            evaluate: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--text" => options.texts.push(PathBuf::from(value)),
                "--steps" => options.steps = value.parse()?,
                "--stop-after" => options.stop_after = value.parse()?,
                "--minutes" => options.minutes = value.parse()?,
                "--seed" => options.seed = value.parse()?,
                "--bytes-per-step" => options.bytes_per_step = value.parse()?,
                "--learning-rate" => options.learning_rate = value.parse()?,
                "--out" => options.out = PathBuf::from(value),
                "--from" => options.from = Some(PathBuf::from(value)),
                "--evaluate" => options.evaluate = Some(PathBuf::from(value)),
                _ => return Err(format!("unknown option {flag}").into()),
            }
        }
        Ok(options)
    }
}

/// The texts to learn from and the share of steps' stretches taken from each.
struct Corpus {
    parts: Vec<Vec<u8>>,
    held_out: Vec<Vec<u8>>,
}

impl Corpus {
    /// Books (files) and Rust sources (directories of crates; by default the cargo registry).
    fn read(texts: &[PathBuf]) -> Outcome<Self> {
        let mut corpus = Self { parts: vec![Vec::new()], held_out: vec![Vec::new()] };
        let (dirs, books): (Vec<_>, Vec<_>) = texts.iter().cloned().partition(|path| path.is_dir());
        let dirs = if dirs.is_empty() { text::default_dirs()? } else { dirs };
        for path in dirs.iter().map(|dir| text::files(dir, &["rs"])).collect::<Result<Vec<_>, _>>()?.concat()
        {
            if std::fs::metadata(&path)?.len() > MAX_FILE_BYTES || path_has(&path, GENERATED) {
                continue;
            }
            let part = if path_has(&path, HELD_OUT) { &mut corpus.held_out[0] } else { &mut corpus.parts[0] };
            part.extend(std::fs::read(&path)?);
        }
        for book in &books {
            let mut bytes = std::fs::read(book)?;
            let end = bytes.split_off((bytes.len() as f64 * (1.0 - HELD_OUT_SHARE)) as usize);
            corpus.parts.push(bytes);
            corpus.held_out.push(end);
        }
        Ok(corpus)
    }

    /// `batch` stretches of `len` bytes: three of four from the sources, the others from the books by their size.
    fn draw(&self, rng: &mut ChaCha8Rng, batch: usize, len: usize) -> Vec<u8> {
        let mut drawn = Vec::with_capacity(batch * len);
        let mut below = |n: usize| (rng.next_u64() % n.max(1) as u64) as usize;
        for _ in 0..batch {
            let books: usize = self.parts[1..].iter().map(Vec::len).sum();
            let mut part = &self.parts[0];
            if books > 0 && below(4) == 0 {
                let mut place = below(books);
                for book in &self.parts[1..] {
                    if place < book.len() {
                        part = book;
                        break;
                    }
                    place -= book.len();
                }
            }
            let start = below(part.len() - len);
            drawn.extend(&part[start..start + len]);
        }
        drawn
    }
}

fn path_has(path: &Path, prefixes: &[&str]) -> bool {
    let names = path.components().filter_map(|name| name.as_os_str().to_str());
    names.into_iter().any(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
}

/// Short contexts first: most of what there is to learn is near, and near is cheap.
fn context(progress: f64) -> usize {
    match progress {
        p if p < 0.15 => 512,
        p if p < 0.45 => 1024,
        p if p < 0.85 => 2048,
        _ => 4096,
    }
}

fn learning_rate(peak: f64, step: usize, steps: usize) -> f64 {
    let warm_up = (step as f64 + 1.0) / 100.0;
    let cosine = 0.5 + 0.5 * (std::f64::consts::PI * step as f64 / steps as f64).cos();
    peak * warm_up.min(0.02 + 0.98 * cosine)
}

/// Scales all gradients so that together they are no longer than `limit`.
fn clip(grads: &mut GradStore, vars: &[Var], limit: f64) -> Outcome<f64> {
    let mut square = 0.0;
    for var in vars {
        if let Some(grad) = grads.get(var) {
            square += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let norm = square.sqrt();
    if norm > limit {
        for var in vars {
            if let Some(grad) = grads.remove(var) {
                grads.insert(var, grad.affine(limit / norm, 0.0)?);
            }
        }
    }
    Ok(norm)
}

/// Prints the gate table for the held-out sources and for the held-out ends of the books.
fn evaluate(model: &ByteLm, corpus: &Corpus) -> Outcome<()> {
    let books = corpus.held_out[1..].concat();
    for (name, text) in [("Rust sources", &corpus.held_out[0]), ("books", &books)] {
        println!("held-out {name}\nn       exact   removed  window");
        let lengths = GATE_LENGTHS.iter().copied().filter(|n| *n < text.len()).collect::<Vec<_>>();
        for row in model.gate(text, &lengths)? {
            println!("{:<7} {:.4}  {:.4}   {:.4}", row.n, row.exact_loss, row.removed_loss, row.window_loss);
        }
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let options = Options::from_args()?;
    let corpus = Corpus::read(&options.texts)?;
    let sizes = |parts: &[Vec<u8>]| parts.iter().map(Vec::len).collect::<Vec<_>>();
    println!("bytes to learn from {:?}, held out {:?}", sizes(&corpus.parts), sizes(&corpus.held_out));

    if let Some(path) = &options.evaluate {
        return evaluate(&ByteLm::load(path)?, &corpus);
    }

    let (config, start_weights) = match &options.from {
        Some(path) => ByteLm::load(path).map(|model| (model.config().clone(), model.weights().clone()))?,
        None => (Config::shipped(), Weights::random(&Config::shipped(), options.seed)?),
    };
    let vars = start_weights.iter().map(|(name, tensor)| Ok((name.to_string(), Var::from_tensor(tensor)?)));
    let vars = vars.collect::<Outcome<Vec<_>>>()?;
    let model = ByteLm::new(config, vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone())).collect())?;
    println!("{} parameters", model.weights().count());

    let is_matrix = |var: &Var| var.dims().len() == 2;
    let vars = vars.into_iter().map(|(_, var)| var).collect::<Vec<_>>();
    let (matrices, vectors): (Vec<_>, Vec<_>) = vars.iter().cloned().partition(is_matrix);
    let adam = |weight_decay| ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay };
    let mut optimisers = [AdamW::new(matrices, adam(0.05))?, AdamW::new(vectors, adam(0.0))?];

    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let start = Instant::now();
    let mut mean = 0.0;
    for step in 0..options.steps.min(options.stop_after) {
        let n = match options.from {
            Some(_) => LONG_CONTEXTS[(rng.next_u64() % LONG_CONTEXTS.len() as u64) as usize],
            None => context(step as f64 / options.steps as f64),
        };
        let loss = if options.from.is_some() {
            model.long_context_loss(&corpus.draw(&mut rng, 1, n + 1), LONG_TARGETS)?
        } else {
            let batch = (options.bytes_per_step / n).max(1);
            model.training_loss(&corpus.draw(&mut rng, batch, n + 1), batch)?
        };
        let mut grads = loss.backward()?;
        let norm = clip(&mut grads, &vars, 1.0)?;
        for optimiser in &mut optimisers {
            optimiser.set_learning_rate(learning_rate(options.learning_rate, step, options.steps));
            optimiser.step(&grads)?;
        }
        let loss = f64::from(loss.to_scalar::<f32>()?);
        mean = if step == 0 { loss } else { 0.98 * mean + 0.02 * loss };
        let out_of_time = start.elapsed() > Duration::from_secs_f64((options.minutes * 60.0).min(1e9));
        if step % 20 == 0 {
            let seconds = start.elapsed().as_secs_f64();
            println!("step {step} n {n} loss {loss:.4} mean {mean:.4} norm {norm:.2} {seconds:.0} s");
        }
        if step % 100 == 99 || step + 1 == options.steps.min(options.stop_after) || out_of_time {
            model.save(&options.out)?;
        }
        if out_of_time {
            break;
        }
    }
    evaluate(&ByteLm::load(&options.out)?, &corpus)
}
