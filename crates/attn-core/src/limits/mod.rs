//! What this machine can do at best, measured on demand: the yardstick beside every timing.
//!
//! - [`fma_peak`]: f32 multiply-adds in registers, 2 FLOPs a lane.
//! - [`bf16_peak`]: bf16 dot products accumulated in f32 (`vdpbf16ps`), 4 FLOPs a lane; only where the CPU has them.
//! - [`read_bandwidth`]: a sum over memory that is in cache or is not.
//!
//! Each figure is the best of many short repeats: a limit is what the machine does when nothing disturbs it, not what
//! it does on average. A repeat starts all threads together and ends with the last of them, so that a figure for
//! several threads is what a parallel program can reach.
//!
//! ```
//! use attn_core::{limits, simd::Isa};
//! let gflops = limits::fma_peak_quick(Isa::current(), 1)?;
//! assert!(gflops > 0.0);
//! # Ok::<(), attn_core::AttnError>(())
//! ```

mod arithmetic;
mod bandwidth;
mod repeats;

pub use bandwidth::{CACHED_BYTES, Level, MEMORY_BYTES, MEMORY_BYTES_A_THREAD, read_bandwidth};

use crate::simd::Isa;
use crate::{AttnError, Result};
use repeats::best_rate;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Time that one figure takes.
const FIGURE: Duration = Duration::from_millis(80);
/// Time that a quick figure takes.
const QUICK: Duration = Duration::from_millis(30);

/// The limits of one number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Threads that ran at once.
    pub threads: usize,
    /// Instruction set of the f32 figure and of the reads.
    pub isa: Isa,
    /// f32 multiply-adds, GFLOP/s.
    pub fma_gflops: f64,
    /// True if `fma_gflops` comes from a compiled loop and not from instructions chosen by hand: then it is an estimate
    /// that compiled kernels may exceed.
    pub fma_is_estimate: bool,
    /// bf16 dot products, GFLOP/s; `None` if this CPU has no such instruction.
    pub bf16_gflops: Option<f64>,
    /// Reads of [`CACHED_BYTES`] a thread, GB/s.
    pub cache_read_gb_s: f64,
    /// Reads of memory that no cache holds, GB/s.
    pub memory_read_gb_s: f64,
}

impl Limits {
    /// Measures every limit for `threads` threads; takes about half a second, most of it to fill
    /// [`MEMORY_BYTES`].
    ///
    /// # Errors
    /// [`AttnError::Value`] for zero threads or an instruction set that this CPU lacks.
    pub fn measure(isa: Isa, threads: usize) -> Result<Self> {
        Ok(Self {
            threads,
            isa,
            fma_gflops: fma_peak(isa, threads)?,
            fma_is_estimate: !arithmetic::is_hand_chosen(isa),
            bf16_gflops: bf16_peak(threads)?,
            cache_read_gb_s: read_bandwidth(isa, threads, Level::Cache)?,
            memory_read_gb_s: read_bandwidth(isa, threads, Level::Memory)?,
        })
    }
}

/// f32 multiply-adds of `threads` threads together, GFLOP/s; takes about 80 ms.
///
/// # Errors
/// [`AttnError::Value`] for zero threads or an instruction set that this CPU lacks.
pub fn fma_peak(isa: Isa, threads: usize) -> Result<f64> {
    fma_rate(isa, threads, FIGURE)
}

/// As [`fma_peak`] in about 30 ms: to see before and after a benchmark whether the machine was the same.
///
/// # Errors
/// As [`fma_peak`].
pub fn fma_peak_quick(isa: Isa, threads: usize) -> Result<f64> {
    fma_rate(isa, threads, QUICK)
}

fn fma_rate(isa: Isa, threads: usize, time: Duration) -> Result<f64> {
    check(isa, threads)?;
    Ok(best_rate(threads, time, || (), |(), rounds| arithmetic::fma(isa, rounds)) / 1e9)
}

/// bf16 dot products of `threads` threads together, GFLOP/s; `None` if this CPU has no such instruction.
///
/// # Errors
/// [`AttnError::Value`] for zero threads.
pub fn bf16_peak(threads: usize) -> Result<Option<f64>> {
    check(Isa::Portable, threads)?;
    if arithmetic::bf16_dot(1).is_none() {
        return Ok(None);
    }
    let work = |_: &mut (), rounds| arithmetic::bf16_dot(rounds).unwrap_or(0);
    Ok(Some(best_rate(threads, FIGURE, || (), work) / 1e9))
}

fn check(isa: Isa, threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(AttnError::value("threads", 0, "at least 1"));
    }
    crate::simd::with_isa(isa, || ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_a_positive_finite_peak() {
        for isa in Isa::available() {
            let gflops = fma_peak_quick(isa, 1).unwrap();
            assert!(gflops.is_finite() && gflops > 0.01, "{isa}: {gflops}");
        }
    }

    #[test]
    fn all_limits_are_positive_and_finite() {
        let limits = Limits::measure(Isa::current(), 2).unwrap();
        assert_eq!((limits.threads, limits.isa), (2, Isa::current()));
        for rate in [limits.fma_gflops, limits.cache_read_gb_s, limits.memory_read_gb_s] {
            assert!(rate.is_finite() && rate > 0.0, "{limits:?}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(fma_peak(Isa::current(), 0).unwrap_err().to_string().contains("threads"));
        let missing = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        assert!(fma_peak_quick(missing, 1).is_err());
        assert!(bf16_peak(0).is_err());
        assert!(read_bandwidth(Isa::current(), 0, Level::Cache).is_err());
    }
}
