//! Multiply-adds in registers, as many as the pipes take.
//!
//! Compiled intrinsics spill accumulators or wait for them; a rate read from such a loop is the compiler's and not the
//! machine's. So the loops are written in assembly: 24 independent accumulators (12 twice where there are only 16
//! registers) hide a latency of 4 or 5 cycles on two pipes with room to spare. Accumulators run `a <- a x + y` with
//! `x = 0.999`, `y = 0.001`, which stays near 1: no denormals, no overflow.
//!
//! `unsafe` here is assembly and the proof that the CPU has the instructions.
#![allow(unsafe_code)]

use crate::simd::Isa;
use std::hint::black_box;

/// Accumulators of a round.
const ACCUMULATORS: u64 = 24;
/// Rounds of the assembly loop for one round of the caller: some microseconds.
const UNROLL: u64 = 1000;

/// True if the multiply-adds of this instruction set are written by hand here.
pub(super) fn is_hand_chosen(isa: Isa) -> bool {
    match isa {
        Isa::Avx512 | Isa::Avx2 => cfg!(target_arch = "x86_64"),
        Isa::Neon => cfg!(target_arch = "aarch64"),
        Isa::Portable => false,
    }
}

/// f32 multiply-adds; returns the FLOPs done. What this CPU lacks runs as the plain loop.
pub(super) fn fma(isa: Isa, rounds: u64) -> u64 {
    let rounds = rounds * UNROLL;
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if is_x86_feature_detected!("avx512f") => {
            // SAFETY: the guard has just seen avx512f.
            unsafe { x86::fma512(rounds) };
            rounds * ACCUMULATORS * 16 * 2
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") => {
            // SAFETY: the guard has just seen avx2 and fma.
            unsafe { x86::fma256(rounds) };
            rounds * ACCUMULATORS * 8 * 2
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => {
            arm::fma128(rounds);
            rounds * ACCUMULATORS * 4 * 2
        }
        _ => plain(rounds),
    }
}

/// bf16 dot products accumulated in f32; returns the FLOPs done, `None` if this CPU has no such instruction.
pub(super) fn bf16_dot(rounds: u64) -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        let rounds = rounds * UNROLL;
        // SAFETY: the line above has just seen avx512f and avx512bf16.
        unsafe { x86::dot_bf16(rounds) };
        return Some(rounds * ACCUMULATORS * 16 * 4);
    }
    let _ = rounds;
    None
}

/// The same sums as compiled for any CPU of this architecture: an estimate.
fn plain(rounds: u64) -> u64 {
    const LANES: usize = 32;
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = black_box([1f32; LANES]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * x + y;
        }
    }
    black_box(sums);
    rounds * LANES as u64 * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// `rounds` times 24 multiply-adds of 16 floats.
    ///
    /// # Safety
    /// The CPU must have avx512f.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn fma512(rounds: u64) {
        let factors = [0.999f32, 0.001];
        // SAFETY: reads the two floats of `factors`; every register it writes is declared; no stack, no other memory.
        // The caller promises avx512f.
        unsafe {
            asm!(
                "vbroadcastss zmm30, dword ptr [{factors}]",
                "vbroadcastss zmm31, dword ptr [{factors} + 4]",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vmovaps zmm\\i, zmm31",
                ".endr",
                "2:",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vfmadd213ps zmm\\i, zmm30, zmm31",
                ".endr",
                "dec {rounds}",
                "jnz 2b",
                factors = in(reg) &factors,
                rounds = inout(reg) rounds.max(1) => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm30") _, out("zmm31") _,
                options(nostack, readonly),
            );
        }
    }

    /// `rounds` times 24 multiply-adds of 8 floats: twelve accumulators, each twice.
    ///
    /// # Safety
    /// The CPU must have avx2 and fma.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn fma256(rounds: u64) {
        let factors = [0.999f32, 0.001];
        // SAFETY: as in `fma512`; the caller promises avx2 and fma.
        unsafe {
            asm!(
                "vbroadcastss ymm14, dword ptr [{factors}]",
                "vbroadcastss ymm15, dword ptr [{factors} + 4]",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11",
                "vmovaps ymm\\i, ymm15",
                ".endr",
                "2:",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,0,1,2,3,4,5,6,7,8,9,10,11",
                "vfmadd213ps ymm\\i, ymm14, ymm15",
                ".endr",
                "dec {rounds}",
                "jnz 2b",
                factors = in(reg) &factors,
                rounds = inout(reg) rounds.max(1) => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm14") _, out("ymm15") _,
                options(nostack, readonly),
            );
        }
    }

    /// `rounds` times 24 dot products: 16 sums of two products each.
    ///
    /// # Safety
    /// The CPU must have avx512f and avx512bf16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn dot_bf16(rounds: u64) {
        // Two bf16 of 1 and two of 2^-126: sums stay near 0, and the smallest normal number costs nothing.
        let factors = [0x3f80_3f80u32, 0x0080_0080];
        // SAFETY: as in `fma512`; the caller promises avx512f and avx512bf16.
        unsafe {
            asm!(
                "vpbroadcastd zmm30, dword ptr [{factors}]",
                "vpbroadcastd zmm31, dword ptr [{factors} + 4]",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vpxord zmm\\i, zmm\\i, zmm\\i",
                ".endr",
                "2:",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vdpbf16ps zmm\\i, zmm30, zmm31",
                ".endr",
                "dec {rounds}",
                "jnz 2b",
                factors = in(reg) &factors,
                rounds = inout(reg) rounds.max(1) => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm30") _, out("zmm31") _,
                options(nostack, readonly),
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::asm;

    /// `rounds` times 24 multiply-adds of 4 floats: `a <- a + x y` with `x y = 1e-6`.
    pub(super) fn fma128(rounds: u64) {
        let factors = [0.001f32, 0.001];
        // SAFETY: reads the two floats of `factors`; every register it writes is declared; no stack, no other memory.
        // NEON is part of the aarch64 base.
        unsafe {
            asm!(
                "ld1r {{v30.4s}}, [{factors}]",
                "ld1r {{v31.4s}}, [{factors}]",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "mov v\\i\\().16b, v31.16b",
                ".endr",
                "2:",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "fmla v\\i\\().4s, v30.4s, v31.4s",
                ".endr",
                "subs {rounds}, {rounds}, #1",
                "b.ne 2b",
                factors = in(reg) &factors,
                rounds = inout(reg) rounds.max(1) => _,
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _,
                out("v6") _, out("v7") _, out("v8") _, out("v9") _, out("v10") _, out("v11") _,
                out("v12") _, out("v13") _, out("v14") _, out("v15") _, out("v16") _, out("v17") _,
                out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
                out("v30") _, out("v31") _,
                options(nostack, readonly),
            );
        }
    }
}
