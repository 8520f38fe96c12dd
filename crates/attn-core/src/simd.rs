//! One dispatch a call: which instruction set runs, and how a kernel enters it.
//!
//! A kernel is a struct holding its inputs with one generic [`SimdOp::eval`] over an instruction-set token; the
//! token proves what the CPU has, so the kernel is safe code. [`Isa::run`] enters it through one function that the
//! compiler builds for that instruction set; everything the kernel calls is inlined there.
//!
//! The vectors are those of the `fearless_simd` crate.

use crate::{AttnError, Result};
use fearless_simd::{Fallback, Level};
use serde::{Deserialize, Serialize};
use std::cell::Cell;

pub use fearless_simd::prelude::*;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// x86-64 with AVX-512 as in Ice Lake and Zen 4: 16 floats a vector.
    Avx512,
    /// x86-64 with AVX2 and FMA: 8 floats a vector.
    Avx2,
    /// 64-bit Arm: 4 floats a vector.
    Neon,
    /// Plain Rust, on any CPU.
    Portable,
}

impl Isa {
    /// Instruction sets this CPU can run, fastest first. The last is always [`Isa::Portable`].
    pub fn available() -> Vec<Isa> {
        let level = Level::new();
        let mut all = Vec::new();
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        {
            all.extend(level.as_avx512().map(|_| Isa::Avx512));
            all.extend(level.as_avx2().map(|_| Isa::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(level.as_neon().map(|_| Isa::Neon));
        let _ = level;
        all.push(Isa::Portable);
        all
    }

    /// The one that [`with_isa`] forces on this thread, else the fastest available.
    pub fn current() -> Isa {
        FORCED.get().unwrap_or_else(|| {
            let level = Level::new();
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            {
                if level.as_avx512().is_some() {
                    return Isa::Avx512;
                }
                if level.as_avx2().is_some() {
                    return Isa::Avx2;
                }
            }
            #[cfg(target_arch = "aarch64")]
            if level.as_neon().is_some() {
                return Isa::Neon;
            }
            let _ = level;
            Isa::Portable
        })
    }

    /// Floats in one vector.
    pub fn lanes(self) -> usize {
        match self {
            Isa::Avx512 => 16,
            Isa::Avx2 => 8,
            Isa::Neon | Isa::Portable => 4,
        }
    }

    /// Runs a kernel compiled for this instruction set; portable code if this CPU lacks it.
    #[inline]
    pub fn run<Op: SimdOp>(self, op: Op) -> Op::Output {
        let level = Level::new();
        match self {
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Isa::Avx512 => {
                if let Some(simd) = level.as_avx512() {
                    return enter(simd, op);
                }
            }
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Isa::Avx2 => {
                if let Some(simd) = level.as_avx2() {
                    return enter(simd, op);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                if let Some(simd) = level.as_neon() {
                    return enter(simd, op);
                }
            }
            _ => {}
        }
        let _ = level;
        enter(Fallback::new(), op)
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        })
    }
}

impl std::str::FromStr for Isa {
    type Err = AttnError;

    fn from_str(s: &str) -> Result<Self> {
        [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable]
            .into_iter()
            .find(|isa| isa.to_string() == s)
            .ok_or_else(|| AttnError::value("isa", s, "avx512, avx2, neon or portable"))
    }
}

/// A kernel: its inputs in a struct, its work generic over the instruction set.
pub trait SimdOp {
    /// What it returns.
    type Output;

    /// The work. Mark it `#[inline(always)]`, and whatever it calls in a loop too, else it is compiled without the
    /// instruction set it was entered for.
    fn eval<S: Simd>(self, simd: S) -> Self::Output;
}

#[inline(always)]
fn enter<S: Simd, Op: SimdOp>(simd: S, op: Op) -> Op::Output {
    simd.vectorize(
        #[inline(always)]
        || op.eval(simd),
    )
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Forces `isa` for every attention call that `work` makes on this thread.
///
/// An engine asks [`Isa::current`] once, at its door, on the calling thread; its worker threads follow.
///
/// # Errors
/// [`AttnError::Value`] if this CPU does not have it.
pub fn with_isa<R>(isa: Isa, work: impl FnOnce() -> R) -> Result<R> {
    let available = Isa::available();
    if !available.contains(&isa) {
        let names: Vec<String> = available.iter().map(Isa::to_string).collect();
        return Err(AttnError::value("isa", isa, format!("one that this CPU has: {}", names.join(", "))));
    }
    /// Puts the previous choice back, also when `work` panics.
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(isa)));
    Ok(work())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lanes;

    impl SimdOp for Lanes {
        type Output = usize;

        #[inline(always)]
        fn eval<S: Simd>(self, _: S) -> usize {
            S::f32s::LEN
        }
    }

    #[test]
    fn each_instruction_set_has_its_width_and_can_be_forced() {
        for isa in Isa::available() {
            assert_eq!(isa.run(Lanes), isa.lanes(), "{isa}");
            assert_eq!(with_isa(isa, Isa::current).unwrap(), isa);
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        assert_eq!(Isa::current(), Isa::available()[0], "the choice is restored");
    }

    #[test]
    fn what_the_cpu_lacks_is_refused() {
        let missing = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        assert!(with_isa(missing, || ()).unwrap_err().to_string().contains("portable"));
    }
}
