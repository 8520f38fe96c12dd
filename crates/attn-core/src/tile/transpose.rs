//! Transposes and conversions of small blocks, and whether their numbers are finite.

use crate::Element;
use crate::simd::{Simd, SimdBase};
use crate::view::Rows;
use fearless_simd::f32x4;

/// Writes `scale * rows^T` to `out [width, out_stride]`: column `i` of `out` is row `i`. Columns beyond the rows
/// are set to zero, so that vectors may run over them.
///
/// # Panics
/// If `out` is shorter than `width * out_stride` or `out_stride` shorter than the number of rows.
#[inline(always)]
pub fn transpose<S: Simd, E: Element>(
    simd: S,
    rows: Rows<'_, E>,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    let (n, width) = (rows.len(), rows.width());
    assert!(
        out_stride >= n && out.len() >= width * out_stride,
        "transpose of {n} x {width} into {}",
        out.len()
    );
    let factor = f32x4::splat(simd, scale);
    let mut i = 0;
    while i + 4 <= n {
        let four = [rows.row(i), rows.row(i + 1), rows.row(i + 2), rows.row(i + 3)];
        let quads = four.map(
            #[inline(always)]
            |row| row.chunks_exact(4),
        );
        let [qa, qb, qx, qy] = quads;
        let columns = out.chunks_exact_mut(4 * out_stride);
        for ((((a, b), x), y), columns) in qa.zip(qb).zip(qx).zip(qy).zip(columns) {
            let (a, b, x, y) = (load(simd, a), load(simd, b), load(simd, x), load(simd, y));
            let (low_ax, high_ax) = (a.zip_low(x), a.zip_high(x));
            let (low_by, high_by) = (b.zip_low(y), b.zip_high(y));
            let turned = [
                low_ax.zip_low(low_by),
                low_ax.zip_high(low_by),
                high_ax.zip_low(high_by),
                high_ax.zip_high(high_by),
            ];
            for (column, to) in turned.into_iter().zip(columns.chunks_exact_mut(out_stride)) {
                (column * factor).store_slice(&mut to[i..i + 4]);
            }
        }
        let c = width / 4 * 4;
        for c in c..width {
            for (lane, row) in four.iter().enumerate() {
                out[c * out_stride + i + lane] = scale * row[c].load();
            }
        }
        i += 4;
    }
    for i in i..n {
        for (c, x) in rows.row(i).iter().enumerate() {
            out[c * out_stride + i] = scale * x.load();
        }
    }
    for c in 0..width {
        out[c * out_stride + n..(c + 1) * out_stride].fill(0.0);
    }
}

/// Four numbers.
#[inline(always)]
fn load<S: Simd, E: Element>(simd: S, four: &[E]) -> f32x4<S> {
    let mut wide = [0.0; 4];
    wide.iter_mut().zip(four).for_each(|(w, x)| *w = x.load());
    f32x4::from_slice(simd, &wide)
}

/// Copies rows into `out [len, width]`, widened to f32.
///
/// # Panics
/// If `out` is shorter.
#[inline(always)]
pub fn widen<E: Element>(rows: Rows<'_, E>, out: &mut [f32]) {
    if rows.width() == 0 {
        return;
    }
    for (row, out) in rows.iter().zip(out[..rows.len() * rows.width()].chunks_exact_mut(rows.width())) {
        out.iter_mut().zip(row).for_each(|(o, x)| *o = x.load());
    }
}

/// Whether no number is NaN or infinite.
#[inline(always)]
pub fn all_finite(numbers: &[f32]) -> bool {
    // Without the sign, bit patterns order like the numbers; an integer maximum runs in vectors.
    numbers.iter().fold(0, |max, x| (x.to_bits() << 1).max(max)) < f32::INFINITY.to_bits() << 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, SimdOp};
    use half::{bf16, f16};

    struct Transpose<'a, E>(Rows<'a, E>, &'a mut [f32], usize);

    impl<E: Element> SimdOp for Transpose<'_, E> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            transpose(simd, self.0, 2.0, self.1, self.2);
        }
    }

    fn check<E: Element>(isa: Isa, n: usize, width: usize) {
        let (stride, out_stride) = (width + 3, n.next_multiple_of(8));
        let data: Vec<E> = (0..n * stride).map(|x| E::store(x as f32)).collect();
        let rows = Rows::new(&data, n, width, stride);
        let mut out = vec![f32::NAN; width * out_stride];
        isa.run(Transpose(rows, &mut out, out_stride));
        for c in 0..width {
            for i in 0..out_stride {
                let want = if i < n { 2.0 * rows.row(i)[c].load() } else { 0.0 };
                assert_eq!(out[c * out_stride + i], want, "{isa} {n} x {width}: column {c}, row {i}");
            }
        }
        let mut wide = vec![f32::NAN; n * width];
        widen(rows, &mut wide);
        (0..n * width).for_each(|x| assert_eq!(wide[x], rows.row(x / width)[x % width].load()));
    }

    #[test]
    fn finite_numbers_are_told_from_the_others() {
        assert!(all_finite(&[]) && all_finite(&[0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE]));
        for other in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!all_finite(&[1.0, other, -1.0]), "{other}");
        }
    }

    #[test]
    fn every_size_and_dtype() {
        for isa in Isa::available() {
            for n in [0, 1, 3, 4, 5, 8, 13] {
                for width in [1, 2, 4, 7, 8, 12] {
                    check::<f32>(isa, n, width);
                    check::<bf16>(isa, n, width);
                    check::<f16>(isa, n, width);
                }
            }
        }
    }
}
