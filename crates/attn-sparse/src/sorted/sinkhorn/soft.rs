//! Sinkhorn's normalisation of a square matrix of logits, in the logarithm, and its gradient.
//!
//! Columns, then rows: `x <- x - lse(x)`. With `y` the result of a step and `dy` its gradient, `dx = dy - e^y sum(dy)` along
//! the normalised axis.

use rayon::prelude::*;

/// A normalisation with what its gradient needs.
pub(super) struct Normalised {
    n: usize,
    /// The matrix after each step.
    steps: Vec<Vec<f64>>,
}

impl Normalised {
    /// Normalises `logits [n, n]`; every step is kept if `keep`, else the last.
    pub(super) fn new(logits: Vec<f64>, n: usize, iterations: usize, keep: bool) -> Self {
        let mut steps = Vec::new();
        let mut x = logits;
        for _ in 0..iterations {
            normalize_columns(&mut x, n);
            if keep {
                steps.push(x.clone());
            }
            x.par_chunks_mut(n.max(1)).for_each(|row| {
                let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
                row.iter_mut().for_each(|x| *x -= lse);
            });
            if keep {
                steps.push(x.clone());
            }
        }
        if !keep {
            steps.push(x);
        }
        Self { n, steps }
    }

    /// The weights `[n, n]`.
    pub(super) fn weights(&self) -> Vec<f32> {
        self.steps.last().into_iter().flatten().map(|x| x.exp() as f32).collect()
    }

    /// Gradients of the logits, of those of the weights.
    pub(super) fn gradients(&self, of_weights: &[f32]) -> Vec<f64> {
        let n = self.n;
        let last = self.steps.last().into_iter().flatten();
        let mut grads: Vec<f64> = last.zip(of_weights).map(|(x, g)| x.exp() * f64::from(*g)).collect();
        for (at, step) in self.steps.iter().enumerate().rev() {
            let mut sums = vec![0.0; n];
            let along = |e: usize| if at % 2 == 0 { e % n } else { e / n };
            grads.iter().enumerate().for_each(|(e, g)| sums[along(e)] += g);
            grads.iter_mut().zip(step).enumerate().for_each(|(e, (g, y))| *g -= y.exp() * sums[along(e)]);
        }
        grads
    }
}

fn normalize_columns(x: &mut [f64], n: usize) {
    let mut most = vec![f64::NEG_INFINITY; n];
    for row in x.chunks_exact(n.max(1)) {
        most.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(*x));
    }
    let mut sums = vec![0.0; n];
    for row in x.chunks_exact(n.max(1)) {
        for ((sum, x), most) in sums.iter_mut().zip(row).zip(&most) {
            *sum += (x - most).exp();
        }
    }
    let lse: Vec<f64> = most.iter().zip(sums).map(|(most, sum): (&f64, f64)| most + sum.ln()).collect();
    for row in x.chunks_exact_mut(n.max(1)) {
        row.iter_mut().zip(&lse).for_each(|(x, lse)| *x -= lse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_sum_to_one() {
        let n = 7;
        let logits: Vec<f64> = (0..n * n).map(|e| (e as f64 * 1.7).sin() * 2.0).collect();
        let weights = Normalised::new(logits.clone(), n, 50, false).weights();
        for i in 0..n {
            let row: f32 = weights[i * n..][..n].iter().sum();
            let column: f32 = weights.iter().skip(i).step_by(n).sum();
            assert!((row - 1.0).abs() < 1e-6 && (column - 1.0).abs() < 1e-4, "{i}: {row} {column}");
        }
        // Scaling a matrix along its axes changes no product around a square: that of the logits stays.
        let around = |w: &dyn Fn(usize, usize) -> f64| w(0, 1) - w(0, 3) - w(4, 1) + w(4, 3);
        let (got, want) =
            (around(&|i, j| f64::from(weights[i * n + j]).ln()), around(&|i, j| logits[i * n + j]));
        assert!((got - want).abs() < 1e-4, "{got} {want}");
    }
}
