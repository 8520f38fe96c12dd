//! Normalised queries and keys: each row `x` of a head is replaced by `y` before scores are taken.
//!
//! ```text
//! Rms:   y = gamma x r,   r = 1 / sqrt(mean(x^2) + eps)
//! L2:    y = gamma x r,   r = 1 / max(|x|, eps)
//! ```
//!
//! and with `g` the gradient of `y`, `c = sum(gamma g x)`:
//!
//! ```text
//! dx = gamma g r - x c r^3 / d      (Rms)
//! dx = gamma g r - x c r^3          (L2; without the second term where |x| < eps)
//! dgamma = sum over rows of g x r
//! ```
//!
//! With L2, scores are cosines, and a learned temperature takes the place of the softmax scale. Norms come before rotary
//! embeddings. Importers of Gemma weights, which store `gamma - 1`, add the 1.
//!
//! Source: Henry, Dachapally, Pawar, Chen, 2020 (L2); Zhang, Sennrich, 2019 (RMS), as in Qwen3 and Gemma 3.

use crate::{AttnError, AttnShape, Result};

/// What a row is divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `sqrt(mean(x^2) + eps)`.
    Rms {
        /// Usually 1e-6.
        eps: f32,
    },
    /// `max(|x|, eps)`.
    L2 {
        /// Usually 1e-12.
        eps: f32,
    },
}

/// The norm of queries and keys.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::qk_norm::{NormKind, QkNorm};
///
/// let norm = QkNorm { kind: NormKind::L2 { eps: 1e-12 }, gamma_q: None, gamma_k: Some(&[2.0, 1.0]) };
/// norm.check(&AttnShape::square(1, 5, 2))?;
/// let mut key = [0.0; 2];
/// norm.k().apply(&[3.0, 4.0], &mut key);
/// assert_eq!(key, [1.2, 0.8]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm<'a> {
    /// What rows are divided by.
    pub kind: NormKind,
    /// Weights of the queries' channels, `[head_dim]`, the same for all heads; `None` is 1.
    pub gamma_q: Option<&'a [f32]>,
    /// Weights of the keys' channels, `[head_dim]`, the same for all heads; `None` is 1.
    pub gamma_k: Option<&'a [f32]>,
}

impl<'a> QkNorm<'a> {
    /// Checks the weights' lengths and `eps`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] unless there is one weight a channel; [`AttnError::Value`] unless `eps` is positive and finite.
    pub fn check(&self, shape: &AttnShape) -> Result<()> {
        let (NormKind::Rms { eps } | NormKind::L2 { eps }) = self.kind;
        if !(eps.is_finite() && eps > 0.0) {
            return Err(AttnError::value("qk_norm eps", eps, "a positive finite number"));
        }
        for (name, gamma) in [("gamma_q", self.gamma_q), ("gamma_k", self.gamma_k)] {
            if let Some(gamma) = gamma
                && gamma.len() != shape.head_dim
            {
                return Err(AttnError::shape(name, "head_dim", gamma.len(), shape.head_dim));
            }
        }
        Ok(())
    }

    /// The norm of query rows.
    pub fn q(&self) -> RowNorm<'a> {
        RowNorm { kind: self.kind, gamma: self.gamma_q }
    }

    /// The norm of key rows.
    pub fn k(&self) -> RowNorm<'a> {
        RowNorm { kind: self.kind, gamma: self.gamma_k }
    }
}

/// The norm of one row, `[head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowNorm<'a> {
    /// What the row is divided by.
    pub kind: NormKind,
    /// One weight a channel; `None` is 1.
    pub gamma: Option<&'a [f32]>,
}

impl RowNorm<'_> {
    /// Writes the normalised row. The sum of squares is taken in f64: no finite row overflows.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "row width");
        let inverse = self.inverse(x).0;
        match self.gamma {
            Some(gamma) => {
                assert_eq!(x.len(), gamma.len(), "weights");
                let products = x.iter().zip(gamma).map(|(x, g)| f64::from(*x) * inverse * f64::from(*g));
                y.iter_mut().zip(products).for_each(|(y, product)| *y = product as f32);
            }
            None => y.iter_mut().zip(x).for_each(|(y, x)| *y = (f64::from(*x) * inverse) as f32),
        }
    }

    /// The definition, in place.
    ///
    /// # Panics
    /// If there are weights and their number differs.
    pub fn apply_f64(&self, x: &mut [f64]) {
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let divisor = match self.kind {
            NormKind::Rms { eps } => (squares / x.len() as f64 + f64::from(eps)).sqrt(),
            NormKind::L2 { eps } => squares.sqrt().max(f64::from(eps)),
        };
        x.iter_mut().for_each(|x| *x /= divisor);
        if let Some(gamma) = self.gamma {
            assert_eq!(x.len(), gamma.len(), "weights");
            x.iter_mut().zip(gamma).for_each(|(x, g)| *x *= f64::from(*g));
        }
    }

    /// Given the row as it was before the norm and the gradient of the normalised row: writes the gradient of the row, adds
    /// that of the weights to `grad_gamma`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn backward(&self, x: &[f32], grad_y: &[f32], grad_x: &mut [f32], grad_gamma: Option<&mut [f32]>) {
        assert!(x.len() == grad_y.len() && x.len() == grad_x.len(), "row width");
        assert!(self.gamma.is_none_or(|gamma| gamma.len() == x.len()), "weights");
        let (inverse, pull) = self.inverse(x);
        let gamma = |c: usize| self.gamma.map_or(1.0, |gamma| f64::from(gamma[c]));
        let along: f64 = (0..x.len()).map(|c| gamma(c) * f64::from(grad_y[c]) * f64::from(x[c])).sum::<f64>();
        for (c, grad_x) in grad_x.iter_mut().enumerate() {
            let (x, g) = (f64::from(x[c]), f64::from(grad_y[c]));
            *grad_x = (inverse * (gamma(c) * g - pull * along * x)) as f32;
        }
        if let Some(grad_gamma) = grad_gamma {
            assert_eq!(x.len(), grad_gamma.len(), "weights");
            let products = x.iter().zip(grad_y).map(|(x, g)| f64::from(*g) * f64::from(*x) * inverse);
            grad_gamma.iter_mut().zip(products).for_each(|(sum, product)| *sum += product as f32);
        }
    }

    /// What the row is multiplied with, weights apart: the inverse of its norm, to f32 rounding.
    #[inline(always)]
    pub fn factor(&self, x: &[f32]) -> f32 {
        // Sixteen running sums, which the compiler can keep in vector registers.
        let (chunks, rest) = x.as_chunks::<16>();
        let mut sums = [0.0f32; 16];
        for chunk in chunks {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum += x * x;
            }
        }
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
        }
        let squares = rest.iter().fold(sums[0], |sum, x| sum + x * x);
        // Squares that overflow or vanish in f32 do not in f64; a NaN stays one.
        let safe = squares > 1e-20 && squares < 1e30;
        match self.kind {
            NormKind::Rms { eps } if safe => 1.0 / (squares / x.len() as f32 + eps).sqrt(),
            NormKind::L2 { eps } if safe => 1.0 / squares.sqrt().max(eps),
            _ => self.inverse(x).0 as f32,
        }
    }

    /// `r`, and the factor of `x c r` in the gradient.
    fn inverse(&self, x: &[f32]) -> (f64, f64) {
        // Eight running sums, which the compiler can keep in vector registers.
        let (eights, rest) = x.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for eight in eights {
            for (sum, x) in sums.iter_mut().zip(eight) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        let rest: f64 = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let squares = sums.iter().sum::<f64>() + rest;
        match self.kind {
            NormKind::Rms { eps } => {
                let n = x.len() as f64;
                let mean = squares / n + f64::from(eps);
                (1.0 / mean.sqrt(), 1.0 / (n * mean))
            }
            NormKind::L2 { eps } if squares.sqrt() < f64::from(eps) => (1.0 / f64::from(eps), 0.0),
            NormKind::L2 { .. } => (1.0 / squares.sqrt(), 1.0 / squares),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [NormKind; 4] = [
        NormKind::Rms { eps: 1e-6 },
        NormKind::Rms { eps: 0.5 },
        NormKind::L2 { eps: 1e-12 },
        NormKind::L2 { eps: 100.0 }, // longer than the rows
    ];
    const X: [f32; 5] = [0.5, -1.25, 3.0, 0.0, 0.75];
    const GAMMA: [f32; 5] = [1.0, 0.5, -2.0, 1.5, 0.25];
    const GRAD: [f32; 5] = [0.25, -1.0, 0.5, 2.0, -0.75];

    fn norms() -> impl Iterator<Item = RowNorm<'static>> {
        KINDS.into_iter().flat_map(|kind| [None, Some(&GAMMA[..])].map(|gamma| RowNorm { kind, gamma }))
    }

    fn defined(norm: RowNorm<'_>, x: &[f64]) -> Vec<f64> {
        let mut y = x.to_vec();
        norm.apply_f64(&mut y);
        y
    }

    #[test]
    fn rows_are_those_of_the_definition() {
        for norm in norms() {
            for size in [1.0, 1e-30, 1e30] {
                let x = X.map(|x| x * size);
                let mut y = [f32::NAN; 5];
                norm.apply(&x, &mut y);
                for (got, want) in y.iter().zip(defined(norm, &x.map(f64::from))) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error <= 6e-8 * want.abs() + 1e-45, "{norm:?} at {size}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for norm in norms() {
            let (mut grad_x, mut grad_gamma) = ([f32::NAN; 5], [1.0f32; 5]);
            norm.backward(&X, &GRAD, &mut grad_x, Some(&mut grad_gamma));
            let loss =
                |x: &[f64]| defined(norm, x).iter().zip(GRAD).map(|(y, g)| y * f64::from(g)).sum::<f64>();
            for c in 0..5 {
                let at = |step: f64| {
                    let mut x = X.map(f64::from);
                    x[c] += step;
                    loss(&x)
                };
                let (want, got) = ((at(1e-5) - at(-1e-5)) / 2e-5, f64::from(grad_x[c]));
                assert!((got - want).abs() < 1e-7 + 1e-6 * want.abs(), "{norm:?} x[{c}]: {got} for {want}");
                let unit = defined(RowNorm { gamma: None, ..norm }, &X.map(f64::from));
                let (want, got) = (1.0 + f64::from(GRAD[c]) * unit[c], f64::from(grad_gamma[c]));
                assert!((got - want).abs() < 1e-6, "{norm:?} gamma[{c}]: {got} for {want}");
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_finite() {
        for norm in norms() {
            let (mut y, mut grad) = ([f32::NAN; 5], [f32::NAN; 5]);
            norm.apply(&[0.0; 5], &mut y);
            norm.backward(&[0.0; 5], &GRAD, &mut grad, None);
            assert!(y.iter().all(|y| *y == 0.0) && grad.iter().all(|g| g.is_finite()), "{norm:?}");
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_refused() {
        let shape = AttnShape::square(1, 3, 4);
        let norm = QkNorm { kind: KINDS[0], gamma_q: None, gamma_k: Some(&GAMMA) };
        assert_eq!(norm.check(&shape).unwrap_err().to_string(), "gamma_k: head_dim is 5, expected 4");
        for eps in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let norm = QkNorm { kind: NormKind::L2 { eps }, gamma_q: None, gamma_k: None };
            assert!(norm.check(&shape).unwrap_err().to_string().contains("eps"), "{eps}");
        }
    }
}
