//! Whether numbers agree with the wanted ones, and where they do not.
//!
//! The rules, for `got` against `want`, element by element:
//!
//! - both have the same length;
//! - where NaN is wanted there must be NaN, and NaN is accepted nowhere else;
//! - an infinity must be met by the same infinity, and is accepted nowhere else;
//! - every other element must satisfy `|got - want| <= bound`, with
//!
//! ```text
//! AllClose { atol, rtol }   bound = atol + rtol * |want|
//! ScaledMax(t)              bound = t * max(max |want|, 1e-3)     the maximum over the finite wanted elements
//! ```
//!
//! The comparison is written `error <= bound`, which is false for NaN; `!(error > bound)` would let NaN pass.

use std::fmt;

/// How far a number may be from the wanted one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tol {
    /// `|got - want| <= atol + rtol * |want|` for each element.
    AllClose {
        /// Absolute part.
        atol: f64,
        /// Share of the wanted element.
        rtol: f64,
    },
    /// `max |got - want| <= t * max(max |want|, 1e-3)`: a share of the tensor's largest element.
    ScaledMax(f64),
}

impl Tol {
    /// Equal numbers only.
    pub const EXACT: Tol = Tol::AllClose { atol: 0.0, rtol: 0.0 };

    /// The bound of every element of `want`.
    fn bounds(self, want: &[f64]) -> impl Fn(f64) -> f64 + use<> {
        let largest = want.iter().filter(|w| w.is_finite()).fold(1e-3, |max: f64, w| max.max(w.abs()));
        move |want| match self {
            Self::AllClose { atol, rtol } => atol + rtol * want.abs(),
            Self::ScaledMax(t) => t * largest,
        }
    }
}

impl fmt::Display for Tol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllClose { atol, rtol } => write!(f, "{atol:e} + {rtol:e} |want|"),
            Self::ScaledMax(t) => write!(f, "{t:e} of the largest"),
        }
    }
}

/// One compared element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Element {
    /// Its place in the row-major slice.
    pub index: usize,
    /// What was found there.
    pub got: f64,
    /// What was wanted there.
    pub want: f64,
    /// The largest error allowed there.
    pub bound: f64,
}

impl Element {
    /// `|got - want|`; 0 where both are the same infinity or both NaN.
    pub fn error(&self) -> f64 {
        if self.got == self.want || (self.got.is_nan() && self.want.is_nan()) {
            return 0.0;
        }
        (self.got - self.want).abs()
    }

    /// Whether the rules accept it.
    pub fn agrees(&self) -> bool {
        if self.want.is_nan() {
            return self.got.is_nan();
        }
        // An infinite `want` would make the bound infinite too, so it has to be met by `==`.
        self.got == self.want || (self.want.is_finite() && self.error() <= self.bound)
    }

    /// How bad it is: the error as a share of the bound; infinite where no finite error would do.
    fn badness(&self) -> f64 {
        match (self.agrees(), self.error()) {
            (true, 0.0) => 0.0,
            (true, error) => error / self.bound,
            (false, error) if error.is_finite() && self.bound > 0.0 => error / self.bound,
            (false, _) => f64::INFINITY,
        }
    }

    /// The element's indices in a tensor of this shape.
    pub fn place(&self, shape: &[usize]) -> Vec<usize> {
        let mut rest = self.index;
        let mut place: Vec<usize> = shape
            .iter()
            .rev()
            .map(|&n| {
                let at = rest % n.max(1);
                rest /= n.max(1);
                at
            })
            .collect();
        place.reverse();
        place
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, got, want, bound } = self;
        write!(f, "[{index}]: got {got:e}, want {want:e} (error {:.3e}, allowed {bound:.3e})", self.error())
    }
}

/// All elements agree.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// Elements compared.
    pub len: usize,
    /// The element closest to its bound; `None` without elements.
    pub worst: Option<Element>,
}

/// They do not agree.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Mismatch {
    /// Another number of elements.
    #[error("{got} elements, wanted {want}")]
    Length {
        /// Elements found.
        got: usize,
        /// Elements wanted.
        want: usize,
    },
    /// Elements outside their bounds.
    #[error("{wrong} of {len} elements are wrong, first {first}, worst {worst}")]
    Elements {
        /// How many.
        wrong: usize,
        /// Elements compared.
        len: usize,
        /// The first wrong one.
        first: Element,
        /// The one furthest beyond its bound.
        worst: Element,
    },
}

/// Compares `got` with `want` by the rules of this module.
///
/// # Errors
/// [`Mismatch`] with the first and the worst element that break a rule.
///
/// ```
/// use attn_testkit::compare::{Tol, compare};
///
/// let tol = Tol::AllClose { atol: 1e-6, rtol: 1e-5 };
/// assert!(compare(&[1.0f32, -2.0], &[1.0, -2.00001], tol).is_ok());
/// assert!(compare(&[1.0f32, f32::NAN], &[1.0, -2.0], tol).is_err());
/// ```
pub fn compare<T: Copy + Into<f64>>(got: &[T], want: &[f64], tol: Tol) -> Result<Agreement, Mismatch> {
    if got.len() != want.len() {
        return Err(Mismatch::Length { got: got.len(), want: want.len() });
    }
    let bound = tol.bounds(want);
    let (mut wrong, mut first, mut worst) = (0, None, None::<Element>);
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let element = Element { index, got: got.into(), want, bound: bound(want) };
        if !element.agrees() {
            wrong += 1;
            first = first.or(Some(element));
        }
        if worst.is_none_or(|w| element.badness() > w.badness()) {
            worst = Some(element);
        }
    }
    match (first, worst) {
        (Some(first), Some(worst)) => Err(Mismatch::Elements { wrong, len: want.len(), first, worst }),
        _ => Ok(Agreement { len: want.len(), worst }),
    }
}

/// Panics with the first and the worst element unless `got` agrees with `want`.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn assert_close<T: Copy + Into<f64>>(what: &str, got: &[T], want: &[f64], tol: Tol) {
    if let Err(mismatch) = compare(got, want, tol) {
        panic!("{what}: {mismatch}; tolerance {tol}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSE: Tol = Tol::AllClose { atol: 1e-6, rtol: 1e-5 };
    const SCALED: Tol = Tol::ScaledMax(1e-5);

    /// Both tolerances reject `got` and blame element `index`.
    #[track_caller]
    fn rejects(got: &[f32], want: &[f64], index: usize) {
        for tol in [CLOSE, SCALED] {
            match compare(got, want, tol) {
                Err(Mismatch::Elements { first, .. }) => assert_eq!(first.index, index, "{tol}"),
                other => panic!("{tol} gave {other:?}"),
            }
        }
    }

    #[test]
    fn rejects_nan() {
        rejects(&[1.0, f32::NAN, 3.0], &[1.0, 2.0, 3.0], 1);
        rejects(&[1.0, f32::NAN], &[1.0, f64::INFINITY], 1);
    }

    #[test]
    fn wants_nan_where_the_truth_is_nan() {
        assert!(compare(&[f32::NAN, 1.0], &[f64::NAN, 1.0], CLOSE).is_ok());
        assert!(compare(&[f32::NAN, 1.0], &[f64::NAN, 1.0], SCALED).is_ok());
        rejects(&[0.0, 1.0], &[f64::NAN, 1.0], 0);
        rejects(&[f32::INFINITY, 1.0], &[f64::NAN, 1.0], 0);
    }

    #[test]
    fn rejects_wrong_infinities() {
        let inf = f64::INFINITY;
        rejects(&[-1e30, 0.0], &[-inf, 0.0], 0);
        rejects(&[f32::MIN, 0.0], &[-inf, 0.0], 0);
        rejects(&[f32::INFINITY, 0.0], &[-inf, 0.0], 0);
        rejects(&[f32::NEG_INFINITY, 0.0], &[inf, 0.0], 0);
        rejects(&[f32::INFINITY, 0.0], &[1e30, 0.0], 0);
        assert!(compare(&[f32::NEG_INFINITY], &[-inf], CLOSE).is_ok());
    }

    #[test]
    fn an_infinity_does_not_widen_the_bound_of_the_others() {
        rejects(&[f32::INFINITY, 1.0], &[f64::INFINITY, 1.1], 1);
    }

    #[test]
    fn rejects_zeros_where_values_are_wanted() {
        rejects(&[0.0; 4], &[0.5, -0.25, 1.0, 0.125], 0);
        assert!(compare(&[0.0f32; 4], &[0.0; 4], Tol::EXACT).is_ok());
    }

    #[test]
    fn rejects_values_where_zero_is_wanted() {
        rejects(&[1e-3, 1.0], &[0.0, 1.0], 0);
        assert!(compare(&[1e-30f32], &[0.0], Tol::EXACT).is_err());
    }

    #[test]
    fn rejects_other_lengths() {
        let short = compare(&[1.0f32], &[1.0, 2.0], CLOSE).unwrap_err();
        assert_eq!(short, Mismatch::Length { got: 1, want: 2 });
        assert!(compare(&[1.0f32, 2.0, 3.0], &[1.0, 2.0], SCALED).is_err());
        assert!(compare::<f32>(&[], &[1.0], SCALED).is_err());
        assert!(compare::<f32>(&[], &[], SCALED).is_ok());
    }

    #[test]
    fn rejects_one_wrong_element_at_the_end() {
        let want: Vec<f64> = (0..1000).map(|i| f64::from(i).sin()).collect();
        let mut got: Vec<f32> = want.iter().map(|w| *w as f32).collect();
        assert!(compare(&got, &want, CLOSE).is_ok());
        *got.last_mut().unwrap() += 1e-4;
        rejects(&got, &want, 999);
    }

    #[test]
    fn the_bound_is_where_it_says() {
        let want = [2.0, -4.0];
        let close = 1e-6 + 1e-5 * 2.0;
        assert!(compare(&[2.0 + 0.999 * close, -4.0], &want, CLOSE).is_ok());
        assert!(compare(&[2.0 + 1.001 * close, -4.0], &want, CLOSE).is_err());
        assert!(compare(&[2.0 - 1.001 * close, -4.0], &want, CLOSE).is_err());
        let scaled = 1e-5 * 4.0;
        assert!(compare(&[2.0 + 0.999 * scaled, -4.0], &want, SCALED).is_ok());
        assert!(compare(&[2.0 + 1.001 * scaled, -4.0], &want, SCALED).is_err());
        // Below 1e-3 the scale stops shrinking.
        assert!(compare(&[0.999e-8], &[0.0], SCALED).is_ok());
        assert!(compare(&[1.001e-8], &[0.0], SCALED).is_err());
    }

    #[test]
    fn a_bound_that_is_nan_accepts_nothing() {
        assert!(compare(&[1.5f64], &[1.0], Tol::ScaledMax(f64::NAN)).is_err());
        assert!(compare(&[1.5f64], &[1.0], Tol::AllClose { atol: f64::NAN, rtol: 0.0 }).is_err());
    }

    #[test]
    fn the_worst_element_is_named_with_its_place() {
        let Err(Mismatch::Elements { wrong, first, worst, .. }) =
            compare(&[1.1f64, 2.0, 9.0, 4.0, 5.1, 6.0], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], CLOSE)
        else {
            panic!("accepted")
        };
        assert_eq!((wrong, first.index, worst.index), (3, 0, 2));
        assert_eq!(worst.place(&[2, 3]), [0, 2]);
        assert_eq!(Element { index: 4, ..worst }.place(&[2, 3]), [1, 1]);
        let text = worst.to_string();
        assert!(text.contains("got 9e0") && text.contains("want 3e0"), "{text}");
    }

    #[test]
    #[should_panic(expected = "out: 1 of 2 elements are wrong")]
    fn assert_close_says_what() {
        assert_close("out", &[1.0f32, 2.0], &[1.0, 3.0], CLOSE);
    }
}
