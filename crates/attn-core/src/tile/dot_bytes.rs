//! Products of bytes, accumulated in 32-bit integers, and which of them are large enough:
//! `C[i, j] = start[j] + sum_c A[i, c] B[c, j]`, exactly, and bit `j` of `reached[i]` says `C[i, j] >= least[j]`.
//!
//! Four numbers that follow each other along the contracted axis make a *quad*: the bytes of a `u32`, the first in the lowest.
//! `A` has unsigned bytes and is read by broadcast, a quad at a time; `B [quads, 32]` has signed bytes and is read by vectors,
//! on a register tile of 8 rows by 2 vectors. Signed numbers `a` become unsigned as `a + 128`; `start[j] = -128 sum_c B[c, j]`
//! takes the difference out again.
//!
//! The instruction (`vpdpbusd`, AVX-512 VNNI) does four times the multiply-adds of f32.
//!
//! `unsafe` here is raw reads and writes that the asserts of the public function cover, and the proof that the CPU has the
//! instruction.
#![allow(unsafe_code)]

/// Proof that this CPU multiplies quads of bytes; only [`ByteDot::detect`] makes one.
#[derive(Debug, Clone, Copy)]
pub struct ByteDot(Proof);

#[cfg(target_arch = "x86_64")]
type Proof = ();
/// No other architecture has a kernel: there is no proof.
#[cfg(not(target_arch = "x86_64"))]
type Proof = std::convert::Infallible;

/// The factors: see the module.
#[derive(Debug, Clone, Copy)]
pub struct ByteFactors<'a> {
    /// `A [m, quads]`, unsigned bytes.
    pub a: &'a [u32],
    /// `B [quads, 32]`, signed bytes.
    pub b: &'a [u32],
    /// Quads of a row of `A`.
    pub quads: usize,
    /// What each column of `C` starts with.
    pub start: &'a [i32; ByteDot::COLUMNS],
    /// What each column has to reach.
    pub least: &'a [i32; ByteDot::COLUMNS],
}

impl ByteDot {
    /// Columns of `B` and `C`.
    pub const COLUMNS: usize = 32;
    /// Quads of a row at most: sums of so many products, and `start`, stay below 2^31.
    pub const MAX_QUADS: usize = 8192;

    /// The proof, if this CPU has the instructions: AVX-512 with VNNI.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            return Some(Self(()));
        }
        None
    }

    /// `C [m, 32]` in `c` and `[m]` sets of columns in `reached`, with `m` the length of `reached`.
    ///
    /// # Panics
    /// If a row has more than [`ByteDot::MAX_QUADS`] quads or one of the slices is shorter than its matrix.
    pub fn product(self, factors: ByteFactors<'_>, c: &mut [i32], reached: &mut [u32]) {
        let ByteFactors { a, b, quads, .. } = factors;
        let m = reached.len();
        assert!(quads <= Self::MAX_QUADS, "{quads} quads, at most {}", Self::MAX_QUADS);
        assert!(a.len() >= m * quads, "A is shorter than {m} x {quads}");
        assert!(b.len() >= quads * Self::COLUMNS, "B is shorter than {quads} x {}", Self::COLUMNS);
        assert!(c.len() >= m * Self::COLUMNS, "C is shorter than {m} x {}", Self::COLUMNS);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` proves the instructions; the asserts above put A, B and C inside their slices.
        unsafe {
            x86::product(factors, c.as_mut_ptr(), reached);
        }
        #[cfg(not(target_arch = "x86_64"))]
        match self.0 {}
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ByteDot, ByteFactors};
    use std::arch::x86_64::*;

    const LANES: usize = 16;

    /// # Safety
    /// The CPU must have the features; `A [m, quads]` and `B [quads, 32]` lie inside their slices and `C [m, 32]` at `c`, with
    /// `m` the length of `reached`.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn product(factors: ByteFactors<'_>, c: *mut i32, reached: &mut [u32]) {
        let mut i = 0;
        while i < reached.len() {
            // SAFETY: the rows of each tile are those that `reached` has left; the rest is the caller's promise.
            unsafe {
                let (a, c) = (factors.a.as_ptr().add(i * factors.quads), c.add(i * ByteDot::COLUMNS));
                i += match reached.len() - i {
                    8.. => tile::<8>(&factors, a, c, &mut reached[i..]),
                    4.. => tile::<4>(&factors, a, c, &mut reached[i..]),
                    2.. => tile::<2>(&factors, a, c, &mut reached[i..]),
                    _ => tile::<1>(&factors, a, c, &mut reached[i..]),
                };
            }
        }
    }

    /// The first `ROWS` rows; returns how many they are.
    ///
    /// # Safety
    /// As [`product`], with `A [ROWS, quads]` at `a`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn tile<const ROWS: usize>(
        factors: &ByteFactors<'_>,
        a: *const u32,
        c: *mut i32,
        reached: &mut [u32],
    ) -> usize {
        // SAFETY: 32 numbers each; quad `q < quads` of each of the `ROWS` rows at `a`, row `q` of B and the rows of C at `c`
        // are inside, by the caller's promise.
        unsafe {
            let pair = |from: *const i32| {
                [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(LANES).cast())]
            };
            let mut sums = [pair(factors.start.as_ptr()); ROWS];
            for quad in 0..factors.quads {
                let b = pair(factors.b.as_ptr().add(quad * ByteDot::COLUMNS).cast());
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_epi32(*a.add(row * factors.quads + quad) as i32);
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_dpbusd_epi32(*sum, a, b);
                    }
                }
            }
            let least = pair(factors.least.as_ptr());
            for (row, (sums, reached)) in sums.iter().zip(reached).enumerate() {
                *reached = 0;
                for (half, (sum, least)) in sums.iter().zip(least).enumerate() {
                    _mm512_storeu_si512(c.add(row * ByteDot::COLUMNS + half * LANES).cast(), *sum);
                    *reached |= u32::from(_mm512_cmpge_epi32_mask(*sum, least)) << (half * LANES);
                }
            }
        }
        ROWS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = ByteDot::COLUMNS;

    #[allow(clippy::print_stderr)]
    fn detect() -> Option<ByteDot> {
        let dot = ByteDot::detect();
        if dot.is_none() {
            eprintln!("skipped: this CPU has no byte dot product");
        }
        dot
    }

    /// Bytes of all values, those of the ends among them.
    fn bytes(len: usize, seed: u32) -> Vec<u8> {
        let byte = |i: u32| match i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8 {
            x if x % 7 == 0 => 255,
            x if x % 7 == 1 => 128,
            x => x as u8,
        };
        (0..len as u32).map(byte).collect()
    }

    fn quads(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn every_size_equals_the_triple_loop() {
        let Some(dot) = detect() else { return };
        for m in [0, 1, 2, 3, 7, 8, 9, 15, 32] {
            for n_quads in [0, 1, 3, 16, 40] {
                let (a, b) = (bytes(4 * m * n_quads, 1), bytes(4 * n_quads * N, 2));
                let start: [i32; N] = std::array::from_fn(|j| j as i32 * 1000 - 16_000);
                let least: [i32; N] = std::array::from_fn(|j| 5000 - 700 * j as i32);
                // What lies behind C must survive.
                let (mut c, mut reached) = (vec![i32::MIN; m * N + 1], vec![u32::MAX; m]);
                let (a_quads, b_quads) = (quads(&a), quads(&b));
                let factors =
                    ByteFactors { a: &a_quads, b: &b_quads, quads: n_quads, start: &start, least: &least };
                dot.product(factors, &mut c, &mut reached);
                assert_eq!(c[m * N], i32::MIN);
                for (i, reached) in reached.iter().enumerate() {
                    for j in 0..N {
                        let term = |x: usize| {
                            let b = b[(x / 4 * N + j) * 4 + x % 4] as i8;
                            i32::from(a[i * 4 * n_quads + x]) * i32::from(b)
                        };
                        let want = start[j] + (0..4 * n_quads).map(term).sum::<i32>();
                        assert_eq!(c[i * N + j], want, "{m} x {n_quads}: {i}, {j}");
                        assert_eq!(reached >> j & 1 == 1, want >= least[j], "{m} x {n_quads}: {i}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_longest_rows_do_not_overflow() {
        let Some(dot) = detect() else { return };
        let quads = ByteDot::MAX_QUADS;
        let (a, b) = (vec![u32::MAX; quads], vec![0x8080_8080; quads * N]);
        let start = [128 * 128 * 4 * quads as i32; N];
        let (mut c, mut reached) = (vec![0; N], [0]);
        let factors = ByteFactors { a: &a, b: &b, quads, start: &start, least: &[0; N] };
        dot.product(factors, &mut c, &mut reached);
        assert_eq!(c, [-(127 * 128 * 4 * quads as i32); N]);
    }

    #[test]
    fn short_matrices_are_refused() {
        let Some(dot) = detect() else { return };
        let run = |a: usize, b: usize, c: usize| {
            std::panic::catch_unwind(|| {
                let (a, b) = (vec![0; a], vec![0; b]);
                let factors = ByteFactors { a: &a, b: &b, quads: 3, start: &[0; N], least: &[0; N] };
                dot.product(factors, &mut vec![0; c], &mut [0; 2]);
            })
        };
        assert!(run(6, 3 * N, 2 * N).is_ok());
        assert!(run(5, 3 * N, 2 * N).is_err() && run(6, 3 * N - 1, 2 * N).is_err());
        assert!(run(6, 3 * N, 2 * N - 1).is_err());
    }
}
