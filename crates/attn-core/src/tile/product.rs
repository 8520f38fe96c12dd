//! `C[m, n] += A[m, k] B[k, n]` on a register tile.
//!
//! `A` is read one number at a time and broadcast, so its strides are free: a row-major matrix, its transpose, or
//! every fourth row. `B` and `C` are row-major and read by vectors along `n`. A register tile holds `ROWS x 2`
//! vectors of `C`; each step in `k` loads 2 vectors of `B`, broadcasts `ROWS` numbers of `A` and does `2 * ROWS`
//! multiply-adds.
//!
//! | | `ROWS x vectors` | registers |
//! |---|---|---|
//! | AVX-512 | 8 x 2 (divides 64 and 128) | 16 of 32 accumulate |
//! | AVX2 | 6 x 2 | 12 of 16 |
//! | NEON | 8 x 2 | 16 of 32 |
//! | portable | 4 x 2 | 8 of 16 |
//!
//! Each element of `C` is summed in the order of `k`, whatever the tile: the result does not depend on how a caller
//! cuts `m` and `n`.
#![allow(unsafe_code)]

use crate::simd::{Simd, SimdBase, SimdFloat};
use fearless_simd::{f32x4, f32x8};

/// `A[i, p] = data[i * row_stride + p * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Lhs<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// From one row to the next.
    pub row_stride: usize,
    /// From one column to the next.
    pub col_stride: usize,
}

/// `B[p, j] = data[p * stride + j]`.
#[derive(Debug, Clone, Copy)]
pub struct Rhs<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
}

/// `C[i, j] = data[i * stride + j]`.
#[derive(Debug)]
pub struct TileMut<'a> {
    /// The numbers.
    pub data: &'a mut [f32],
    /// From one row to the next.
    pub stride: usize,
}

/// What a product adds to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// `C = A B`; what `C` held is not read.
    Zero,
    /// `C += A B`.
    Keep,
}

/// `C (+)= A B` with `A [m, k]`, `B [k, n]`, `C [m, n]`. With `k = 0` and [`Start::Zero`], `C` becomes zero.
///
/// # Panics
/// If one of the slices is shorter than its matrix.
#[inline(always)]
pub fn product<S: Simd>(
    simd: S,
    [m, n, k]: [usize; 3],
    a: Lhs<'_>,
    b: Rhs<'_>,
    c: TileMut<'_>,
    start: Start,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last =
        |rows: usize, stride: usize, width: usize| (rows - 1).saturating_mul(stride).saturating_add(width);
    assert!(c.data.len() >= last(m, c.stride, n) && (m == 1 || c.stride >= n), "C is shorter than {m} x {n}");
    if k > 0 {
        assert!(b.data.len() >= last(k, b.stride, n), "B is shorter than {k} x {n}");
        let a_last = last(m, a.row_stride, 0).saturating_add(last(k, a.col_stride, 0));
        assert!(a.data.len() > a_last, "A is shorter than {m} x {k}");
    }
    // Built once per instruction set, outside the engines' loops.
    simd.vectorize(
        #[inline(always)]
        || {
            let strip = Strip { a: a.data.as_ptr(), a_row: a.row_stride, a_col: a.col_stride, m, k, start };
            let mut j = 0;
            let columns = |j: usize, c: &mut TileMut<'_>| Columns {
                b: b.data[j.min(b.data.len())..].as_ptr(),
                b_stride: b.stride,
                c: c.data[j..].as_mut_ptr(),
                c_stride: c.stride,
            };
            let mut c = c;
            while j + 2 * S::f32s::LEN <= n {
                // SAFETY: the asserts above put A, and columns `j..j + width <= n` of B and C, inside their slices; C is
                // borrowed mutably, so it overlaps neither A nor B.
                unsafe { strip.run::<S, S::f32s, 2>(simd, columns(j, &mut c)) };
                j += 2 * S::f32s::LEN;
            }
            if j + S::f32s::LEN <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, S::f32s, 1>(simd, columns(j, &mut c)) };
                j += S::f32s::LEN;
            }
            if S::f32s::LEN > 8 && j + 8 <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, f32x8<S>, 1>(simd, columns(j, &mut c)) };
                j += 8;
            }
            while j + 4 <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, f32x4<S>, 1>(simd, columns(j, &mut c)) };
                j += 4;
            }
            for j in j..n {
                strip.scalar_column(a.data, b.data, b.stride, &mut c, j);
            }
        },
    );
}

/// Numbers of `A` for a register tile: where they start, how far it is to the next row and to the next step.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    pub(super) at: *const f32,
    pub(super) row: usize,
    pub(super) step: usize,
}

/// The rows `FROM..` of a register tile over `k` steps.
///
/// # Safety
/// Those rows of `a` and as many of `b`, `VECTORS` vectors wide, must lie inside live allocations for `k` steps.
// Indexed by constants once unrolled: then the sums stay in registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub(super) unsafe fn steps<
    S: Simd,
    V: SimdFloat<S, Element = f32>,
    const ROWS: usize,
    const VECTORS: usize,
    const FROM: usize,
>(
    simd: S,
    acc: &mut [[V; VECTORS]; ROWS],
    a: Lanes,
    (mut b, b_stride): (*const f32, usize),
    k: usize,
) {
    let mut at = a.at;
    for _ in 0..k {
        // SAFETY: step `p < k`: `b` is row `p` of B's columns, `at` is column `p` of A; all reads are inside by the caller's
        // promise. `wrapping_add` below may step past the end after the last read only.
        unsafe {
            let b_row: [V; VECTORS] = std::array::from_fn(|v| {
                V::from_slice(simd, std::slice::from_raw_parts(b.add(v * V::LEN), V::LEN))
            });
            for r in FROM..ROWS {
                let a_rp = V::splat(simd, *at.add(r * a.row));
                for v in 0..VECTORS {
                    acc[r][v] = a_rp.mul_add(b_row[v], acc[r][v]);
                }
            }
        }
        at = at.wrapping_add(a.step);
        b = b.wrapping_add(b_stride);
    }
}

/// A strip of `C`, all rows of some columns: where those columns of `B` and `C` start.
struct Columns {
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
}

/// `A` and the sizes, the same for all strips.
struct Strip {
    a: *const f32,
    a_row: usize,
    a_col: usize,
    m: usize,
    k: usize,
    start: Start,
}

impl Strip {
    /// All rows of `VECTORS` vectors of columns.
    ///
    /// # Safety
    /// `A [m, k]` and the strip's columns of `B [k, ..]` and `C [m, ..]` must lie inside live allocations, and `C`
    /// must not overlap the others.
    #[inline(always)]
    unsafe fn run<S: Simd, V: SimdFloat<S, Element = f32>, const VECTORS: usize>(
        &self,
        simd: S,
        at: Columns,
    ) {
        let mut i = 0;
        if V::LEN == 16 || (V::LEN == 4 && cfg!(target_arch = "aarch64")) {
            // SAFETY: the caller's promise, passed on.
            i = unsafe { self.tiles::<S, V, 8, VECTORS>(simd, &at, i) };
        } else if V::LEN == 8 && S::f32s::LEN == 8 {
            // Rows that would leave two over are done as four and four: two rows run at half the speed.
            let rest = if self.m % 6 == 2 { self.m.min(8) } else { self.m % 6 };
            let sixes = Self { m: self.m - rest, ..*self };
            // SAFETY: as above, with no more rows.
            i = unsafe { sixes.tiles::<S, V, 6, VECTORS>(simd, &at, i) };
        }
        // SAFETY: as above.
        i = unsafe { self.tiles::<S, V, 4, VECTORS>(simd, &at, i) };
        // SAFETY: as above.
        i = unsafe { self.tiles::<S, V, 2, VECTORS>(simd, &at, i) };
        // SAFETY: as above.
        unsafe { self.tiles::<S, V, 1, VECTORS>(simd, &at, i) };
    }

    /// As many tiles of `ROWS` rows as fit from row `i` on; returns the first row left.
    ///
    /// # Safety
    /// As [`Strip::run`].
    #[inline(always)]
    unsafe fn tiles<S: Simd, V: SimdFloat<S, Element = f32>, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        at: &Columns,
        mut i: usize,
    ) -> usize {
        while self.m - i >= ROWS {
            // SAFETY: rows `i..i + ROWS <= m`, with the caller's promise for the rest.
            unsafe { self.tile::<S, V, ROWS, VECTORS>(simd, at, i) };
            i += ROWS;
        }
        i
    }

    /// One register tile: rows `i..i + ROWS` of `VECTORS` vectors of columns.
    ///
    /// # Safety
    /// As [`Strip::run`], with `i + ROWS <= m`.
    #[inline(always)]
    unsafe fn tile<S: Simd, V: SimdFloat<S, Element = f32>, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        at: &Columns,
        i: usize,
    ) {
        let mut acc = [[V::splat(simd, 0.0); VECTORS]; ROWS];
        let (a, b) =
            (Lanes { at: self.a.wrapping_add(i * self.a_row), row: self.a_row, step: self.a_col }, at);
        // SAFETY: rows `i..i + ROWS` of A's `k` columns and as many rows of B's columns are inside (caller).
        unsafe { steps::<S, V, ROWS, VECTORS, 0>(simd, &mut acc, a, (b.b, b.b_stride), self.k) };
        for (r, row) in acc.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                // SAFETY: rows `i + r < m` and the strip's columns of C are inside, and nothing else refers to them.
                let c = unsafe {
                    let first = at.c.add((i + r) * at.c_stride + v * V::LEN);
                    std::slice::from_raw_parts_mut(first, V::LEN)
                };
                let sum = if self.start == Start::Keep { *sum + V::from_slice(simd, c) } else { *sum };
                sum.store_slice(c);
            }
        }
    }

    /// One column, when fewer than four are left.
    #[inline(always)]
    fn scalar_column(&self, a: &[f32], b: &[f32], b_stride: usize, c: &mut TileMut<'_>, j: usize) {
        for i in 0..self.m {
            let mut sum = 0.0;
            for p in 0..self.k {
                sum += a[i * self.a_row + p * self.a_col] * b[p * b_stride + j];
            }
            let c = &mut c.data[i * c.stride + j];
            *c = if self.start == Start::Keep { *c + sum } else { sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, SimdOp};

    struct Product<'a> {
        size: [usize; 3],
        a: Lhs<'a>,
        b: Rhs<'a>,
        c: TileMut<'a>,
        start: Start,
    }

    impl SimdOp for Product<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            product(simd, self.size, self.a, self.b, self.c, self.start);
        }
    }

    fn numbers(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * seed).sin()).collect()
    }

    #[test]
    fn every_size_around_the_tiles_equals_the_triple_loop() {
        for isa in Isa::available() {
            for m in [0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17] {
                for n in [0, 1, 3, 4, 7, 8, 12, 15, 16, 17, 31, 32, 33, 47, 64, 70] {
                    for k in [0, 1, 2, 7, 16] {
                        for (row_stride, col_stride) in [(k + 2, 1), (1, m + 1)] {
                            check(isa, [m, n, k], row_stride, col_stride);
                        }
                    }
                }
            }
        }
    }

    fn check(isa: Isa, [m, n, k]: [usize; 3], row_stride: usize, col_stride: usize) {
        let (b_stride, c_stride) = (n + 3, n + 1);
        let a = numbers(m * row_stride + k * col_stride + 1, 0.37);
        let b = numbers(k * b_stride + n, 0.73);
        for start in [Start::Zero, Start::Keep] {
            // NaN in the padding must survive, and with `Zero` must not be read.
            let mut c = vec![f32::NAN; m * c_stride + n];
            if start == Start::Keep {
                (0..m).for_each(|i| c[i * c_stride..][..n].copy_from_slice(&numbers(n, i as f32 + 0.5)));
            }
            let before = c.clone();
            isa.run(Product {
                size: [m, n, k],
                a: Lhs { data: &a, row_stride, col_stride },
                b: Rhs { data: &b, stride: b_stride },
                c: TileMut { data: &mut c, stride: c_stride },
                start,
            });
            for (at, (&got, &was)) in c.iter().zip(&before).enumerate() {
                let (i, j) = (at / c_stride, at % c_stride);
                if i >= m || j >= n {
                    assert_eq!(got.to_bits(), was.to_bits(), "{isa} {m}x{n}x{k}: padding at {i}, {j}");
                    continue;
                }
                let term = |p| f64::from(a[i * row_stride + p * col_stride]) * f64::from(b[p * b_stride + j]);
                let sum: f64 = (0..k).map(term).sum();
                let want = if start == Start::Keep { f64::from(was) + sum } else { sum };
                assert!(
                    (f64::from(got) - want).abs() <= 1e-5,
                    "{isa} {m}x{n}x{k} {start:?}: C[{i}, {j}] {got} {want}"
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "B is shorter")]
    fn strides_that_wrap_around_are_refused() {
        // 2 * 2^63 is 0 in 64 bits.
        Isa::Portable.run(Product {
            size: [2, 4, 3],
            a: Lhs { data: &[0.0; 6], row_stride: 3, col_stride: 1 },
            b: Rhs { data: &[0.0; 12], stride: 1 << 63 },
            c: TileMut { data: &mut [0.0; 8], stride: 4 },
            start: Start::Zero,
        });
    }

    #[test]
    #[should_panic(expected = "B is shorter")]
    fn short_matrices_are_refused() {
        Isa::Portable.run(Product {
            size: [2, 4, 3],
            a: Lhs { data: &[0.0; 6], row_stride: 3, col_stride: 1 },
            b: Rhs { data: &[0.0; 11], stride: 4 },
            c: TileMut { data: &mut [0.0; 8], stride: 4 },
            start: Start::Zero,
        });
    }
}
