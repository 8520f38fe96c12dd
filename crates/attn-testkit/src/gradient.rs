//! Gradients against finite differences, in f64.
//!
//! For a scalar function `f` and one coordinate `x`, with the step `h`,
//!
//! ```text
//! f'(x) = (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h + O(h^4)
//! ```
//!
//! whose error at `h = 1e-3` is about `1e-12` times the fifth derivative, plus `1e-13 |f|` of rounding. Two points instead of
//! four would leave `1e-6` times the third. Source: Abramowitz and Stegun 1964, table 25.2.

use crate::compare::{Element, Mismatch, Tol, compare};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// One input of the function, and the gradient claimed for it.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The input's name, for messages.
    pub name: &'a str,
    /// Where the gradient is taken.
    pub at: &'a [f64],
    /// What is claimed to be the gradient there.
    pub gradient: &'a [f64],
}

/// How gradients are checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientCheck {
    /// The step `h`, for coordinates of order one; larger coordinates take `h |x|`.
    pub step: f64,
    /// How far claim and difference may be apart, over the coordinates tried of one input.
    pub tol: Tol,
    /// Coordinates tried of each input, drawn at random; `None` tries all.
    pub sample: Option<usize>,
    /// What the sample is drawn with.
    pub seed: u64,
}

impl Default for GradientCheck {
    /// All coordinates, step 1e-3, error up to 1e-7 of the largest difference.
    fn default() -> Self {
        Self { step: 1e-3, tol: Tol::ScaledMax(1e-7), sample: None, seed: 0 }
    }
}

/// Why a claimed gradient is not one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WrongGradient {
    /// It has another length than the input.
    #[error("the gradient of `{name}` has {found} elements, expected {expected}")]
    Length {
        /// The input.
        name: String,
        /// Elements of the gradient.
        found: usize,
        /// Elements of the input.
        expected: usize,
    },
    /// It differs from the finite difference.
    #[error("the gradient of `{name}` is wrong at {wrong} of {tried} coordinates, worst {}", claim_and_difference(.worst))]
    Value {
        /// The input.
        name: String,
        /// Coordinates that are wrong.
        wrong: usize,
        /// Coordinates tried.
        tried: usize,
        /// The worst one: `got` is the claim, `want` the difference, `index` the coordinate in the input.
        worst: Element,
    },
    /// The function is not finite near the point, so nothing can be said.
    #[error("the function is not finite near `{name}`[{index}]")]
    NotFinite {
        /// The input.
        name: String,
        /// The coordinate.
        index: usize,
    },
}

fn claim_and_difference(e: &Element) -> String {
    format!("[{}]: claimed {:e}, difference {:e}, allowed error {:.3e}", e.index, e.got, e.want, e.bound)
}

impl GradientCheck {
    /// Checks the claimed gradients of `f`, which is given one array for each claim, in their order.
    ///
    /// # Errors
    /// [`WrongGradient`] for the first claim that does not hold.
    ///
    /// ```
    /// use attn_testkit::gradient::{Claim, GradientCheck};
    ///
    /// let (x, y) = ([1.0, 2.0], [3.0, -1.0]);
    /// let dot = |at: &[Vec<f64>]| at[0].iter().zip(&at[1]).map(|(x, y)| x * y).sum();
    /// let claims =
    ///     [Claim { name: "x", at: &x, gradient: &y }, Claim { name: "y", at: &y, gradient: &x }];
    /// GradientCheck::default().check(dot, &claims)?;
    ///
    /// let wrong = [Claim { gradient: &x, ..claims[0] }, claims[1]];
    /// assert!(GradientCheck::default().check(dot, &wrong).is_err());
    /// # Ok::<(), attn_testkit::gradient::WrongGradient>(())
    /// ```
    pub fn check(
        &self,
        mut f: impl FnMut(&[Vec<f64>]) -> f64,
        claims: &[Claim<'_>],
    ) -> Result<(), WrongGradient> {
        for Claim { name, at, gradient } in claims {
            let (found, expected) = (gradient.len(), at.len());
            if found != expected {
                return Err(WrongGradient::Length { name: name.to_string(), found, expected });
            }
        }
        let mut at: Vec<Vec<f64>> = claims.iter().map(|c| c.at.to_vec()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        for (input, claim) in claims.iter().enumerate() {
            let (len, name) = (claim.at.len(), claim.name.to_string());
            let tried = match self.sample {
                Some(n) if n < len => rand::seq::index::sample(&mut rng, len, n).into_vec(),
                _ => (0..len).collect(),
            };
            let mut differences = Vec::with_capacity(tried.len());
            for &index in &tried {
                let difference = self.difference(&mut f, &mut at, input, index);
                if !difference.is_finite() {
                    return Err(WrongGradient::NotFinite { name, index });
                }
                differences.push(difference);
            }
            let claimed: Vec<f64> = tried.iter().map(|&index| claim.gradient[index]).collect();
            if let Err(Mismatch::Elements { wrong, worst, .. }) = compare(&claimed, &differences, self.tol) {
                let worst = Element { index: tried[worst.index], ..worst };
                return Err(WrongGradient::Value { name, wrong, tried: tried.len(), worst });
            }
        }
        Ok(())
    }

    fn difference(
        &self,
        f: &mut impl FnMut(&[Vec<f64>]) -> f64,
        at: &mut [Vec<f64>],
        input: usize,
        index: usize,
    ) -> f64 {
        let x = at[input][index];
        let h = self.step * x.abs().max(1.0);
        let mut f_at = |x: f64| {
            at[input][index] = x;
            f(at)
        };
        let near = f_at(x + h) - f_at(x - h);
        let far = f_at(x + 2.0 * h) - f_at(x - 2.0 * h);
        at[input][index] = x;
        (8.0 * near - far) / (12.0 * h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sum(w * softmax(a x))` by `x` and by the scalar `a`: smooth, and every coordinate touches every output.
    fn softmax_sum(at: &[Vec<f64>]) -> f64 {
        let exp: Vec<f64> = at[0].iter().map(|x| (at[1][0] * x).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter().enumerate().map(|(i, e)| (i as f64).cos() * e / sum).sum()
    }

    fn gradients(x: &[f64], a: f64) -> (Vec<f64>, Vec<f64>) {
        let exp: Vec<f64> = x.iter().map(|x| (a * x).exp()).collect();
        let sum: f64 = exp.iter().sum();
        let f = softmax_sum(&[x.to_vec(), vec![a]]);
        let by_score = |i: usize| exp[i] / sum * ((i as f64).cos() - f);
        let by_x = (0..x.len()).map(|i| a * by_score(i)).collect();
        let by_a = (0..x.len()).map(|i| x[i] * by_score(i)).sum();
        (by_x, vec![by_a])
    }

    fn check(check: GradientCheck, edit: impl Fn(&mut Vec<f64>, &mut Vec<f64>)) -> Result<(), WrongGradient> {
        let x: Vec<f64> = (0..40).map(|i| 2.0 * f64::from(i * i).sin()).collect();
        let (mut by_x, mut by_a) = gradients(&x, 0.7);
        edit(&mut by_x, &mut by_a);
        let claims =
            [Claim { name: "x", at: &x, gradient: &by_x }, Claim { name: "a", at: &[0.7], gradient: &by_a }];
        check.check(softmax_sum, &claims)
    }

    #[test]
    fn right_gradients_are_accepted() {
        check(GradientCheck::default(), |_, _| ()).unwrap();
        check(GradientCheck { sample: Some(5), ..GradientCheck::default() }, |_, _| ()).unwrap();
    }

    #[test]
    fn wrong_gradients_are_rejected() {
        type Edit = fn(&mut Vec<f64>, &mut Vec<f64>);
        let wrong: [(&str, Edit); 7] = [
            ("x", |x, _| x.iter_mut().for_each(|g| *g = -*g)),
            ("x", |x, _| x.iter_mut().for_each(|g| *g *= 1.0 + 1e-6)),
            ("x", |x, _| x.fill(0.0)),
            ("x", |x, _| x[39] += 1e-6),
            ("x", |x, _| x[0] = f64::NAN),
            ("x", |x, _| x.rotate_left(1)),
            ("a", |_, a| a[0] *= 1.001),
        ];
        for (at, (name, edit)) in wrong.into_iter().enumerate() {
            let error = check(GradientCheck::default(), edit).expect_err(&format!("edit {at}")).to_string();
            assert!(error.contains(&format!("`{name}`")), "edit {at}: {error}");
        }
    }

    #[test]
    fn a_sample_finds_what_is_wrong_everywhere_and_names_the_coordinate() {
        let sampled = GradientCheck { sample: Some(3), ..GradientCheck::default() };
        let Err(WrongGradient::Value { tried, worst, .. }) = check(sampled, |x, _| x[7..].fill(9.0)) else {
            panic!("accepted")
        };
        assert!(tried == 3 && worst.index >= 7 && worst.got == 9.0, "{worst:?}");
    }

    #[test]
    fn lengths_and_infinities_are_named() {
        let short = check(GradientCheck::default(), |x, _| x.truncate(3)).unwrap_err().to_string();
        assert!(short.contains("3 elements, expected 40"), "{short}");
        let claim = Claim { name: "y", at: &[0.0], gradient: &[f64::NAN] };
        let log = GradientCheck::default().check(|at| at[0][0].ln(), &[claim]);
        assert_eq!(log, Err(WrongGradient::NotFinite { name: "y".into(), index: 0 }));
    }
}
