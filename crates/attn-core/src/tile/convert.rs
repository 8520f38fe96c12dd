//! Storage types into f32 vectors, in registers.
//!
//! bf16 is the upper half of an f32. int8 widens and converts. f16 has instructions with AVX2 and AVX-512; elsewhere its
//! exponent and mantissa are shifted into place and multiplied with `2^112`, which is exact, subnormal numbers included.

use crate::simd::{Bytes, Select, Simd, SimdBase, SimdInt, SimdWiden};
use crate::view::Rows;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A number as a cache stores it.
pub trait Stored: Copy + Send + Sync + 'static {
    /// Zero, to pad with.
    const NOTHING: Self;

    /// Four vectors from the first `4 LEN` numbers.
    fn load4<S: Simd>(simd: S, from: &[Self]) -> [S::f32s; 4];
}

impl Stored for f32 {
    const NOTHING: Self = 0.0;

    #[inline(always)]
    fn load4<S: Simd>(simd: S, from: &[Self]) -> [S::f32s; 4] {
        let width = S::f32s::LEN;
        let from = &from[..4 * width];
        let mut four = [S::f32s::splat(simd, 0.0); 4];
        for (vector, from) in four.iter_mut().zip(from.chunks_exact(width)) {
            *vector = S::f32s::from_slice(simd, from);
        }
        four
    }
}

impl Stored for bf16 {
    const NOTHING: Self = bf16::ZERO;

    #[inline(always)]
    fn load4<S: Simd>(simd: S, from: &[Self]) -> [S::f32s; 4] {
        #[cfg(target_arch = "x86_64")]
        if let fearless_simd::Level::Avx512(token) = simd.level() {
            return x86::quarters(simd, token, from.reinterpret_cast(), x86::bf16);
        }
        words::<S>(simd, from.reinterpret_cast()).map(
            #[inline(always)]
            |word| (word << 16).bitcast(),
        )
    }
}

impl Stored for f16 {
    const NOTHING: Self = f16::ZERO;

    #[inline(always)]
    fn load4<S: Simd>(simd: S, from: &[Self]) -> [S::f32s; 4] {
        let bits = from.reinterpret_cast();
        #[cfg(target_arch = "x86_64")]
        match simd.level() {
            fearless_simd::Level::Avx512(token) => {
                return x86::quarters(simd, token, bits, x86::f16);
            }
            fearless_simd::Level::Avx2(token) => return x86::avx2::<S>(simd, token, bits),
            _ => {}
        }
        words::<S>(simd, bits).map(
            #[inline(always)]
            |word| {
                let magnitude: S::f32s = ((word & 0x7fff) << 13).bitcast();
                let finite: S::u32s = (magnitude * f32::from_bits(0x7780_0000)).bitcast(); // 2^112
                // Infinity and NaN have the largest exponent in both formats.
                let special = (word & 0x7c00).simd_eq(S::u32s::splat(simd, 0x7c00));
                let bits = special.select(finite | 0x7f80_0000, finite);
                (bits | ((word & 0x8000) << 16)).bitcast()
            },
        )
    }
}

impl Stored for i8 {
    const NOTHING: Self = 0;

    #[inline(always)]
    fn load4<S: Simd>(simd: S, from: &[Self]) -> [S::f32s; 4] {
        #[cfg(target_arch = "x86_64")]
        if let fearless_simd::Level::Avx512(token) = simd.level() {
            return x86::quarters(simd, token, from, x86::int8);
        }
        let (low, high) = S::i8s::from_slice(simd, &from[..S::i8s::LEN]).widen();
        let ((a, b), (c, d)) = (low.widen(), high.widen());
        [a.to_float(), b.to_float(), c.to_float(), d.to_float()]
    }
}

/// `4 LEN` sixteen-bit numbers as words.
#[inline(always)]
fn words<S: Simd>(simd: S, from: &[u16]) -> [S::u32s; 4] {
    let half = S::u16s::LEN;
    let (a, b) = S::u16s::from_slice(simd, &from[..half]).widen();
    let (c, d) = S::u16s::from_slice(simd, &from[half..2 * half]).widen();
    [a, b, c, d]
}

/// Conversions that widen straight from memory, where the general way takes three shuffles for two vectors.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::simd::{Simd, SimdBase};
    use fearless_simd::{Avx2, Avx512, SimdInto, f32x8, f32x16, i8x16, u16x8, u16x16};
    use std::arch::x86_64::{
        __m128i, __m256, __m256i, __m512, _mm256_cvtph_ps, _mm512_castsi512_ps, _mm512_cvtepi8_epi32,
        _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_slli_epi32,
    };

    fearless_simd::kernel!(
        #[inline(always)]
        fn f16_512(token: Avx512, x: __m256i) -> __m512 {
            let _ = token;
            _mm512_cvtph_ps(x)
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        fn bf16_512(token: Avx512, x: __m256i) -> __m512 {
            let _ = token;
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        fn int8_512(token: Avx512, x: __m128i) -> __m512 {
            let _ = token;
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))
        }
    );

    fearless_simd::kernel!(
        #[inline(always)]
        fn cvt256(token: Avx2, x: __m128i) -> __m256 {
            let _ = token;
            _mm256_cvtph_ps(x)
        }
    );

    #[inline(always)]
    pub(super) fn f16(token: Avx512, from: &[u16]) -> f32x16<Avx512> {
        f16_512(token, u16x16::from_slice(token, from).into()).simd_into(token)
    }

    #[inline(always)]
    pub(super) fn bf16(token: Avx512, from: &[u16]) -> f32x16<Avx512> {
        bf16_512(token, u16x16::from_slice(token, from).into()).simd_into(token)
    }

    #[inline(always)]
    pub(super) fn int8(token: Avx512, from: &[i8]) -> f32x16<Avx512> {
        int8_512(token, i8x16::from_slice(token, from).into()).simd_into(token)
    }

    /// Four vectors by `convert`.
    #[inline(always)]
    pub(super) fn quarters<S: Simd, E>(
        simd: S,
        token: Avx512,
        from: &[E],
        convert: impl Fn(Avx512, &[E]) -> f32x16<Avx512>,
    ) -> [S::f32s; 4] {
        let mut four = [S::f32s::splat(simd, 0.0); 4];
        for (vector, from) in four.iter_mut().zip(from[..64].chunks_exact(16)) {
            *vector = S::f32s::from_slice(simd, convert(token, from).as_slice());
        }
        four
    }

    #[inline(always)]
    pub(super) fn avx2<S: Simd>(simd: S, token: Avx2, from: &[u16]) -> [S::f32s; 4] {
        let mut four = [S::f32s::splat(simd, 0.0); 4];
        for (vector, from) in four.iter_mut().zip(from[..32].chunks_exact(8)) {
            let wide: f32x8<Avx2> = cvt256(token, u16x8::from_slice(token, from).into()).simd_into(token);
            *vector = S::f32s::from_slice(simd, wide.as_slice());
        }
        four
    }
}

/// The first `4 LEN` numbers of `from`, or as many as there are and then zeros.
#[inline(always)]
fn load4_padded<S: Simd, E: Stored>(simd: S, from: &[E]) -> [S::f32s; 4] {
    let width = 4 * S::f32s::LEN;
    if from.len() >= width {
        return E::load4(simd, from);
    }
    let mut padded = [E::NOTHING; 4 * super::MAX_LANES];
    padded[..from.len()].copy_from_slice(from);
    E::load4(simd, &padded[..width])
}

/// Copies rows into `out [len, width]` as f32, in vectors.
///
/// # Panics
/// If `out` is shorter.
#[inline(always)]
pub fn read_rows<S: Simd, E: Stored>(simd: S, rows: Rows<'_, E>, out: &mut [f32]) {
    let (width, step) = (rows.width(), 4 * S::f32s::LEN);
    if width == 0 {
        return;
    }
    for (row, out) in rows.iter().zip(out[..rows.len() * width].chunks_exact_mut(width)) {
        for (from, to) in row.chunks(step).zip(out.chunks_mut(step)) {
            let four = load4_padded(simd, from);
            // By reference: an array that is iterated by value goes through memory, vector by vector.
            if to.len() == step {
                for (to, vector) in to.chunks_exact_mut(S::f32s::LEN).zip(&four) {
                    vector.store_slice(to);
                }
            } else {
                let mut padded = [0.0; 4 * super::MAX_LANES];
                for (to, vector) in padded.chunks_exact_mut(S::f32s::LEN).zip(&four) {
                    vector.store_slice(to);
                }
                to.copy_from_slice(&padded[..to.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, SimdOp};

    struct Load<'a, E>(&'a [E]);

    impl<E: Stored> SimdOp for Load<'_, E> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut all = vec![f32::NAN; self.0.len()];
            read_rows(simd, Rows::new(self.0, 1, self.0.len(), 0), &mut all);
            all
        }
    }

    fn check<E: Stored>(numbers: &[E], exact: impl Fn(E) -> f32) {
        for isa in Isa::available() {
            for len in [1, 3, 15, 16, 17, 31, 64, 65, 100, numbers.len()] {
                let got = isa.run(Load(&numbers[..len]));
                for (at, (got, x)) in got.iter().zip(numbers).enumerate() {
                    let want = exact(*x);
                    let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                    assert!(same, "{isa}, number {at} of {len}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn every_number_of_every_type() {
        let all = || 0..=u16::MAX;
        check(&all().map(f16::from_bits).collect::<Vec<_>>(), f16::to_f32);
        check(&all().map(bf16::from_bits).collect::<Vec<_>>(), bf16::to_f32);
        check(&(0..1000).map(|x| x as i8).collect::<Vec<_>>(), f32::from);
        check(&(0..1000).map(|x| x as f32 / 7.0).collect::<Vec<_>>(), |x| x);
    }
}
