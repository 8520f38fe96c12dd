//! The threads a measurement runs on.

use crate::{LabError, Result};
use attn_core::simd::{Isa, with_isa};

/// Threads to use when none are asked for: all that the machine offers.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `work` inside a pool of `threads` threads, with kernels of `isa` (`None`: the fastest).
///
/// # Errors
/// [`LabError::Argument`] for zero threads or a pool that the system refuses; [`attn_core::AttnError::Value`] for an
/// instruction set that this CPU lacks.
pub fn with_threads<R: Send>(threads: usize, isa: Option<Isa>, work: impl FnOnce() -> R + Send) -> Result<R> {
    if threads == 0 {
        return Err(LabError::Argument("--threads is 0, expected at least 1".into()));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool =
        pool.map_err(|e| LabError::Argument(format!("cannot start {threads} threads: {e}; ask for fewer")))?;
    // An engine asks for the instruction set on the thread that calls it, which is one of the pool's.
    Ok(pool.install(|| match isa {
        Some(isa) => with_isa(isa, work),
        None => Ok(work()),
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_sees_the_threads_and_the_instruction_set() {
        let seen = with_threads(3, Some(Isa::Portable), || (rayon::current_num_threads(), Isa::current()));
        assert_eq!(seen.unwrap(), (3, Isa::Portable));
        assert!(with_threads(0, None, || ()).unwrap_err().to_string().contains("--threads"));
    }
}
