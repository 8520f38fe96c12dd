//! Products of bf16 pairs, accumulated in f32: `C[m, n] += sum_p A[m, 2p] B[2p, n] + A[m, 2p + 1] B[2p + 1, n]`.
//!
//! A pair is two bf16 that follow each other along the contracted axis, the first in the low half of a `u32`. As in
//! [`product()`](super::product()), `A` is read by broadcast, a pair at a time and with any strides, and `B [pairs, n]` and `C [m, n]` by vectors
//! along `n`, on a register tile of 8 rows by 2 vectors.
//!
//! The instruction (`vdpbf16ps`) does twice the multiply-adds of f32. It differs from widening to f32 in this: it adds the
//! two products of a pair one after the other, takes denormal inputs as zero, gives zero for denormal results, and rounds
//! to nearest whatever the rounding mode. Products of bf16 are exact in f32, so the sums are as accurate as f32 sums.
//!
//! `unsafe` here is raw reads and writes that the asserts of the public functions cover, and the proof that the CPU has
//! the instruction.
#![allow(unsafe_code)]

use super::TileMut;
use half::bf16;
use std::ops::Range;

/// Proof that this CPU multiplies pairs of bf16; only [`Bf16Dot::detect`] makes one.
#[derive(Debug, Clone, Copy)]
pub struct Bf16Dot(Proof);

#[cfg(target_arch = "x86_64")]
type Proof = ();
/// No other architecture has a kernel: there is no proof.
#[cfg(not(target_arch = "x86_64"))]
type Proof = std::convert::Infallible;

/// `A[i, p] = data[i * row_stride + p * col_stride]`, a pair each.
#[derive(Debug, Clone, Copy)]
pub struct PairLhs<'a> {
    /// The pairs.
    pub data: &'a [u32],
    /// From one row to the next.
    pub row_stride: usize,
    /// From one pair of columns to the next.
    pub col_stride: usize,
}

/// `B[p, j] = data[p * stride + j]`, a pair each.
#[derive(Debug, Clone, Copy)]
pub struct PairRhs<'a> {
    /// The pairs.
    pub data: &'a [u32],
    /// From one pair of rows to the next.
    pub stride: usize,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Finish {
    /// `C = factor A B`; what `C` held is not read.
    Scale(f32),
    /// `C += A B`.
    Add,
}

/// Scores of two keys at a time, and what their weights are measured against.
#[derive(Debug)]
pub struct WeightRows<'a> {
    /// `[2 pairs, stride]` natural logarithms.
    pub scores: &'a [f32],
    /// `[pairs, stride]`: the weights, rounded to bf16.
    pub pairs: &'a mut [u32],
    /// `[stride]`, natural logarithms as the scores.
    pub reference: &'a [f32],
    /// `[stride]`: the sums of the rounded weights are added.
    pub sums: &'a mut [f32],
    /// The largest weight that is taken; [`WeightRows::ANY`] for no bound.
    pub most: bf16,
    /// From one row to the next.
    pub stride: usize,
}

impl WeightRows<'_> {
    /// No bound: above every weight, NaN of either sign included.
    pub const ANY: bf16 = bf16::from_bits(0xffff);
}

/// Lanes of the vectors: numbers of columns are multiples of it.
const LANES: usize = 16;

impl Bf16Dot {
    /// The proof, if this CPU has the instructions: AVX-512 with `avx512bf16`.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bf16")
        {
            return Some(Self(()));
        }
        None
    }

    /// `C = factor A B` or `C += A B` with `A [m, pairs]`, `B [pairs, n]`, `C [m, n]`.
    ///
    /// # Panics
    /// If `n` is no multiple of 16 or one of the slices is shorter than its matrix.
    pub fn product(
        self,
        [m, n, pairs]: [usize; 3],
        a: PairLhs<'_>,
        b: PairRhs<'_>,
        c: TileMut<'_>,
        finish: Finish,
    ) {
        assert!(n.is_multiple_of(LANES), "{n} columns are no multiple of {LANES}");
        if m == 0 || n == 0 {
            return;
        }
        let last = |rows: usize, stride: usize| (rows - 1) * stride + n;
        assert!(
            c.data.len() >= last(m, c.stride) && (m == 1 || c.stride >= n),
            "C is shorter than {m} x {n}"
        );
        if pairs > 0 {
            assert!(b.data.len() >= last(pairs, b.stride), "B is shorter than {pairs} x {n}");
            let a_last = (m - 1) * a.row_stride + (pairs - 1) * a.col_stride;
            assert!(a.data.len() > a_last, "A is shorter than {m} x {pairs}");
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` proves the instructions; the asserts above put A, B and C inside their slices.
        unsafe {
            x86::product([m, n, pairs], a, b, c, finish);
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = finish;
            match self.0 {}
        }
    }

    /// `weight = e^(score - reference)`, rounded to the nearest bf16, for the columns `lanes`; 0 for a score of -inf and
    /// below 2^-126, NaN for NaN. The power has a relative error of 8e-5, a fortieth of what the rounding may add.
    ///
    /// Returns whether all of them are at most `most`. If not, `sums` is as it was: the caller has to move the reference.
    ///
    /// # Panics
    /// If `lanes` does not start and end with multiples of 16 or a slice is too short for the rows of `scores`, which must
    /// be even in number.
    pub fn weights(self, rows: WeightRows<'_>, lanes: Range<usize>) -> bool {
        let WeightRows { scores, pairs, reference, sums, stride, .. } = &rows;
        let whole = lanes.start.is_multiple_of(LANES) && lanes.end.is_multiple_of(LANES);
        assert!(whole && lanes.start <= lanes.end && lanes.end <= *stride, "lanes {lanes:?} of {stride}");
        assert!(scores.len().is_multiple_of(2 * stride), "{} scores in pairs of {stride}", scores.len());
        assert!(pairs.len() >= scores.len() / 2, "{} pairs for {} scores", pairs.len(), scores.len());
        assert!(
            reference.len() >= lanes.end && sums.len() >= lanes.end,
            "a reference and a sum for each lane"
        );
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `self` proves the instructions; the asserts above are what the kernel relies on.
        unsafe {
            x86::weights(rows, lanes)
        }
        #[cfg(not(target_arch = "x86_64"))]
        match self.0 {}
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Finish, LANES, PairLhs, PairRhs, TileMut, WeightRows};
    use std::arch::x86_64::*;
    use std::f32::consts::LOG2_E;
    use std::ops::Range;

    /// Coefficients of `f^0 .. f^3` for `2^f` on `[0, 1]`, relative error 7.5e-5 (Remez exchange).
    const P: [f32; 4] = [0.999_925_2, 0.695_833_54, 0.226_067_16, 0.078_024_52];

    /// # Safety
    /// The CPU must have the features; `n` is a multiple of 16; `A [m, pairs]`, `B [pairs, n]`, `C [m, n]` lie inside
    /// their slices.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn product(
        [m, n, pairs]: [usize; 3],
        a: PairLhs<'_>,
        b: PairRhs<'_>,
        c: TileMut<'_>,
        finish: Finish,
    ) {
        let mut strip = Strip {
            a: a.data.as_ptr(),
            a_row: a.row_stride,
            a_col: a.col_stride,
            b: b.data.as_ptr(),
            b_stride: b.stride,
            c: c.data.as_mut_ptr(),
            c_stride: c.stride,
            pairs,
            finish,
        };
        let mut j = 0;
        while j < n {
            // Few rows leave registers for more columns: then B is read in longer stretches.
            let vectors = match (n - j) / LANES {
                4.. if m <= 4 => 4,
                2.. => 2,
                _ => 1,
            };
            // SAFETY: the caller's promise, for the columns `j..j + vectors * LANES`, which are not beyond `n`.
            unsafe {
                match vectors {
                    4 => strip.rows::<4>(m),
                    2 => strip.rows::<2>(m),
                    _ => strip.rows::<1>(m),
                }
            }
            let step = vectors * LANES;
            j += step;
            strip.b = strip.b.wrapping_add(step);
            strip.c = strip.c.wrapping_add(step);
        }
    }

    /// Some columns of `C`, all its rows.
    struct Strip {
        a: *const u32,
        a_row: usize,
        a_col: usize,
        b: *const u32,
        b_stride: usize,
        c: *mut f32,
        c_stride: usize,
        pairs: usize,
        finish: Finish,
    }

    impl Strip {
        /// # Safety
        /// As [`product`], for the `16 VECTORS` columns from where `b` and `c` point.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn rows<const VECTORS: usize>(&self, m: usize) {
            let mut i = 0;
            // SAFETY: each tile takes rows below `m`; the rest is the caller's promise.
            unsafe {
                while m - i >= 8 {
                    self.tile::<8, VECTORS>(i);
                    i += 8;
                }
                if m - i >= 4 {
                    self.tile::<4, VECTORS>(i);
                    i += 4;
                }
                if m - i >= 2 {
                    self.tile::<2, VECTORS>(i);
                    i += 2;
                }
                if m - i >= 1 {
                    self.tile::<1, VECTORS>(i);
                }
            }
        }

        /// # Safety
        /// As [`Strip::rows`], with `i + ROWS <= m`.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn tile<const ROWS: usize, const VECTORS: usize>(&self, i: usize) {
            let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            let (mut a, mut b) = (self.a.wrapping_add(i * self.a_row), self.b);
            for _ in 0..self.pairs {
                // SAFETY: `a` is at row `i` and this pair of columns, `b` at this pair of rows: inside, by the caller's
                // promise. A pair is any 32 bits, so is a vector of them.
                unsafe {
                    let mut row = [_mm512_setzero_si512(); VECTORS];
                    for (v, row) in row.iter_mut().enumerate() {
                        *row = _mm512_loadu_si512(b.add(v * LANES).cast());
                    }
                    for (r, sums) in acc.iter_mut().enumerate() {
                        let pair = _mm512_set1_epi32(*a.add(r * self.a_row) as i32);
                        for (sum, row) in sums.iter_mut().zip(row) {
                            *sum = _mm512_dpbf16_ps(*sum, bits(pair), bits(row));
                        }
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_stride);
            }
            for (r, sums) in acc.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    // SAFETY: row `i + r < m` and these columns of C are inside, and nothing else refers to them.
                    unsafe {
                        let c = self.c.add((i + r) * self.c_stride + v * LANES);
                        let sum = match self.finish {
                            Finish::Scale(1.0) => *sum,
                            Finish::Scale(factor) => _mm512_mul_ps(*sum, _mm512_set1_ps(factor)),
                            Finish::Add => _mm512_add_ps(*sum, _mm512_loadu_ps(c)),
                        };
                        _mm512_storeu_ps(c, sum);
                    }
                }
            }
        }
    }

    /// # Safety
    /// The CPU must have the features; `lanes` are whole vectors, and each slice has a number for every lane of the (even
    /// number of) rows of scores.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn weights(rows: WeightRows<'_>, lanes: Range<usize>) -> bool {
        let WeightRows { scores, pairs, reference, sums, most, stride } = rows;
        // Word 2l is number l of the first row, word 2l + 1 that of the second.
        let interleave: [u16; 32] = std::array::from_fn(|w| (w / 2 + 16 * (w % 2)) as u16);
        let ones = _mm512_set1_epi32(0x3f80_3f80);
        let most = _mm512_set1_epi16(most.to_bits() as i16);
        for lane in lanes.step_by(LANES) {
            // SAFETY: each read and write is 16 numbers from `lane` of a row, inside by the caller's promise;
            // `interleave` has 64 bytes.
            unsafe {
                let interleave = _mm512_loadu_si512(interleave.as_ptr().cast());
                let reference = _mm512_loadu_ps(reference.as_ptr().add(lane));
                let sum_at = sums.as_mut_ptr().add(lane);
                let (mut sum, mut largest) = (_mm512_setzero_ps(), _mm512_setzero_si512());
                for p in 0..scores.len() / (2 * stride) {
                    let first = scores.as_ptr().add(2 * p * stride + lane);
                    let even = exp2(_mm512_loadu_ps(first), reference);
                    let odd = exp2(_mm512_loadu_ps(first.add(stride)), reference);
                    let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                    let pair = _mm512_permutexvar_epi16(interleave, halves);
                    _mm512_storeu_si512(pairs.as_mut_ptr().add(p * stride + lane).cast(), pair);
                    // Weights are not negative: their bits are ordered as they are, NaN above all.
                    largest = _mm512_max_epu16(largest, pair);
                    sum = _mm512_dpbf16_ps(sum, bits(pair), bits(ones));
                }
                if _mm512_cmpgt_epu16_mask(largest, most) != 0 {
                    return false;
                }
                _mm512_storeu_ps(sum_at, _mm512_add_ps(sum, _mm512_loadu_ps(sum_at)));
            }
        }
        true
    }

    /// `e^(score - reference) = 2^x`: `2^floor(x)` times the polynomial of `x - floor(x)`. The difference comes first, so
    /// that scores of any size keep their digits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn exp2(score: __m512, reference: __m512) -> __m512 {
        let x = _mm512_mul_ps(_mm512_sub_ps(score, reference), _mm512_set1_ps(LOG2_E));
        let f = _mm512_reduce_ps::<1>(x); // x - floor(x); 0 for infinities
        let p = _mm512_fmadd_ps(_mm512_set1_ps(P[3]), f, _mm512_set1_ps(P[2]));
        let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[1]));
        let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(P[0]));
        // No denormal weights: they are slow to make.
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
        _mm512_maskz_scalef_ps(normal, p, x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bits(pairs: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits, and any bits are bf16 numbers.
        unsafe { std::mem::transmute(pairs) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: f32) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i as f32 + 1.0) * seed).sin())).collect()
    }

    fn pairs(numbers: &[bf16]) -> Vec<u32> {
        let pair = |two: &[bf16]| u32::from(two[0].to_bits()) | u32::from(two[1].to_bits()) << 16;
        numbers.chunks_exact(2).map(pair).collect()
    }

    #[allow(clippy::print_stderr)]
    fn detect() -> Option<Bf16Dot> {
        let dot = Bf16Dot::detect();
        if dot.is_none() {
            eprintln!("skipped: this CPU has no bf16 dot product");
        }
        dot
    }

    #[test]
    fn every_size_and_stride_equals_the_triple_loop() {
        let Some(dot) = detect() else { return };
        for m in [0, 1, 2, 3, 7, 8, 9, 15, 16, 23] {
            for n in [0, 16, 32, 48, 64] {
                for k in [0, 1, 2, 5, 16] {
                    for (row_stride, col_stride) in [(k + 2, 1), (1, m + 1)] {
                        check(dot, [m, n, k], [row_stride, col_stride]);
                    }
                }
            }
        }
    }

    /// Strides and `k` count pairs.
    fn check(dot: Bf16Dot, [m, n, k]: [usize; 3], [row_stride, col_stride]: [usize; 2]) {
        let (b_stride, c_stride) = (n + 3, n + 1);
        let a = numbers(2 * (m * row_stride + k * col_stride + 1), 0.37);
        let b = numbers(2 * (k * b_stride + n), 0.73);
        let (a_pairs, b_pairs) = (pairs(&a), pairs(&b));
        for finish in [Finish::Scale(1.0), Finish::Scale(0.3), Finish::Add] {
            // NaN in the padding must survive, and with `Scale` must not be read.
            let mut c = vec![f32::NAN; m * c_stride + n];
            if finish == Finish::Add {
                (0..m).for_each(|i| c[i * c_stride..][..n].fill(i as f32 + 0.5));
            }
            let before = c.clone();
            let tile = TileMut { data: &mut c, stride: c_stride };
            let (lhs, rhs) = (
                PairLhs { data: &a_pairs, row_stride, col_stride },
                PairRhs { data: &b_pairs, stride: b_stride },
            );
            dot.product([m, n, k], lhs, rhs, tile, finish);
            for (at, (&got, &was)) in c.iter().zip(&before).enumerate() {
                let (i, j) = (at / c_stride, at % c_stride);
                if i >= m || j >= n {
                    assert_eq!(got.to_bits(), was.to_bits(), "{m}x{n}x{k}: padding at {i}, {j}");
                    continue;
                }
                let term = |p: usize| {
                    let (a, b) = (2 * (i * row_stride + p / 2 * col_stride), 2 * (p / 2 * b_stride + j));
                    f64::from(a_at(&numbers_at(&a_pairs, a / 2), p))
                        * f64::from(a_at(&numbers_at(&b_pairs, b / 2), p))
                };
                let sum: f64 = (0..2 * k).map(term).sum();
                let want = match finish {
                    Finish::Scale(factor) => f64::from(factor) * sum,
                    Finish::Add => f64::from(was) + sum,
                };
                assert!(
                    (f64::from(got) - want).abs() <= 1e-5,
                    "{m}x{n}x{k} {finish:?}: C[{i}, {j}] {got} {want}"
                );
            }
        }
    }

    fn numbers_at(pairs: &[u32], at: usize) -> [bf16; 2] {
        [bf16::from_bits(pairs[at] as u16), bf16::from_bits((pairs[at] >> 16) as u16)]
    }

    fn a_at(pair: &[bf16; 2], p: usize) -> f32 {
        pair[p % 2].to_f32()
    }

    #[test]
    fn weights_are_rounded_powers_and_sum_up() {
        let Some(dot) = detect() else { return };
        let stride = 32;
        let mut scores: Vec<f32> = (0..10 * stride).map(|i| (i as f32 * 0.7).sin() * 40.0 - 38.0).collect();
        scores[3] = f32::NEG_INFINITY;
        scores[stride + 4] = f32::NAN;
        scores[stride + 6] = -f32::NAN;
        scores[5] = -100.0;
        let reference: Vec<f32> = (0..stride).map(|l| l as f32 * 0.1).collect();
        for lanes in [16, 32] {
            let (mut got, mut sums) = (vec![u32::MAX; 5 * stride], vec![1.0; stride]);
            let rows = WeightRows {
                scores: &scores,
                pairs: &mut got,
                reference: &reference,
                sums: &mut sums,
                most: WeightRows::ANY,
                stride,
            };
            assert!(dot.weights(rows, 0..lanes));
            for lane in 0..stride {
                let mut sum = 1.0;
                for key in 0..10 {
                    let weight = numbers_at(&got, key / 2 * stride + lane)[key % 2];
                    if lane >= lanes {
                        assert_eq!(weight.to_bits(), u16::MAX, "lane {lane} is written");
                        continue;
                    }
                    let x = f64::from(scores[key * stride + lane]) - f64::from(reference[lane]);
                    let x = x * std::f64::consts::LOG2_E;
                    if x.is_nan() {
                        assert!(weight.is_nan(), "NaN must reach its lane");
                    } else if x < -126.1 {
                        assert_eq!(weight.to_bits(), 0, "2^{x}");
                    } else {
                        let error = (weight.to_f64() / x.exp2() - 1.0).abs();
                        assert!(error < 1.0 / 256.0 + 1e-4, "2^{x} = {weight}: {error:e}");
                    }
                    sum += weight.to_f64();
                }
                let close = (f64::from(sums[lane]) - sum).abs() <= 1e-5 * sum;
                assert!(
                    close || sum.is_nan() && sums[lane].is_nan(),
                    "sum of lane {lane}: {} {sum}",
                    sums[lane]
                );
            }
        }
    }

    #[test]
    fn a_weight_above_the_bound_leaves_the_sums_alone() {
        let Some(dot) = detect() else { return };
        let mut scores = vec![0.0f32; 6 * 32];
        let run = |scores: &[f32], lanes| {
            let (mut pairs, mut sums) = (vec![0; 3 * 32], vec![1.0; 32]);
            let (reference, most) = (&[0.0; 32], bf16::from_f32(256.0));
            let rows = WeightRows { scores, pairs: &mut pairs, reference, sums: &mut sums, most, stride: 32 };
            (dot.weights(rows, lanes), sums)
        };
        assert_eq!(run(&scores, 0..32), (true, vec![7.0; 32]));
        for score in [5.6, 100.0, f32::INFINITY, f32::NAN, -f32::NAN] {
            scores[4 * 32 + 20] = score;
            assert_eq!(run(&scores, 16..32), (false, vec![1.0; 32]), "{score}");
            assert!(run(&scores, 0..16).0, "{score} is in another lane");
        }
        scores[4 * 32 + 20] = 5.545;
        assert!(run(&scores, 16..32).0, "e^5.545 is 256");
    }

    #[test]
    fn short_matrices_are_refused() {
        let Some(dot) = detect() else { return };
        let run = |b: &[u32]| {
            let (lhs, rhs) =
                (PairLhs { data: &[0; 6], row_stride: 3, col_stride: 1 }, PairRhs { data: b, stride: 16 });
            let c = TileMut { data: &mut [0.0; 32], stride: 16 };
            dot.product([2, 16, 3], lhs, rhs, c, Finish::Scale(1.0));
        };
        run(&[0; 48]);
        assert!(std::panic::catch_unwind(|| run(&[0; 47])).is_err(), "B lacks its last pair");
    }
}
