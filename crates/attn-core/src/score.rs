//! What happens to a score between `softmax_scale * q.k` and the mask: soft cap, biases, the user's closure.
//!
//! Order of the operator: scale, then the score mod, then the mask. A score of -inf hides its pair exactly as a
//! mask does.

use crate::mask::{Pair, broadcast_strides};
use crate::{AttnError, AttnShape, Result};

/// A function of a scaled score and of where it stands.
pub trait ScoreMod: Sync {
    /// The new score, as the kernels compute it.
    fn apply(&self, score: f32, at: Pair) -> f32;

    /// The definition in f64, for the oracle.
    fn apply_f64(&self, score: f64, at: Pair) -> f64;

    /// `d apply(score) / d score`, for the backward pass.
    fn derivative(&self, score: f32, at: Pair) -> f32;

    /// Whether [`ScoreMod::derivative`] is known; a backward pass through one that is not is an error.
    fn has_derivative(&self) -> bool {
        true
    }

    /// True if `apply` returns the score as it is; the kernel then skips it.
    #[inline(always)]
    fn is_identity(&self) -> bool {
        false
    }
}

impl<T: ScoreMod + ?Sized> ScoreMod for &T {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (**self).apply(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        (**self).apply_f64(score, at)
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        (**self).derivative(score, at)
    }

    fn has_derivative(&self) -> bool {
        (**self).has_derivative()
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        (**self).is_identity()
    }
}

/// `None` leaves scores alone.
impl<C: ScoreMod> ScoreMod for Option<C> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.as_ref().map_or(score, |score_mod| score_mod.apply(score, at))
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.as_ref().map_or(score, |score_mod| score_mod.apply_f64(score, at))
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.as_ref().map_or(1.0, |score_mod| score_mod.derivative(score, at))
    }

    fn has_derivative(&self) -> bool {
        self.as_ref().is_none_or(ScoreMod::has_derivative)
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        self.as_ref().is_none_or(ScoreMod::is_identity)
    }
}

/// Leaves scores alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unchanged;

impl ScoreMod for Unchanged {
    #[inline(always)]
    fn apply(&self, score: f32, _: Pair) -> f32 {
        score
    }

    fn apply_f64(&self, score: f64, _: Pair) -> f64 {
        score
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        true
    }
}

/// `c * tanh(s / c)`: keeps logits inside `(-c, c)`.
///
/// Source: Bello et al. 2016 (pointer logits); Gemma 2, 2024.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftCap(f32);

impl SoftCap {
    /// # Errors
    /// [`AttnError::Value`] unless `cap` is positive and finite.
    pub fn new(cap: f32) -> Result<Self> {
        if cap.is_finite() && cap > 0.0 {
            return Ok(Self(cap));
        }
        Err(AttnError::value("softcap", cap, "a positive finite number"))
    }
}

impl ScoreMod for SoftCap {
    #[inline(always)]
    fn apply(&self, score: f32, _: Pair) -> f32 {
        self.0 * (score / self.0).tanh()
    }

    fn apply_f64(&self, score: f64, _: Pair) -> f64 {
        let cap = f64::from(self.0);
        cap * (score / cap).tanh()
    }

    #[inline(always)]
    fn derivative(&self, score: f32, _: Pair) -> f32 {
        let tanh = (score / self.0).tanh();
        1.0 - tanh * tanh
    }
}

/// Attention with linear biases: `s - slope_h * |i + offset - j|`.
///
/// Source: Press, Smith, Lewis, 2021.
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    slopes: Vec<f32>,
    offset: isize,
}

impl Alibi {
    /// One slope a query head; `offset` is the position of query 0 on the key axis.
    ///
    /// # Errors
    /// [`AttnError::Shape`] unless there is one slope a query head.
    pub fn new(slopes: Vec<f32>, shape: &AttnShape, offset: isize) -> Result<Self> {
        if slopes.len() != shape.n_heads_q {
            return Err(AttnError::shape("alibi_slopes", "n_heads_q", slopes.len(), shape.n_heads_q));
        }
        Ok(Self { slopes, offset })
    }

    /// The paper's slopes: a geometric sequence for powers of two, else that of the power below followed by
    /// every other slope of the power above.
    pub fn default_slopes(n_heads: usize) -> Vec<f32> {
        let geometric = |n: usize| (1..=n).map(move |h| (-8.0 * h as f32 / n as f32).exp2());
        if n_heads == 0 {
            return Vec::new();
        }
        let below = 1 << n_heads.ilog2();
        geometric(below).chain(geometric(2 * below).step_by(2)).take(n_heads).collect()
    }

    fn distance(&self, at: Pair) -> isize {
        (at.i as isize + self.offset - at.j as isize).abs()
    }
}

impl ScoreMod for Alibi {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score - self.slopes[at.head] * self.distance(at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score - f64::from(self.slopes[at.head]) * self.distance(at) as f64
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

/// Adds a dense tensor, broadcast over the axes on which it has length 1.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    bias: &'a [f32],
    strides: [usize; 4],
}

impl<'a> Bias<'a> {
    /// `bias`, row-major, of `bias_shape` with 1 to 4 axes, right-aligned to `(batch, n_heads_q, n_q, n_kv)`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::Layout`] if it does not broadcast to the problem.
    pub fn new(bias: &'a [f32], bias_shape: &[usize], shape: &AttnShape) -> Result<Self> {
        Ok(Self { bias, strides: broadcast_strides("bias", bias.len(), bias_shape, shape)? })
    }

    #[inline(always)]
    fn at(&self, p: Pair) -> f32 {
        let s = &self.strides;
        self.bias[p.batch * s[0] + p.head * s[1] + p.i * s[2] + p.j * s[3]]
    }
}

impl ScoreMod for Bias<'_> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.at(at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.at(at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

/// A closure `(score, pair) -> score`, compiled into the kernel. Its derivative is not known; for a backward pass use
/// [`ScoreFnWithDerivative`].
#[derive(Debug, Clone, Copy)]
pub struct ScoreFn<F>(pub F);

impl<F: Fn(f32, Pair) -> f32 + Sync> ScoreMod for ScoreFn<F> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (self.0)(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        f64::from((self.0)(score as f32, at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        f32::NAN
    }

    fn has_derivative(&self) -> bool {
        false
    }
}

/// A closure `(score, pair) -> score` and its derivative with respect to the score, `(score, pair) -> slope`.
#[derive(Debug, Clone, Copy)]
pub struct ScoreFnWithDerivative<F, D>(pub F, pub D);

impl<F, D> ScoreMod for ScoreFnWithDerivative<F, D>
where
    F: Fn(f32, Pair) -> f32 + Sync,
    D: Fn(f32, Pair) -> f32 + Sync,
{
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (self.0)(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        f64::from((self.0)(score as f32, at))
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        (self.1)(score, at)
    }
}

/// First `A`, then `B`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Then<A, B>(pub A, pub B);

impl<A: ScoreMod, B: ScoreMod> ScoreMod for Then<A, B> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.1.apply(self.0.apply(score, at), at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.1.apply_f64(self.0.apply_f64(score, at), at)
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.1.derivative(self.0.apply(score, at), at) * self.0.derivative(score, at)
    }

    fn has_derivative(&self) -> bool {
        self.0.has_derivative() && self.1.has_derivative()
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        self.0.is_identity() && self.1.is_identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Pair = Pair { batch: 0, head: 1, i: 2, j: 5 };

    #[test]
    fn kernel_and_definition_agree() {
        let shape = AttnShape { n_q: 4, n_kv: 6, ..AttnShape::square(2, 1, 1) };
        let bias: Vec<f32> = (0..24).map(|x| x as f32 / 7.0).collect();
        let mods: [&dyn ScoreMod; 5] = [
            &Unchanged,
            &SoftCap::new(3.0).unwrap(),
            &Alibi::new(Alibi::default_slopes(2), &shape, 2).unwrap(),
            &Bias::new(&bias, &[4, 6], &shape).unwrap(),
            &Then(SoftCap::new(3.0).unwrap(), ScoreFn(|s, p: Pair| s * p.i as f32)),
        ];
        for (m, score_mod) in mods.iter().enumerate() {
            let (got, want) = (score_mod.apply(1.7, AT), score_mod.apply_f64(f64::from(1.7f32), AT));
            assert!((f64::from(got) - want).abs() < 1e-5, "mod {m}: {got} and {want}");
        }
    }

    #[test]
    fn derivatives_are_those_of_the_definition() {
        let cap = SoftCap::new(3.0).unwrap();
        let square = ScoreFnWithDerivative(|s: f32, _| s * s, |s, _| 2.0 * s);
        let mods: [&dyn ScoreMod; 4] = [&Unchanged, &cap, &square, &Then(cap, square)];
        for (m, score_mod) in mods.iter().enumerate() {
            let at = |s: f64| score_mod.apply_f64(s, AT);
            let slope = (at(1.25 + 0.0625) - at(1.25 - 0.0625)) / 0.125;
            let got = f64::from(score_mod.derivative(1.25, AT));
            assert!((got - slope).abs() < 2e-3, "mod {m}: {got} and {slope}");
        }
        assert!(!Then(cap, ScoreFn(|s, _| s)).has_derivative());
    }

    #[test]
    fn default_slopes_follow_the_paper() {
        assert_eq!(Alibi::default_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
        let six = Alibi::default_slopes(6);
        assert_eq!(six[..4], Alibi::default_slopes(4));
        assert_eq!(six[4..], [0.5, 0.125]);
    }

    #[test]
    fn bad_caps_are_refused() {
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(SoftCap::new(cap).is_err(), "{cap}");
        }
    }
}
