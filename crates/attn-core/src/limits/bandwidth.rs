//! How fast threads can read: the sum of a buffer, all lanes busy.

use super::repeats::best_rate;
use crate::LargeVec;
use crate::Result;
use crate::simd::{Isa, Simd, SimdBase, SimdOp};
use std::hint::black_box;
use std::time::Duration;

/// Bytes that each thread reads again and again for [`Level::Cache`]: fits the second level cache of today's cores.
pub const CACHED_BYTES: usize = 256 << 10;
/// Bytes that all threads read together for [`Level::Memory`]: more than caches hold.
pub const MEMORY_BYTES: usize = 512 << 20;
/// At most this much of it is one thread's.
pub const MEMORY_BYTES_A_THREAD: usize = 256 << 20;

/// Floats that one round of [`Level::Memory`] reads.
const STRETCH: usize = (4 << 20) / size_of::<f32>();

/// Where the data lies that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// In each core's own cache.
    Cache,
    /// In memory: `min(MEMORY_BYTES_A_THREAD, MEMORY_BYTES / threads)` each thread.
    Memory,
}

/// Bytes read a second by `threads` threads together, each from its own buffer, GB/s (10^9).
///
/// # Errors
/// [`crate::AttnError::Value`] for zero threads or an instruction set that this CPU lacks.
pub fn read_bandwidth(isa: Isa, threads: usize, level: Level) -> Result<f64> {
    super::check(isa, threads)?;
    let bytes = match level {
        Level::Cache => CACHED_BYTES,
        Level::Memory => MEMORY_BYTES_A_THREAD.min(MEMORY_BYTES / threads),
    };
    // Filled by the thread that reads it, so that it lies on that thread's memory node; and not with zeros, which the
    // operating system would hand out as one shared page.
    let start = || {
        let mut floats = LargeVec::zeroed(bytes / size_of::<f32>());
        floats.fill(1.0);
        Reader { floats, at: 0 }
    };
    let rate = match level {
        Level::Cache => best_rate(threads, super::FIGURE, start, |r, rounds| r.whole(isa, rounds)),
        Level::Memory => {
            best_rate(threads, Duration::from_millis(100), start, |r, rounds| r.stretches(isa, rounds))
        }
    };
    Ok(rate / 1e9)
}

/// A buffer and how far it has been read.
struct Reader {
    floats: LargeVec<f32>,
    at: usize,
}

impl Reader {
    /// Reads the whole buffer `rounds` times.
    fn whole(&mut self, isa: Isa, rounds: u64) -> u64 {
        for _ in 0..rounds {
            black_box(isa.run(Sum(black_box(&self.floats))));
        }
        rounds * size_of_val(&*self.floats) as u64
    }

    /// Reads on, stretch by stretch, from the start again behind the end: what a cache still holds of a stretch has
    /// been replaced by then.
    fn stretches(&mut self, isa: Isa, rounds: u64) -> u64 {
        let mut floats = 0;
        for _ in 0..rounds {
            let end = (self.at + STRETCH).min(self.floats.len());
            let stretch = &self.floats[self.at..end];
            black_box(isa.run(Sum(black_box(stretch))));
            floats += stretch.len();
            self.at = if end == self.floats.len() { 0 } else { end };
        }
        (floats * size_of::<f32>()) as u64
    }
}

/// The sum of a slice; a rest shorter than eight vectors is left out.
struct Sum<'a>(&'a [f32]);

impl SimdOp for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        const SUMS: usize = 8;
        let mut sums = [S::f32s::splat(simd, 0.0); SUMS];
        for eight in self.0.chunks_exact(SUMS * S::f32s::LEN) {
            for (sum, one) in sums.iter_mut().zip(eight.chunks_exact(S::f32s::LEN)) {
                *sum += S::f32s::from_slice(simd, one);
            }
        }
        sums.iter().map(|sum| sum.as_slice().iter().sum::<f32>()).sum()
    }
}
