//! Principal axes of some rows, by Jacobi's rotations.
//!
//! ```text
//! C = sum_j (x_j - m)(x_j - m)^T,  m the mean          C = V diag(lambda) V^T
//! ```
//!
//! Each rotation makes one off-diagonal pair zero; sweeps over all pairs converge quadratically. In f64, always in the same
//! order, so that the same rows give the same axes.
//!
//! Source: Jacobi 1846; the rotation as in Golub and Van Loan, "Matrix Computations", section 8.5.

/// Sweeps after which it stops in any case; half as many are enough for 256 dimensions.
const MOST_SWEEPS: usize = 30;

/// The leading axes of `rows [n, d]`, as columns `[d, rank]` of unit length, the largest variance first.
pub(super) fn principal_axes(rows: &[f32], d: usize, rank: usize) -> Vec<f32> {
    let mut covariance = covariance(rows, d);
    let vectors = diagonalize(&mut covariance, d);
    let variance = |axis: usize| covariance[axis * d + axis];
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| variance(*b).total_cmp(&variance(*a)).then(a.cmp(b)));
    let entry = |at: usize| vectors[at / rank.max(1) * d + order[at % rank.max(1)]] as f32;
    (0..d * rank).map(entry).collect()
}

/// `C [d, d]`.
fn covariance(rows: &[f32], d: usize) -> Vec<f64> {
    let mut mean = vec![0.0; d];
    let rows = || rows.chunks_exact(d.max(1));
    for row in rows() {
        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let n = rows().len().max(1) as f64;
    mean.iter_mut().for_each(|sum| *sum /= n);
    let mut covariance = vec![0.0; d * d];
    for row in rows() {
        let centred: Vec<f64> = row.iter().zip(&mean).map(|(x, mean)| f64::from(*x) - mean).collect();
        for (x, to) in centred.iter().zip(covariance.chunks_exact_mut(d)) {
            to.iter_mut().zip(&centred).for_each(|(sum, y)| *sum += x * y);
        }
    }
    covariance
}

/// Turns a symmetric `a [d, d]` into its diagonal form; gives the eigenvectors as columns.
fn diagonalize(a: &mut [f64], d: usize) -> Vec<f64> {
    let mut vectors: Vec<f64> = (0..d * d).map(|at| f64::from(u8::from(at / d == at % d))).collect();
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..MOST_SWEEPS {
        let off: f64 = (0..d * d).filter(|at| at / d != at % d).map(|at| a[at] * a[at]).sum();
        if off <= 1e-24 * total || off.is_nan() {
            break;
        }
        for p in 0..d {
            for q in p + 1..d {
                rotate(a, &mut vectors, d, p, q);
            }
        }
    }
    vectors
}

/// Makes `a_pq` zero: `a <- J^T a J`, `vectors <- vectors J`.
fn rotate(a: &mut [f64], vectors: &mut [f64], d: usize, p: usize, q: usize) {
    let off = a[p * d + q];
    if off == 0.0 {
        return;
    }
    let theta = (a[q * d + q] - a[p * d + p]) / (2.0 * off);
    let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let cosine = 1.0 / tangent.hypot(1.0);
    let sine = tangent * cosine;
    let turn = |x: f64, y: f64| (cosine * x - sine * y, sine * x + cosine * y);
    for row in 0..d {
        for matrix in [&mut *a, &mut *vectors] {
            let (x, y) = turn(matrix[row * d + p], matrix[row * d + q]);
            (matrix[row * d + p], matrix[row * d + q]) = (x, y);
        }
    }
    for column in 0..d {
        let (x, y) = turn(a[p * d + column], a[q * d + column]);
        (a[p * d + column], a[q * d + column]) = (x, y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_orthonormal_and_eigenvectors_in_falling_order() {
        let (n, d) = (40, 7);
        let rows: Vec<f32> =
            (0..n * d).map(|at| (at as f32 * 0.77).sin() * (1 + at % d) as f32 + 3.0).collect();
        let (axes, covariance) = (principal_axes(&rows, d, d), covariance(&rows, d));
        let column = |c: usize| axes.iter().skip(c).step_by(d).map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut last = f64::INFINITY;
        for c in 0..d {
            let axis = column(c);
            let image: Vec<f64> = covariance.chunks_exact(d).map(|row| dot(row, &axis)).collect();
            let variance = dot(&image, &axis);
            assert!(variance <= last, "axis {c} has {variance} after {last}");
            last = variance;
            for (image, axis) in image.iter().zip(&axis) {
                assert!(
                    (image - variance * axis).abs() < 1e-4 * covariance[0].abs().max(1.0) * 10.0,
                    "axis {c}"
                );
            }
            for other in 0..=c {
                let expected = f64::from(u8::from(other == c));
                assert!((dot(&axis, &column(other)) - expected).abs() < 1e-6, "axes {c} and {other}");
            }
        }
        assert_eq!(principal_axes(&rows, d, 2).len(), 2 * d);
    }

    #[test]
    fn rows_along_one_line_have_it_as_their_axis() {
        let line = [0.6f32, 0.0, -0.8];
        let rows: Vec<f32> = (0..9).flat_map(|t| line.map(|x| x * t as f32 + 5.0)).collect();
        let axis = principal_axes(&rows, 3, 1);
        let sign = axis[0].signum();
        axis.iter().zip(line).for_each(|(got, want)| assert!((got * sign - want).abs() < 1e-6, "{axis:?}"));
    }
}
