//! One case measured: time, share of the machine's limits, memory.
//!
//! FLOPs are those of [`attn_core::Attention::cost`]: the algorithm's matrix products, a multiply-add counts two. Bytes
//! are the traffic that no algorithm avoids: q, k and v read once, the output written once (decode: the cache read
//! once). The f32 multiply-add peak is the yardstick for every storage type, since kernels widen to f32; the read yardstick
//! is memory, so a problem that fits the caches can exceed it.

mod decode;
mod drift;
mod forward;

pub use drift::MAX_DRIFT;

use crate::measure::{Policy, Seconds, Times};
use crate::{LabError, Result, memory, pool, registry};
use attn_core::registry::Options;
use attn_core::simd::Isa;
use attn_core::{Attention, AttnError, AttnShape, Cost, DType};
use clap::ValueEnum;
use drift::Yardsticks;
use serde::Serialize;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One call over all queries
    Forward,
    /// The gradients of q, k and v
    Backward,
    /// One token appended to a stream that already holds n-kv positions
    Decode,
}

/// What to measure.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// The variant's name.
    pub variant: String,
    /// Its options.
    pub options: Options,
    /// Sizes; in [`Mode::Decode`], `n_q` is 1 and `n_kv` what the stream holds before the first timed token.
    #[serde(flatten)]
    pub shape: AttnShape,
    /// Storage type.
    pub dtype: DType,
    /// What is timed.
    pub mode: Mode,
    /// Threads of the pool.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Seed of the inputs.
    pub seed: u64,
    /// How often it runs.
    #[serde(skip)]
    pub policy: Policy,
}

/// What was measured. As JSON one flat object.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The case.
    #[serde(flatten)]
    pub case: Case,
    /// Time of one call, or of one token.
    pub seconds: Seconds,
    /// Timed runs.
    pub runs: usize,
    /// GFLOP/s at the median time.
    pub gflops: f64,
    /// f32 multiply-add peak of the same threads, the larger of before and after.
    pub peak_gflops: f64,
    /// `gflops / peak_gflops`.
    pub share_of_peak: f64,
    /// GB/s of unavoidable traffic at the median time.
    pub gb_s: f64,
    /// Read bandwidth from memory of the same threads, the larger of before and after.
    pub read_gb_s: f64,
    /// `gb_s / read_gb_s`.
    pub share_of_read: f64,
    /// Query positions (over all batch entries) a second.
    pub tokens_s: f64,
    /// Bytes allocated beyond inputs and output at the moment of most; `None` in a program that does not count.
    pub extra_bytes: Option<u64>,
    /// Most memory resident while the case ran; `None` where the system does not say.
    pub peak_rss_bytes: Option<u64>,
    /// Largest relative difference between the limits before and after, where both were measured.
    pub limits_drift: Option<f64>,
}

/// What a mode's runs gave.
struct Measured {
    times: Times,
    extra_bytes: Option<u64>,
    cost: Cost,
    tokens: usize,
}

/// Measures one case.
///
/// # Errors
/// An unknown variant or option, sizes that do not fit each other or the memory, a mode that the variant lacks.
pub fn run(case: &Case) -> Result<Report> {
    let entry = registry::get(&case.variant)?;
    let attention = entry.build(&case.options)?;
    let s = case.shape;
    check_sizes(&s)?;
    AttnShape::from_tensors(s.q(), s.k(), s.v())?;
    if case.mode == Mode::Backward {
        return Err(AttnError::unsupported(case.variant.clone(), "backward: it has no gradients yet").into());
    }
    refuse_what_does_not_fit(attention.as_ref(), case)?;
    let resets = memory::reset_peak_rss();
    let before = Yardsticks::before(case.isa, case.threads, resets)?;
    memory::reset_peak_rss();
    let measured = pool::with_threads(case.threads, Some(case.isa), || match case.mode {
        Mode::Decode => decode::measure(attention.as_ref(), case),
        Mode::Forward | Mode::Backward => forward::measure(attention.as_ref(), case),
    })??;
    let peak_rss_bytes = memory::peak_rss_bytes();
    let after = Yardsticks::after(case.isa, case.threads)?;
    let Some(seconds) = measured.times.seconds() else {
        return Err(LabError::Argument("no run was timed".into()));
    };
    let best = before.best(&after);
    let rate = |amount: u64| amount as f64 / seconds.median / 1e9;
    let (gflops, gb_s) = (rate(measured.cost.flops), rate(measured.cost.bytes_moved));
    Ok(Report {
        case: case.clone(),
        seconds,
        runs: measured.times.runs(),
        gflops,
        peak_gflops: best.fma_gflops,
        share_of_peak: gflops / best.fma_gflops,
        gb_s,
        read_gb_s: best.read_gb_s.unwrap_or(f64::NAN),
        share_of_read: best.read_gb_s.map_or(f64::NAN, |read| gb_s / read),
        tokens_s: measured.tokens as f64 / seconds.median,
        extra_bytes: measured.extra_bytes,
        peak_rss_bytes,
        limits_drift: Some(before.drift(&after)),
    })
}

/// Sizes whose bytes overflow are refused before anything is computed from them.
fn check_sizes(s: &AttnShape) -> Result<()> {
    for (name, [a, b, c, d]) in [("q", s.q()), ("k", s.k()), ("v", s.v()), ("the output", s.out())] {
        let elements = a as u128 * b as u128 * c as u128 * d as u128;
        if elements > 1 << 48 {
            return Err(LabError::Argument(format!(
                "{name} would have {elements} elements; choose smaller sizes"
            )));
        }
    }
    Ok(())
}

fn refuse_what_does_not_fit(attention: &dyn Attention, case: &Case) -> Result<()> {
    let needed = case.shape.io_bytes(case.dtype) + attention.cost(&case.shape, case.dtype).bytes_allocated;
    let available = memory::available_bytes();
    if needed <= available {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    Err(LabError::Argument(format!(
        "this case needs {:.1} GiB, {:.1} GiB are free; choose a smaller --n, --batch or --heads",
        gib(needed),
        gib(available)
    )))
}
