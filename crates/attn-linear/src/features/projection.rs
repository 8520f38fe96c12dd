//! Random projections.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// `[rows, width]` of independent standard normal numbers.
pub(super) fn normal(rows: usize, width: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let numbers = Distribution::<f32>::sample_iter(StandardNormal, &mut rng);
    numbers.take(rows * width).collect()
}

/// `[rows, width]` whose blocks of `width` rows are orthogonal: as long as independent normal vectors are, or `sqrt(width)`
/// long. Each row alone is a standard normal vector in the first case. By the Gram-Schmidt process in f64.
pub(super) fn orthogonal(rows: usize, width: usize, equal_lengths: bool, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draw =
        || -> Vec<f64> { Distribution::<f64>::sample_iter(StandardNormal, &mut rng).take(width).collect() };
    let mut out = Vec::with_capacity(rows * width);
    let mut block: Vec<Vec<f64>> = Vec::new();
    for row in 0..rows {
        if row % width == 0 {
            block.clear();
        }
        let length = if equal_lengths {
            (width as f64).sqrt()
        } else {
            draw().iter().map(|x| x * x).sum::<f64>().sqrt()
        };
        let mut x = draw();
        // Twice is enough to make what is left orthogonal to the last bit.
        for _ in 0..2 {
            for unit in &block {
                let along: f64 = unit.iter().zip(&x).map(|(u, x)| u * x).sum();
                x.iter_mut().zip(unit).for_each(|(x, u)| *x -= along * u);
            }
        }
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        x.iter_mut().for_each(|x| *x /= norm);
        out.extend(x.iter().map(|x| (x * length) as f32));
        block.push(x);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_block_are_orthogonal_and_as_long_as_asked() {
        for (rows, width) in [(40, 16), (16, 16), (3, 8), (5, 1)] {
            for equal in [false, true] {
                let w = orthogonal(rows, width, equal, 7);
                let row = |i: usize| &w[i * width..][..width];
                let dot = |i, j| -> f32 { row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum() };
                for i in 0..rows {
                    for j in (i / width * width)..i {
                        let cosine = dot(i, j) / (dot(i, i) * dot(j, j)).sqrt();
                        assert!(cosine.abs() < 1e-5, "rows {i} and {j} of {rows} x {width}: {cosine}");
                    }
                    if equal {
                        assert!((dot(i, i) / width as f32 - 1.0).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn lengths_are_those_of_normal_vectors() {
        let w = orthogonal(4000, 8, false, 3);
        let mean = w.iter().map(|x| f64::from(x * x)).sum::<f64>() / 4000.0;
        // The squared length has mean 8 and variance 16: five standard errors.
        assert!((mean - 8.0).abs() < 5.0 * 4.0 / 4000f64.sqrt(), "{mean}");
    }
}
