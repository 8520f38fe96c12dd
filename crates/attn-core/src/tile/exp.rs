//! `2^x` by range reduction: `x = n + f` with `n` the nearest integer, `2^x = 2^n p(f)`.
//!
//! `p` is the minimax polynomial of degree 5 for `2^f` on `[-1/2, 1/2]`, relative error 7.5e-8 (computed with the
//! Remez exchange in 40 digits). `2^n` is added to the exponent bits; AVX-512 has instructions for `f` and for the scaling,
//! which leaves 9 instructions of 12.

use crate::simd::{Bytes, Select, Simd, SimdBase, SimdFloat};

/// Coefficients of `f^0 .. f^5`.
const P: [f32; 6] = [1.000_000_1, 0.693_146_97, 0.240_221_2, 0.055_507_133, 0.009_675_541, 0.001_327_647_2];

/// `2^x` for `x <= 127` (for larger ones see [`exp2_overflows`]), relative error below 2.5e-7; 0 below -126 and for -inf; NaN for NaN.
///
/// Masked scores are -inf, so a hidden key gets a weight of exactly 0.
#[inline(always)]
pub fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    if let fearless_simd::Level::Avx512(token) = simd.level() {
        // Known when compiling; the copies through an array vanish.
        let mut lanes = [0.0; 16];
        x.store_slice(&mut lanes);
        return S::f32s::from_slice(simd, &avx512::exp2(token, lanes));
    }
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

/// Whether [`exp2`] gives infinity for every `x >= 128`; elsewhere it may give any number there.
#[inline(always)]
pub fn exp2_overflows<S: Simd>(simd: S) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let fearless_simd::Level::Avx512(_) = simd.level() {
        return true;
    }
    let _ = simd;
    false
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::P;
    use fearless_simd::{Avx512, Simd, SimdInto, f32x16};
    use std::arch::x86_64::{
        __m512, _CMP_NLT_UQ, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_maskz_scalef_ps, _mm512_reduce_ps,
        _mm512_roundscale_ps, _mm512_set1_ps,
    };

    #[inline(always)]
    pub(super) fn exp2(token: Avx512, x: [f32; 16]) -> [f32; 16] {
        let x: f32x16<Avx512> = x.simd_into(token);
        let y: f32x16<Avx512> = kernel(token, x.into()).simd_into(token);
        y.into()
    }

    fearless_simd::kernel!(
        #[inline(always)]
        fn kernel(token: Avx512, x: __m512) -> __m512 {
            let _ = token.level();
            let f = _mm512_reduce_ps::<0>(x); // x - n; 0 for infinities
            let n = _mm512_roundscale_ps::<0>(x);
            let mut p = _mm512_set1_ps(P[5]);
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[4]));
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[3]));
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[2]));
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[1]));
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[0]));
            // No denormal weights: they are slow to compute with.
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(normal, p, n)
        }
    );
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

    struct Overflows;

    impl SimdOp for Overflows {
        type Output = bool;

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) -> bool {
            exp2_overflows(simd)
        }
    }

    #[test]
    fn overflow_is_infinite_where_promised() {
        for isa in Isa::available().into_iter().filter(|isa| isa.run(Overflows)) {
            let mut got =
                [128.0, 129.0, 200.0, 1e4, 3e9, 1e20, f32::MAX, f32::INFINITY, 128.5, 255.0, 256.0, 1e10]
                    .repeat(4);
            isa.run(Exp2(&mut got));
            assert!(got.iter().all(|x| *x == f32::INFINITY), "{isa}: {got:?}");
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
