//! `2^x` by range reduction: `x = n + f` with `n` the nearest integer, `2^x = 2^n p(f)`.
//!
//! `p` is the minimax polynomial of degree 5 for `2^f` on `[-1/2, 1/2]`, relative error 7.5e-8 (computed with the
//! Remez exchange in 40 digits). `2^n` is added to the exponent bits.

use crate::simd::{Bytes, Select, Simd, SimdBase, SimdFloat};

/// Coefficients of `f^0 .. f^5`.
const P: [f32; 6] = [1.000_000_1, 0.693_146_97, 0.240_221_2, 0.055_507_133, 0.009_675_541, 0.001_327_647_2];

/// `2^x` for `x <= 127`, relative error below 2.5e-7; 0 below -126 and for -inf; NaN for NaN.
///
/// Masked scores are -inf, so a hidden key gets a weight of exactly 0.
#[inline(always)]
pub fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let n = x.round_ties_even();
    let f = x - n;
    let p = P
        .iter()
        .rev()
        .skip(1)
        .fold(S::f32s::splat(simd, P[5]), |p, &c| p.mul_add(f, S::f32s::splat(simd, c)));
    // For NaN the conversion gives 0 or the lowest integer; both leave the exponent bits as they are.
    let exponent = n.to_int::<S::i32s>() << 23;
    let scaled: S::f32s = (p.bitcast::<S::i32s>() + exponent).bitcast();
    x.simd_lt(S::f32s::splat(simd, -126.0)).select(S::f32s::splat(simd, 0.0), scaled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, SimdOp};

    struct Exp2<'a>(&'a mut [f32]);

    impl SimdOp for Exp2<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            for x in self.0.chunks_exact_mut(S::f32s::LEN) {
                exp2(simd, S::f32s::from_slice(simd, x)).store_slice(x);
            }
        }
    }

    #[test]
    fn error_stays_near_one_ulp() {
        for isa in Isa::available() {
            let xs: Vec<f32> = (0..=1 << 16).map(|i| -126.0 + 253.0 * i as f32 / 65536.0).collect();
            let mut got = xs.clone();
            got.resize(xs.len().next_multiple_of(16), 0.0);
            isa.run(Exp2(&mut got));
            for (x, got) in xs.iter().zip(&got) {
                let want = f64::from(*x).exp2();
                let error = (f64::from(*got) - want).abs() / want;
                assert!(error < 2.5e-7, "{isa}: 2^{x} = {got}, error {error:e}");
            }
        }
    }

    #[test]
    fn edges_are_exact() {
        for isa in Isa::available() {
            let edges = [f32::NEG_INFINITY, -1e30, -127.0, f32::NAN, -f32::NAN, 0.0, -0.0, 1.0];
            let mut got = [edges, edges].concat();
            isa.run(Exp2(&mut got));
            assert_eq!(got[..3], [0.0; 3], "{isa}");
            assert!(got[3].is_nan() && got[4].is_nan(), "{isa}");
            assert!(
                (got[5] - 1.0).abs() < 2e-7 && (got[6] - 1.0).abs() < 2e-7 && (got[7] - 2.0).abs() < 4e-7,
                "{isa}"
            );
        }
    }
}
