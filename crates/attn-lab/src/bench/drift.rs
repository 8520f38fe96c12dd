//! The machine's limits beside a case: measured before and after, so that a disturbed run is seen.

use crate::Result;
use attn_core::limits::{Level, fma_peak, read_bandwidth};
use attn_core::simd::Isa;

/// Limits that differ by more than this share make a run doubtful.
pub const MAX_DRIFT: f64 = 0.05;

/// The two limits that a case is compared with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Yardsticks {
    pub(super) fma_gflops: f64,
    pub(super) read_gb_s: Option<f64>,
}

impl Yardsticks {
    /// Before the case. The buffer of the read limit would count as the case's resident memory, unless that count can
    /// be started again (`with_reads`).
    pub(super) fn before(isa: Isa, threads: usize, with_reads: bool) -> Result<Self> {
        let read_gb_s = with_reads.then(|| read_bandwidth(isa, threads, Level::Memory)).transpose()?;
        Ok(Self { fma_gflops: fma_peak(isa, threads)?, read_gb_s })
    }

    /// After the case, in the opposite order: what was measured last is measured first.
    pub(super) fn after(isa: Isa, threads: usize) -> Result<Self> {
        let fma_gflops = fma_peak(isa, threads)?;
        Ok(Self { fma_gflops, read_gb_s: Some(read_bandwidth(isa, threads, Level::Memory)?) })
    }

    /// The larger of each: a limit is what the machine can do.
    pub(super) fn best(&self, other: &Self) -> Self {
        let read_gb_s = match (self.read_gb_s, other.read_gb_s) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
        Self { fma_gflops: self.fma_gflops.max(other.fma_gflops), read_gb_s }
    }

    /// The largest relative difference.
    pub(super) fn drift(&self, other: &Self) -> f64 {
        let relative = |a: f64, b: f64| (a - b).abs() / a.max(b);
        let reads = self.read_gb_s.zip(other.read_gb_s).map_or(0.0, |(a, b)| relative(a, b));
        relative(self.fma_gflops, other.fma_gflops).max(reads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_the_largest_relative_difference() {
        let a = Yardsticks { fma_gflops: 100.0, read_gb_s: Some(20.0) };
        let b = Yardsticks { fma_gflops: 98.0, read_gb_s: Some(10.0) };
        assert!((a.drift(&b) - 0.5).abs() < 1e-12);
        let unread = Yardsticks { fma_gflops: 90.0, read_gb_s: None };
        assert!((a.drift(&unread) - 0.1).abs() < 1e-12);
        assert_eq!(unread.best(&b).read_gb_s, Some(10.0));
        assert_eq!(unread.best(&a).fma_gflops, 100.0);
    }
}
