//! What the benches share: inputs, peers, and a measurement that prints its share of the machine's limit.
//!
//! `cargo bench -p attn-benches` runs everything; `cargo bench -p attn-benches --bench flash -- causal` a part.
#![allow(clippy::print_stdout)] // what a bench is for

use attn_core::simd::{Isa, with_isa};
use attn_core::{Attention, AttnShape, DType, Element, Qkv, QkvGrads, View, ViewMut, limits};
use candle_core::{D, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use criterion::{BenchmarkId, Criterion, Throughput};
use std::time::{Duration, Instant};

/// Inputs of one problem, f32 and contiguous, about normally distributed.
pub struct Problem {
    /// Sizes.
    pub shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    /// Fixed pseudo-random inputs.
    pub fn new(shape: AttnShape) -> Self {
        let numbers = |axes: [usize; 4], mut x: u64| -> Vec<f32> {
            let mut uniform = move || {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            };
            (0..axes.iter().product()).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect()
        };
        Self { q: numbers(shape.q(), 1), k: numbers(shape.k(), 2), v: numbers(shape.v(), 3), shape }
    }

    /// The inputs as views.
    pub fn qkv(&self) -> Qkv<'_> {
        let view =
            |name, data, shape| View::contiguous(name, data, shape).expect("the buffer has this shape");
        let s = &self.shape;
        Qkv::new(view("q", &self.q, s.q()), view("k", &self.k, s.k()), view("v", &self.v, s.v()))
            .expect("the shapes agree")
    }

    /// The inputs as candle tensors.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensors(&self) -> Result<(Tensor, Tensor, Tensor)> {
        let tensor = |data: &[f32], shape: [usize; 4]| Tensor::from_slice(data, &shape, &Device::Cpu);
        let s = &self.shape;
        Ok((tensor(&self.q, s.q())?, tensor(&self.k, s.k())?, tensor(&self.v, s.v())?))
    }
}

/// What candle users write: matmul, softmax, matmul; under `causal` with an additive mask.
///
/// # Errors
/// Those of candle.
pub fn candle_attention(q: &Tensor, k: &Tensor, v: &Tensor, causal_mask: Option<&Tensor>) -> Result<Tensor> {
    let scores = (q.matmul(&k.t()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
    let scores = match causal_mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(v)
}

/// candle-nn's CPU flash attention, on tensors `(batch, heads, length, width)`.
///
/// # Errors
/// Those of candle.
pub fn candle_nn_attention(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    let (scale, mask) = (1.0 / (q.dim(D::Minus1)? as f32).sqrt(), AttnMask::causal());
    let mask = if causal { mask } else { AttnMask::None };
    let rows = |t: &Tensor| t.transpose(1, 2)?.contiguous();
    flash_attn::<f32>(&rows(q)?, &rows(k)?, &rows(v)?, scale, mask, None, None)
}

/// `(n, n)` with 0 on and below the diagonal and -inf above.
///
/// # Errors
/// Those of candle.
pub fn causal_mask(n: usize) -> Result<Tensor> {
    let mask: Vec<f32> = (0..n * n).map(|x| if x % n <= x / n { 0.0 } else { f32::NEG_INFINITY }).collect();
    Tensor::from_vec(mask, (n, n), &Device::Cpu)
}

/// Where and how a case runs.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Threads of the rayon pool.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
}

impl Setting {
    /// The fastest instruction set on this many threads.
    pub fn threads(threads: usize) -> Self {
        Self { threads, isa: Isa::current() }
    }
}

/// Measures one forward pass with criterion and prints its share of the f32 FMA peak, measured before and after.
pub fn forward(c: &mut Criterion, name: &str, attention: &dyn Attention, problem: &Problem, at: Setting) {
    forward_stored::<f32>(c, name, attention, problem, at);
}

/// As [`forward`], with inputs and output stored as `E`.
pub fn forward_stored<E: Element>(
    c: &mut Criterion,
    name: &str,
    attention: &dyn Attention,
    problem: &Problem,
    at: Setting,
) {
    let s = &problem.shape;
    let stored = |data: &[f32]| data.iter().map(|x| E::store(*x)).collect::<Vec<E>>();
    let (q, k, v) = (stored(&problem.q), stored(&problem.k), stored(&problem.v));
    let mut out = stored(&vec![0.0; s.out().iter().product()]);
    let flops = attention.cost(s, DType::F32).flops;
    share_of_peak(c, name, problem, at, flops, &mut || {
        let x = Qkv::new(
            View::contiguous("q", &q, s.q())?,
            View::contiguous("k", &k, s.k())?,
            View::contiguous("v", &v, s.v())?,
        )?;
        attention.forward(x, ViewMut::contiguous("out", &mut out, s.out())?.into())
    });
}

/// As [`forward`], for the backward pass, counted as 2.5 times the forward pass.
///
/// # Panics
/// If `attention` has no gradients.
pub fn backward(c: &mut Criterion, name: &str, attention: &dyn Attention, problem: &Problem, at: Setting) {
    let attention = attention.as_differentiable().expect("a variant with gradients");
    let (s, x) = (&problem.shape, problem.qkv());
    let zeros = |axes: [usize; 4]| vec![0.0f32; axes.iter().product()];
    let (mut out, grad_out) = (zeros(s.out()), vec![1.0f32; s.out().iter().product()]);
    let saved =
        attention.forward_saving(x, contiguous("out", &mut out, s.out()).into()).expect("a valid case");
    let view = |data| View::contiguous("out", data, s.out()).expect("the buffer has this shape");
    let (mut dq, mut dk, mut dv) = (zeros(s.q()), zeros(s.k()), zeros(s.v()));
    let flops = attention.cost(s, DType::F32).flops * 5 / 2;
    share_of_peak(c, name, problem, at, flops, &mut || {
        let grads = QkvGrads {
            q: contiguous("dq", &mut dq, s.q()).into(),
            k: contiguous("dk", &mut dk, s.k()).into(),
            v: contiguous("dv", &mut dv, s.v()).into(),
        };
        attention.backward(x, view(&out).into(), &saved, view(&grad_out).into(), grads)
    });
}

fn contiguous<'a>(name: &str, data: &'a mut [f32], shape: [usize; 4]) -> ViewMut<'a, f32> {
    ViewMut::contiguous(name, data, shape).expect("the buffer has this shape")
}

fn share_of_peak(
    c: &mut Criterion,
    name: &str,
    problem: &Problem,
    at: Setting,
    flops: u64,
    run: &mut (dyn FnMut() -> attn_core::Result<()> + Send),
) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(at.threads).build().expect("a thread pool");
    let mut once = || pool.install(|| with_isa(at.isa, &mut *run)?).expect("the case is valid");
    let peak = || limits::fma_peak_quick(at.isa, at.threads).expect("the machine's limit");
    let before = peak();
    let measured = measure(c, name, &format!("{}, {} threads", at.isa, at.threads), flops, &mut once);
    let Some(seconds) = measured else { return };
    let peak = before.max(peak());
    let (rate, tokens) = (flops as f64 / seconds / 1e9, problem.shape.rows() as f64 / seconds);
    println!(
        "{name}: {rate:.1} GFLOP/s = {:.1} % of {peak:.1} ({} threads), {tokens:.3e} rows/s",
        100.0 * rate / peak,
        at.threads
    );
}

/// Measures `once` with criterion; returns the median seconds of a run, or `None` where a filter left the case out.
pub fn measure(
    c: &mut Criterion,
    name: &str,
    setting: &str,
    flops: u64,
    once: &mut dyn FnMut(),
) -> Option<f64> {
    let mut seconds = Vec::new();
    let mut group = c.benchmark_group(name);
    if flops > 0 {
        group.throughput(Throughput::Elements(flops));
    }
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.bench_function(BenchmarkId::from_parameter(setting), |b| {
        b.iter_custom(|runs| {
            let start = Instant::now();
            (0..runs).for_each(|_| once());
            let taken = start.elapsed();
            seconds.push(taken.as_secs_f64() / runs as f64);
            taken
        });
    });
    group.finish();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied()
}
