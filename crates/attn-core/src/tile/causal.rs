//! `C = scale (f o A B + tril(W) V)` on a register tile: what rows read of a past that all see, and of their own time.
//!
//! Row `i` of `W` has columns for those rows of `V` that row `i` sees: some for the first, as many more for each that
//! follows. The others are neither read nor multiplied with, so a NaN in a row of `V` reaches exactly the rows that see it.
//! Both sums stay in registers, as in [`super::product()`]: first the steps of `A`, then those of `W`, in order.
#![allow(unsafe_code)]

use super::product::{Lanes, steps};
use super::{Lhs, Rhs};
use crate::simd::{Simd, SimdBase, SimdFloat};
use crate::view::RowsMut;
use fearless_simd::{f32x4, f32x8};

/// The two products.
#[derive(Debug, Clone, Copy)]
pub struct CausalProduct<'a> {
    /// `A [m, k]`.
    pub a: Lhs<'a>,
    /// `B [k, n]`.
    pub b: Rhs<'a>,
    /// Steps of `A B`.
    pub k: usize,
    /// What row `i` of `A B` is multiplied with, `[m]`; empty is 1.
    pub factors: &'a [f32],
    /// `W [m, most]`.
    pub w: Lhs<'a>,
    /// `V [most, n]`.
    pub v: Rhs<'a>,
    /// Rows of `V` that the first row sees,
    pub first: usize,
    /// how many more each following row does,
    pub each: usize,
    /// and how many there are.
    pub most: usize,
    /// Multiplies all of it.
    pub scale: f32,
}

impl CausalProduct<'_> {
    #[inline(always)]
    fn seen(&self, i: usize) -> usize {
        (self.first + i * self.each).min(self.most)
    }
}

/// Fills the rows of `out [m, n]`; see the module.
///
/// # Panics
/// If one of the slices is shorter than its matrix.
#[inline(always)]
pub fn causal_product<S: Simd>(simd: S, x: &CausalProduct<'_>, out: &mut RowsMut<'_, f32>) {
    let (m, n) = (out.len(), out.width());
    if m == 0 || n == 0 {
        return;
    }
    let last =
        |rows: usize, stride: usize, width: usize| (rows - 1).saturating_mul(stride).saturating_add(width);
    for (what, a, b, k) in
        [("A B", x.a, x.b, x.k), ("W V", x.w, x.v, x.seen(m - 1))].into_iter().filter(|x| x.3 > 0)
    {
        assert!(b.data.len() >= last(k, b.stride, n), "{what} is shorter than {k} x {n}");
        let a_last = last(m, a.row_stride, 0).saturating_add(last(k, a.col_stride, 0));
        assert!(a.data.len() > a_last, "{what} is shorter than {m} x {k}");
    }
    assert!(x.factors.is_empty() || x.factors.len() >= m, "{} factors of {m} rows", x.factors.len());
    // Built once per instruction set, outside the engines' loops.
    simd.vectorize(
        #[inline(always)]
        || {
            let (c, c_stride) = out.as_mut_ptr();
            let strip = Strip { x, m, c, c_stride };
            let mut j = 0;
            while j + 2 * S::f32s::LEN <= n {
                // SAFETY: the asserts above put the rows, and columns `j..j + width <= n` of B and V, inside their slices; `out` is
                // the only access to its rows.
                unsafe { strip.run::<S, S::f32s, 2>(simd, j) };
                j += 2 * S::f32s::LEN;
            }
            if j + S::f32s::LEN <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, S::f32s, 1>(simd, j) };
                j += S::f32s::LEN;
            }
            if S::f32s::LEN > 8 && j + 8 <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, f32x8<S>, 1>(simd, j) };
                j += 8;
            }
            while j + 4 <= n {
                // SAFETY: as above.
                unsafe { strip.run::<S, f32x4<S>, 1>(simd, j) };
                j += 4;
            }
            for j in j..n {
                for i in 0..m {
                    // SAFETY: number `j < n` of row `i < m`.
                    unsafe { *c.add(i * c_stride + j) = number(x, i, j) };
                }
            }
        },
    );
}

/// One number, where fewer than four columns are left.
#[inline(always)]
fn number(x: &CausalProduct<'_>, i: usize, j: usize) -> f32 {
    let term = |a: &Lhs<'_>, b: &Rhs<'_>, p: usize| {
        a.data[i * a.row_stride + p * a.col_stride] * b.data[p * b.stride + j]
    };
    let mut sum = (0..x.k).fold(0.0, |sum, p| sum + term(&x.a, &x.b, p));
    if let Some(factor) = x.factors.get(i) {
        sum *= factor;
    }
    x.scale * (0..x.seen(i)).fold(sum, |sum, p| sum + term(&x.w, &x.v, p))
}

/// All rows of some columns.
struct Strip<'a> {
    x: &'a CausalProduct<'a>,
    m: usize,
    c: *mut f32,
    c_stride: usize,
}

impl Strip<'_> {
    /// `VECTORS` vectors of columns from `j` on, in the register tiles of [`super::product()`].
    ///
    /// # Safety
    /// All rows, and those columns of `B`, `V` and `C`, must lie inside live allocations, and nothing else refer to `C`.
    #[inline(always)]
    unsafe fn run<S: Simd, V: SimdFloat<S, Element = f32>, const VECTORS: usize>(&self, simd: S, j: usize) {
        let mut i = 0;
        if V::LEN == 16 || (V::LEN == 4 && cfg!(target_arch = "aarch64")) {
            // SAFETY: the caller's promise, passed on.
            i = unsafe { self.tiles::<S, V, 8, VECTORS>(simd, j, i) };
        }
        // SAFETY: as above.
        i = unsafe { self.tiles::<S, V, 4, VECTORS>(simd, j, i) };
        // SAFETY: as above.
        unsafe { self.tiles::<S, V, 1, VECTORS>(simd, j, i) };
    }

    /// As many tiles of `ROWS` rows as fit from row `i` on; returns the first row left.
    ///
    /// # Safety
    /// As [`Strip::run`].
    #[inline(always)]
    unsafe fn tiles<S: Simd, V: SimdFloat<S, Element = f32>, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        j: usize,
        mut i: usize,
    ) -> usize {
        while self.m - i >= ROWS {
            // SAFETY: rows `i..i + ROWS <= m`, with the caller's promise for the rest.
            unsafe { self.tile::<S, V, ROWS, VECTORS>(simd, j, i) };
            i += ROWS;
        }
        i
    }

    /// One register tile: rows `i..i + ROWS`.
    // Indexed by constants once unrolled; over slices of a length that is not known the sums would go through memory.
    #[allow(clippy::needless_range_loop)]
    ///
    /// # Safety
    /// As [`Strip::run`], with `i + ROWS <= m`.
    #[inline(always)]
    unsafe fn tile<S: Simd, V: SimdFloat<S, Element = f32>, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        j: usize,
        i: usize,
    ) {
        let x = self.x;
        let lanes = |a: &Lhs<'_>, p: usize| Lanes {
            at: a.data.as_ptr().wrapping_add(i * a.row_stride + p * a.col_stride),
            row: a.row_stride,
            step: a.col_stride,
        };
        let rows = |b: &Rhs<'_>, p: usize| (b.data.as_ptr().wrapping_add(p * b.stride + j), b.stride);
        let mut acc = [[V::splat(simd, 0.0); VECTORS]; ROWS];
        // SAFETY: rows of A and B's columns are inside (caller).
        unsafe { steps::<S, V, ROWS, VECTORS, 0>(simd, &mut acc, lanes(&x.a, 0), rows(&x.b, 0), x.k) };
        if !x.factors.is_empty() {
            let factors = &x.factors[i..i + ROWS];
            for r in 0..ROWS {
                let factor = V::splat(simd, factors[r]);
                for v in 0..VECTORS {
                    acc[r][v] = factor * acc[r][v];
                }
            }
        }
        let first = x.seen(i);
        // SAFETY: rows of W and V's columns up to `seen` of each are inside (caller).
        unsafe { steps::<S, V, ROWS, VECTORS, 0>(simd, &mut acc, lanes(&x.w, 0), rows(&x.v, 0), first) };
        // By name: in a loop the sums would leave the registers.
        macro_rules! rows_from {
            ($more:expr, $($row:literal)*) => {
                $(if $row < ROWS {
                    let (more, done) = $more($row);
                    // SAFETY: as above: the rows from this one on see these columns too.
                    unsafe { steps::<S, V, ROWS, VECTORS, $row>(simd, &mut acc, lanes(&x.w, done), rows(&x.v, done), more) };
                })*
            };
        }
        if x.seen(i + ROWS - 1) == first + ROWS - 1 {
            // One more each; a step known to be one needs no loop.
            rows_from!(|row: usize| (1, first + row - 1), 1 2 3 4 5 6 7);
        } else {
            let seen = |row: usize| x.seen(i + row);
            rows_from!(|row: usize| (seen(row) - seen(row - 1), seen(row - 1)), 1 2 3 4 5 6 7);
        }
        let scale = V::splat(simd, x.scale);
        for (r, row) in acc.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                // SAFETY: rows `i + r < m` and these columns of C are inside, and nothing else refers to them.
                let c = unsafe {
                    let first = self.c.add((i + r) * self.c_stride + j + v * V::LEN);
                    std::slice::from_raw_parts_mut(first, V::LEN)
                };
                (scale * sum).store_slice(c);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, SimdOp};

    struct Run<'a, 'o>(CausalProduct<'a>, RowsMut<'o, f32>);

    impl SimdOp for Run<'_, '_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(mut self, simd: S) {
            causal_product(simd, &self.0, &mut self.1);
        }
    }

    fn numbers(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * seed).sin()).collect()
    }

    #[test]
    fn every_size_around_the_tiles_equals_the_loops_and_sees_no_more() {
        for isa in Isa::available() {
            for m in [1, 3, 7, 8, 9, 16, 21] {
                for n in [1, 4, 11, 16, 32, 39] {
                    for (k, first, each, most) in [(5, 1, 1, 99), (0, 2, 3, 40), (9, 0, 0, 0), (3, 4, 2, 9)] {
                        let (a, b) = (numbers(m * 12, 0.3), numbers(9 * 41, 0.7));
                        let (w, v) = (numbers(m * 100, 0.9), numbers(100 * 41, 0.2));
                        let factors = numbers(if n % 2 == 0 { m } else { 0 }, 0.4);
                        let mut v = v;
                        let seen = |i: usize| (first + i * each).min(most);
                        v[seen(m - 1) * 41..].fill(f32::NAN);
                        let x = CausalProduct {
                            a: Lhs { data: &a, row_stride: 12, col_stride: 1 },
                            b: Rhs { data: &b, stride: 41 },
                            k,
                            factors: &factors,
                            w: Lhs { data: &w, row_stride: 100, col_stride: 1 },
                            v: Rhs { data: &v, stride: 41 },
                            first,
                            each,
                            most,
                            scale: 0.5,
                        };
                        let mut out = vec![f32::INFINITY; m * (n + 2)];
                        isa.run(Run(x, RowsMut::new(&mut out[..m * (n + 2) - 2], n, n + 2)));
                        for (at, got) in out.iter().enumerate() {
                            let (i, j) = (at / (n + 2), at % (n + 2));
                            if j >= n {
                                assert_eq!(*got, f32::INFINITY, "{isa}: written beyond row {i}");
                                continue;
                            }
                            let f = f64::from;
                            let past: f64 = (0..k).map(|p| f(a[i * 12 + p]) * f(b[p * 41 + j])).sum();
                            let own: f64 = (0..seen(i)).map(|p| f(w[i * 100 + p]) * f(v[p * 41 + j])).sum();
                            let want = 0.5 * (past * factors.get(i).map_or(1.0, |x| f(*x)) + own);
                            let error = (f(*got) - want).abs();
                            assert!(error < 1e-5, "{isa} {m} x {n}, {k} + {first}: {i} {j} {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "W V is shorter")]
    fn short_matrices_are_refused() {
        let (none, mut out) = ([], [0.0; 8]);
        let (a, b) = (Lhs { data: &none, row_stride: 1, col_stride: 1 }, Rhs { data: &none, stride: 4 });
        let x =
            CausalProduct { a, b, k: 0, factors: &[], w: a, v: b, first: 1, each: 1, most: 2, scale: 1.0 };
        Isa::Portable.run(Run(x, RowsMut::new(&mut out, 4, 4)));
    }
}
