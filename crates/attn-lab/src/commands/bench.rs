//! `attn bench`: one case of one variant, as one line.

use crate::bench::Mode;
use crate::measure::{Policy, Seconds};
use crate::{LabError, Result, bench, output, pool, registry};
use attn_core::DType;
use attn_core::simd::Isa;
use clap::Args;
use std::process::ExitCode;
use std::time::Duration;

/// Measures one case of one variant.
#[derive(Debug, Args)]
pub struct Bench {
    /// The variant's name, from `attn list`
    #[arg(long)]
    pub variant: String,
    /// Query rows
    #[arg(long)]
    pub n: usize,
    /// Key and value rows; default: as queries (decode: positions in the cache, default n)
    #[arg(long)]
    pub n_kv: Option<usize>,
    /// Width of queries and keys
    #[arg(long, default_value_t = 64)]
    pub head_dim: usize,
    /// Width of values; default: as keys
    #[arg(long)]
    pub value_dim: Option<usize>,
    /// Query heads
    #[arg(long, default_value_t = 1)]
    pub heads: usize,
    /// Key/value heads; default: as query heads
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// Independent problems
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Storage type: f32, bf16 or f16
    #[arg(long, default_value_t = DType::F32)]
    pub dtype: DType,
    /// A query sees no later key; the same as --set causal=true
    #[arg(long)]
    pub causal: bool,
    /// What is timed
    #[arg(long, value_enum, default_value_t = Mode::Forward)]
    pub mode: Mode,
    /// Threads; default: all
    #[arg(long)]
    pub threads: Option<usize>,
    /// Instruction set: avx512, avx2, neon or portable; default: the fastest
    #[arg(long)]
    pub isa: Option<Isa>,
    /// An option of the variant, as key=value; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Seconds that a slow case is repeated for
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// One JSON line instead of a short text
    #[arg(long)]
    pub json: bool,
}

impl Bench {
    /// Measures and prints.
    ///
    /// # Errors
    /// An unknown variant or option, sizes that do not fit, a mode that the variant does not have, a problem larger
    /// than memory.
    pub fn run(&self) -> Result<ExitCode> {
        let report = bench::run(&self.case()?)?;
        if report.limits_drift.is_some_and(|drift| drift > bench::MAX_DRIFT) {
            let percent = report.limits_drift.unwrap_or(0.0) * 100.0;
            output::note(&format!(
                "the machine's limits differ by {percent:.0} % before and after this case: something else ran; \
                 measure again"
            ));
        }
        if self.json {
            output::print_json(&report)?;
        } else {
            output::print(&text(&report))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn case(&self) -> Result<bench::Case> {
        let mut options = registry::options(&self.set)?;
        if self.causal
            && options.0.insert("causal".into(), "true".into()).is_some_and(|given| given != "true")
        {
            return Err(LabError::Argument(
                "--causal and --set causal=... contradict each other; give one".into(),
            ));
        }
        if !(self.seconds.is_finite() && self.seconds >= 0.0) {
            return Err(LabError::Argument(format!("--seconds is {}, expected 0 or more", self.seconds)));
        }
        Ok(bench::Case {
            variant: self.variant.clone(),
            options,
            shape: attn_core::AttnShape {
                batch: self.batch,
                n_heads_q: self.heads,
                n_heads_kv: self.kv_heads.unwrap_or(self.heads),
                n_q: if self.mode == Mode::Decode { 1 } else { self.n },
                n_kv: self.n_kv.unwrap_or(self.n),
                head_dim: self.head_dim,
                head_dim_v: self.value_dim.unwrap_or(self.head_dim),
            },
            dtype: self.dtype,
            mode: self.mode,
            threads: self.threads.unwrap_or_else(pool::all_threads),
            isa: self.isa.unwrap_or_else(Isa::current),
            seed: self.seed,
            policy: Policy { max_time: Duration::from_secs_f64(self.seconds), ..Policy::default() },
        })
    }
}

fn text(report: &bench::Report) -> String {
    let Seconds { p20, median, p80 } = report.seconds;
    let extra =
        report.extra_bytes.map_or("not counted".into(), |b| format!("{:.1} MiB", b as f64 / 1048576.0));
    format!(
        "{}: {:.3} ms (p20 {:.3}, p80 {:.3}), {:.1} GFLOP/s = {:.0} % of peak, {:.1} GB/s = {:.0} % of memory, \
         {:.0} tokens/s, {extra} beyond inputs and output; {} thread(s), {}",
        report.case.variant,
        median * 1e3,
        p20 * 1e3,
        p80 * 1e3,
        report.gflops,
        report.share_of_peak * 100.0,
        report.gb_s,
        report.share_of_read * 100.0,
        report.tokens_s,
        report.case.threads,
        report.case.isa
    )
}
