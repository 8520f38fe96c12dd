//! How an index stores its numbers: as f32, or as pairs of bf16 that are multiplied as such.
//!
//! A *unit* holds one channel or two. Products are exact in f32, and so are the sums as f32 sums are; where the CPU multiplies pairs
//! of bf16, it does so twice as fast.

use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Bf16Dot, Finish, Lhs, MAX_LANES, PairLhs, PairRhs, Rhs, Start, TileMut, product};
use half::bf16;

/// One or two channels.
pub(super) trait IndexNumber: Copy + Default + Send + Sync + 'static {
    /// Units that hold so many channels.
    fn units(width: usize) -> usize;

    /// Channels, rounded; a last unit that is not complete is filled with 0.
    fn pack(channels: impl Iterator<Item = f32>) -> impl Iterator<Item = Self>;

    /// `C = A B` over all channels, with `A [m, units]`, `B [units, n]`, `n` a multiple of 16. A number of `C` has the same bits
    /// whatever `m` and `n` are. `wide` is scratch.
    fn product<S: Simd>(
        simd: S,
        size: [usize; 3],
        a: Left<'_, Self>,
        b: Right<'_, Self>,
        c: TileMut<'_>,
        wide: &mut Vec<f32>,
    );
}

/// `A[i, p] = data[i * row_stride + p * col_stride]`.
pub(super) struct Left<'a, U> {
    pub(super) data: &'a [U],
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// `B[p, j] = data[p * stride + j]`.
pub(super) struct Right<'a, U> {
    pub(super) data: &'a [U],
    pub(super) stride: usize,
}

impl IndexNumber for f32 {
    fn units(width: usize) -> usize {
        width
    }

    fn pack(channels: impl Iterator<Item = f32>) -> impl Iterator<Item = f32> {
        channels
    }

    #[inline(always)]
    fn product<S: Simd>(
        simd: S,
        size: [usize; 3],
        a: Left<'_, f32>,
        b: Right<'_, f32>,
        c: TileMut<'_>,
        _: &mut Vec<f32>,
    ) {
        let a = Lhs { data: a.data, row_stride: a.row_stride, col_stride: a.col_stride };
        product(simd, size, a, Rhs { data: b.data, stride: b.stride }, c, Start::Zero);
    }
}

/// Two bf16, the first in the low half.
pub(super) type PairOfBf16 = u32;

impl IndexNumber for PairOfBf16 {
    fn units(width: usize) -> usize {
        width.div_ceil(2)
    }

    fn pack(mut channels: impl Iterator<Item = f32>) -> impl Iterator<Item = PairOfBf16> {
        let bits = |x: f32| u32::from(bf16::from_f32(x).to_bits());
        std::iter::from_fn(move || {
            let first = channels.next()?;
            Some(bits(first) | bits(channels.next().unwrap_or(0.0)) << 16)
        })
    }

    #[inline(always)]
    fn product<S: Simd>(
        simd: S,
        [m, n, units]: [usize; 3],
        a: Left<'_, PairOfBf16>,
        b: Right<'_, PairOfBf16>,
        c: TileMut<'_>,
        wide: &mut Vec<f32>,
    ) {
        let dot = if S::f32s::LEN == MAX_LANES { Bf16Dot::detect() } else { None };
        if let Some(dot) = dot {
            let a = PairLhs { data: a.data, row_stride: a.row_stride, col_stride: a.col_stride };
            let b = PairRhs { data: b.data, stride: b.stride };
            dot.product([m, n, units], a, b, c, Finish::Scale(1.0));
            return;
        }
        let (width, halves) =
            (2 * units, |pair: u32| [f32::from_bits(pair << 16), f32::from_bits(pair & !0xffff)]);
        wide.resize(wide.len().max((m + n) * width), 0.0);
        let (a_wide, b_wide) = wide.split_at_mut(m * width);
        for (i, row) in a_wide.chunks_exact_mut(width.max(1)).enumerate() {
            for (p, pair) in row.chunks_exact_mut(2).enumerate() {
                pair.copy_from_slice(&halves(a.data[i * a.row_stride + p * a.col_stride]));
            }
        }
        for (p, rows) in b_wide.chunks_exact_mut(2 * n.max(1)).take(units).enumerate() {
            let (first, second) = rows.split_at_mut(n);
            for ((first, second), pair) in first.iter_mut().zip(second).zip(&b.data[p * b.stride..]) {
                [*first, *second] = halves(*pair);
            }
        }
        let a = Lhs { data: a_wide, row_stride: width, col_stride: 1 };
        product(simd, [m, n, width], a, Rhs { data: b_wide, stride: n }, c, Start::Zero);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::{Isa, SimdOp};

    struct Product<'a>([usize; 3], &'a [u32], &'a [u32]);

    impl SimdOp for Product<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self([m, n, units], a, b) = self;
            let mut c = vec![f32::NAN; m * n];
            let (a, b) = (Left { data: a, row_stride: 1, col_stride: m }, Right { data: b, stride: n });
            let c_tile = TileMut { data: &mut c, stride: n };
            u32::product(simd, [m, n, units], a, b, c_tile, &mut vec![f32::NAN; 7]);
            c
        }
    }

    #[test]
    fn pairs_are_multiplied_as_their_numbers_are() {
        let number = |x: usize| bf16::from_f32(((x * 7919 % 1013) as f32 - 500.0) * 0.013).to_f32();
        for (m, n, width) in [(1, 16, 1), (5, 64, 7), (8, 32, 16)] {
            let units = u32::units(width);
            // `[units, m]` and `[units, n]`.
            let turned = |rows: usize, first: usize| -> Vec<u32> {
                let packed =
                    (0..rows).map(|row| u32::pack((0..width).map(move |c| number(first + row * width + c))));
                let rows: Vec<Vec<u32>> = packed.map(Iterator::collect).collect();
                (0..units).flat_map(|unit| rows.iter().map(move |row| row[unit])).collect()
            };
            let (a, b) = (turned(m, 0), turned(n, 5000));
            for isa in Isa::available() {
                let got = isa.run(Product([m, n, units], &a, &b));
                for (at, got) in got.into_iter().enumerate() {
                    let term = |c: usize| {
                        f64::from(number(at / n * width + c)) * f64::from(number(5000 + at % n * width + c))
                    };
                    let want = (0..width).map(term).sum::<f64>();
                    assert!((f64::from(got) - want).abs() < 1e-4, "{isa} {m} {n} {width} {at}: {got} {want}");
                }
            }
        }
    }
}
