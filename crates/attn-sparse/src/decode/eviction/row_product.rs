//! One row times a matrix: what a single query asks of a cache.

use super::slots::LANES;
use attn_core::simd::{Simd, SimdBase, SimdFloat};

/// `c [n] = a [k] * b [k, n]` with the rows of `b` `stride` apart. `n` is a multiple of [`LANES`]; each element is summed in
/// the order of `k`.
///
/// Four vectors of columns at a time, so that four sums are under way: a tile of many rows has no use for one.
#[inline(always)]
pub(super) fn row_product<S: Simd>(simd: S, a: &[f32], b: &[f32], stride: usize, c: &mut [f32]) {
    debug_assert!(c.len().is_multiple_of(LANES) && c.len() <= stride);
    simd.vectorize(
        #[inline(always)]
        || {
            let (mut first, mut wide) = (0, c.chunks_exact_mut(4 * S::f32s::LEN));
            for c in &mut wide {
                strip::<S, 4>(simd, a, &b[first.min(b.len())..], stride, c);
                first += c.len();
            }
            for c in wide.into_remainder().chunks_exact_mut(S::f32s::LEN) {
                strip::<S, 1>(simd, a, &b[first.min(b.len())..], stride, c);
                first += c.len();
            }
        },
    );
}

/// `N` vectors of columns.
#[inline(always)]
fn strip<S: Simd, const N: usize>(simd: S, a: &[f32], b: &[f32], stride: usize, c: &mut [f32]) {
    let mut sums = [S::f32s::splat(simd, 0.0); N];
    for (a, b) in a.iter().zip(b.chunks(stride)) {
        let a = S::f32s::splat(simd, *a);
        for (sum, b) in sums.iter_mut().zip(b.chunks_exact(S::f32s::LEN)) {
            *sum = a.mul_add(S::f32s::from_slice(simd, b), *sum);
        }
    }
    for (sum, c) in sums.iter().zip(c.chunks_exact_mut(S::f32s::LEN)) {
        sum.store_slice(c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::{Isa, SimdOp};

    struct RowProduct<'a>([&'a [f32]; 2], usize, &'a mut [f32]);

    impl SimdOp for RowProduct<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            let Self([a, b], stride, c) = self;
            row_product(simd, a, b, stride, c);
        }
    }

    #[test]
    fn it_equals_the_double_loop() {
        for isa in Isa::available() {
            for (k, n, stride) in [(0, 16, 16), (1, 16, 32), (7, 48, 48), (30, 64, 80), (5, 208, 208)] {
                let numbers = |n: usize, by: f32| (0..n).map(|x| (x as f32 * by).sin()).collect::<Vec<f32>>();
                let (a, b) = (numbers(k, 0.7), numbers(k * stride, 0.3));
                let mut c = vec![f32::NAN; n];
                isa.run(RowProduct([&a, &b], stride, &mut c));
                for (j, c) in c.iter().enumerate() {
                    let want: f64 = (0..k).map(|p| f64::from(a[p]) * f64::from(b[p * stride + j])).sum();
                    assert!((f64::from(*c) - want).abs() < 1e-5, "{isa}, {k} x {n}: {c}, not {want}");
                }
            }
        }
    }
}
