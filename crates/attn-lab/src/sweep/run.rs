//! The sweep from start to end: length by length, what may run is measured, the rest says why not.

use super::args::{Opened, Sweep};
use super::case::{Case, Outcome, Row};
use super::chosen::{Chosen, Demand, choose};
use super::environment::Environment;
use super::gate::Gate;
use super::journal::Journal;
use super::plan::{self, Budget, Rate};
use super::rounds::{self, Conditions, Observer, Point};
use super::sample::Sample;
use super::source::{Source, convert};
use super::spreadsheet;
use crate::machine::Machine;
use crate::measure::Policy;
use crate::{LabError, Result, memory, pool, tensors};
use attn_core::limits::{self, Limits};
use attn_core::simd::Isa;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Share of the budget that the gate may take.
const GATE_SHARE: f64 = 0.15;

/// All that is known at the end of a sweep.
pub struct Finished {
    /// One row a case, in the order of lengths, then variants.
    pub rows: Vec<Row>,
    /// The gate, for the language model.
    pub gate: Option<Gate>,
    /// The circumstances.
    pub environment: Environment,
    /// Rows taken from earlier results.
    pub known: usize,
}

/// Sweeps, and leaves `results.jsonl`, `results.csv`, `env.json` and, for the language model, `gate.json` in the
/// sweep's folder. `program` serves points: the program `attn`.
///
/// # Errors
/// [`LabError`] for arguments and inputs that cannot be used, and for a folder that cannot be written. Results written
/// so far stay.
pub fn run(sweep: &Sweep, program: &Path) -> Result<Finished> {
    sweep.check()?;
    let (lengths, opened) = sweep.open()?;
    let source = opened.source();
    let demand = Demand { causal: !sweep.bidirectional, dtype: sweep.dtype, shape: source.shape(1) };
    let (chosen, left_out) = choose(&sweep.variants, &sweep.set, &demand)?;

    std::fs::create_dir_all(&sweep.out).map_err(|e| LabError::io("create", &sweep.out, e))?;
    let journal = Journal::open(&sweep.out.join("results.jsonl"), sweep.fresh)?;

    let started = Instant::now();
    let budget = sweep.budget();
    let limits = Limits::measure(Isa::current(), sweep.threads())?;
    let mut environment = Environment::new(Machine::detect(), limits, source.describe(), sweep.seed, &budget);
    environment.left_out = left_out;
    let env_file = sweep.out.join("env.json");
    environment.write(&env_file)?;

    let bar = progress_bar(lengths.len() * chosen.len());
    let mut run = Run {
        sweep,
        program,
        source,
        chosen: &chosen,
        rates: HashMap::new(),
        progress: Progress { journal, bar, rows: HashMap::new() },
        peak_gflops: limits.fma_gflops,
        cpu: environment.machine.cpu.clone(),
        optimised: environment.machine.optimised,
        budget,
        started,
        known: 0,
    };
    // The gate comes last, and must not find the budget empty.
    let points_end = match opened {
        Opened::Lm(_) => budget.total.mul_f64(1.0 - GATE_SHARE),
        Opened::Other(_) => budget.total,
    };
    let mut keys = Vec::new();
    for &n in &lengths {
        keys.extend(run.length(n, points_end)?);
    }
    let (known, Progress { bar, mut rows, .. }) = (run.known, run.progress);
    let rows: Vec<Row> = keys.iter().filter_map(|key| rows.remove(key)).collect();
    spreadsheet::write(&sweep.out.join("results.csv"), &rows)?;

    let gate = match &opened {
        Opened::Lm(text) => {
            bar.set_message("quality gate of the language model");
            let time = budget.total.saturating_sub(started.elapsed()).max(budget.total.mul_f64(GATE_SHARE));
            let path = sweep.out.join("gate.json");
            let gate =
                pool::with_threads(sweep.threads(), None, || Gate::open(&path, text, &lengths, time))??;
            Some(gate)
        }
        Opened::Other(_) => None,
    };
    bar.finish_and_clear();
    environment.fma_gflops_after = Some(limits::fma_peak(Isa::current(), sweep.threads())?);
    environment.took_seconds = Some(started.elapsed().as_secs_f64());
    environment.write(&env_file)?;
    Ok(Finished { rows, gate, environment, known })
}

struct Run<'a> {
    sweep: &'a Sweep,
    program: &'a Path,
    source: &'a dyn Source,
    chosen: &'a [Chosen],
    /// By variant.
    rates: HashMap<String, Rate>,
    progress: Progress,
    peak_gflops: f64,
    cpu: String,
    optimised: bool,
    budget: Budget,
    started: Instant,
    known: usize,
}

impl Run<'_> {
    /// All variants at one length; returns the keys of their cases.
    fn length(&mut self, n: usize, end: Duration) -> Result<Vec<String>> {
        let hash = self.source.hash(n)?;
        let (mut keys, mut pending) = (Vec::new(), Vec::new());
        for chosen in self.chosen {
            let case = self.case(chosen, n, &hash);
            let key = case.key();
            keys.push(key.clone());
            let known = self.progress.journal.get(&key).filter(|row| self.is_settled(row)).cloned();
            match known {
                Some(row) => {
                    self.known += 1;
                    self.learn(&row);
                    self.progress.keep(key, row);
                }
                None => pending.push(self.point(chosen, case)?),
            }
        }
        let may_run = self.admit(pending, end)?;
        if !may_run.is_empty() {
            self.measure(n, may_run)?;
        }
        for key in &keys {
            if let Some(row) = self.progress.rows.get(key).cloned() {
                self.learn(&row);
            }
        }
        Ok(keys)
    }

    /// Measured, or given up after as long as it would be given up now.
    fn is_settled(&self, row: &Row) -> bool {
        match &row.outcome {
            Outcome::Measured(_) => true,
            Outcome::NotRun { reason, .. } => *reason == rounds::stopped_reason(self.patience()),
            Outcome::Failed { .. } => false,
        }
    }

    /// The longest wait for one warm-up.
    fn patience(&self) -> Duration {
        self.budget.point.max(Duration::from_secs(5))
    }

    fn case(&self, chosen: &Chosen, n: usize, hash: &str) -> Case {
        let shape = self.source.shape(n);
        Case {
            source: self.source.kind().to_string(),
            input: self.source.describe(),
            input_hash: hash.into(),
            n,
            batch: shape.batch,
            n_heads_q: shape.n_heads_q,
            n_heads_kv: shape.n_heads_kv,
            head_dim: shape.head_dim,
            head_dim_v: shape.head_dim_v,
            variant: chosen.entry.name.into(),
            options: chosen.options.clone(),
            causal: !self.sweep.bidirectional,
            dtype: self.sweep.dtype,
            threads: self.sweep.threads(),
            isa: Isa::current(),
            rows: self.sweep.rows,
            seed: self.sweep.seed,
            version: env!("CARGO_PKG_VERSION").into(),
            build: if self.optimised { "release" } else { "debug" }.into(),
            cpu: self.cpu.clone(),
        }
    }

    fn point(&self, chosen: &Chosen, case: Case) -> Result<Point> {
        let (shape, dtype) = (case.shape(), case.dtype);
        // What a call allocates depends on the threads it runs on.
        let cost = pool::with_threads(case.threads, None, || chosen.attention.cost(&shape, dtype))?;
        let peak = Rate::AtMost(self.peak_gflops * 1e9);
        let rate = self.rates.get(chosen.entry.name).copied().unwrap_or(peak);
        Ok(Point {
            flops: cost.flops,
            resident: plan::resident_bytes(shape.io_bytes(dtype), cost.bytes_allocated),
            prediction: plan::predict(cost.flops, rate, &policy()),
            case,
        })
    }

    /// Refuses what does not fit; the quickest points come first, so that one slow variant does not cost the others
    /// their place.
    fn admit(&mut self, mut pending: Vec<Point>, end: Duration) -> Result<Vec<Point>> {
        let available = memory::available_bytes();
        let mut left = end.saturating_sub(self.started.elapsed());
        pending.sort_by(|a, b| a.prediction.point.total_cmp(&b.prediction.point));
        let mut may_run = Vec::new();
        for point in pending {
            let refusal = plan::refuse_memory(point.resident, available)
                .or_else(|| self.budget.refuse(&point.prediction, left));
            match refusal {
                None => {
                    left = left.saturating_sub(Duration::from_secs_f64(point.prediction.point));
                    may_run.push(point);
                }
                Some(refusal) => {
                    let outcome = Outcome::NotRun {
                        reason: refusal.reason,
                        predicted_seconds: Some(point.prediction.point),
                        predicted_bytes: Some(point.resident),
                    };
                    self.progress.finished(Row { case: point.case, outcome })?;
                }
            }
        }
        // Back to the order in which variants were named.
        let place = |p: &Point| self.chosen.iter().position(|c| c.entry.name == p.case.variant);
        may_run.sort_by_key(place);
        Ok(may_run)
    }

    fn measure(&mut self, n: usize, points: Vec<Point>) -> Result<()> {
        let bar = &self.progress.bar;
        bar.set_message(format!("n = {n}: inputs"));
        let threads = self.sweep.threads();
        let inputs = pool::with_threads(threads, None, || {
            self.source.inputs(n).and_then(|inputs| convert(inputs, self.sweep.dtype))
        })??;
        bar.set_message(format!("n = {n}: exact attention on sampled rows"));
        let (causal, rows, seed) = (!self.sweep.bidirectional, self.sweep.rows, self.sweep.seed);
        let sample = pool::with_threads(threads, None, || Sample::draw(&inputs.qkv()?, causal, rows, seed))??;
        let input = InputFile::new(&self.sweep.out, &inputs)?;
        drop(inputs);
        let conditions = Conditions {
            program: self.program,
            input: &input.path,
            sample: &sample,
            policy: policy(),
            patience: self.patience(),
            peak_gflops: self.peak_gflops,
        };
        rounds::measure(points, &conditions, &mut self.progress)
    }

    fn learn(&mut self, row: &Row) {
        let flops = self
            .chosen
            .iter()
            .find(|c| c.entry.name == row.case.variant)
            .map(|c| c.attention.cost(&row.case.shape(), row.case.dtype).flops);
        let rate = match &row.outcome {
            Outcome::Measured(figures) => Rate::Measured(figures.flops as f64 / figures.seconds.median),
            // Stopped at a limit: it is slower than that, and so will it be at the next length.
            Outcome::NotRun { reason, .. } if reason.starts_with("stopped") => {
                let seconds = self.patience().as_secs_f64();
                Rate::AtMost(flops.unwrap_or(0) as f64 / seconds)
            }
            _ => return,
        };
        self.rates.insert(row.case.variant.clone(), rate);
    }
}

/// At least five runs and 0.3 s, or 2 s.
fn policy() -> Policy {
    Policy { min_runs: 5, min_time: Duration::from_millis(300), max_time: Duration::from_secs(2) }
}

/// Writes rows down as they come, and shows how far the sweep is.
struct Progress {
    journal: Journal,
    bar: ProgressBar,
    rows: HashMap<String, Row>,
}

impl Progress {
    fn keep(&mut self, key: String, row: Row) {
        self.rows.insert(key, row);
        self.bar.inc(1);
    }
}

impl Observer for Progress {
    fn working(&mut self, case: &Case, doing: &str) {
        self.bar.set_message(format!("n = {}: {}, {doing}", case.n, case.variant));
    }

    fn finished(&mut self, row: Row) -> Result<()> {
        self.journal.add(row.clone())?;
        self.keep(row.case.key(), row);
        Ok(())
    }
}

fn progress_bar(points: usize) -> ProgressBar {
    // Hidden by itself where standard error is no terminal.
    let bar = ProgressBar::new(points as u64);
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {pos}/{len} points  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// q, k and v of one length, for the processes of its points; removed when it goes.
struct InputFile {
    path: PathBuf,
}

impl InputFile {
    fn new(folder: &Path, inputs: &attn_core::registry::NamedTensors) -> Result<Self> {
        // One name: a sweep that was cut off leaves one file, which the next one overwrites.
        let file = Self { path: folder.join("inputs.safetensors") };
        tensors::save(&file.path, inputs)?;
        Ok(file)
    }
}

impl Drop for InputFile {
    fn drop(&mut self) {
        // Left over, it costs space and nothing else.
        let _ = std::fs::remove_file(&self.path);
    }
}
