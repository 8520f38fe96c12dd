//! A configured variant under test, and how the promises run it and read its numbers.

use crate::compare::{self, Mismatch, Tol};
use crate::inputs::{Layout, Problem, StoredTensor};
use attn_core::exact::Reference;
use attn_core::registry::{Entry, Options};
use attn_core::{Attention, AttnError, AttnShape, Element, Profile};

/// Kept, or how it was broken.
pub(super) type Outcome = Result<(), String>;

/// A registry entry built with some options.
pub(super) struct Subject<'a> {
    pub(super) entry: &'a Entry,
    pub(super) options: &'a Options,
    pub(super) attention: Box<dyn Attention>,
    pub(super) profile: Profile,
}

impl<'a> Subject<'a> {
    pub(super) fn build(entry: &'a Entry, options: &'a Options) -> Result<Self, AttnError> {
        let attention = entry.build(options)?;
        let profile = attention.profile();
        Ok(Self { entry, options, attention, profile })
    }

    /// The output in f32, row-major; its buffer held NaN before.
    pub(super) fn forward(&self, problem: &Problem) -> Result<Vec<f32>, String> {
        self.forward_stored::<f32>(problem, Layout::HeadsFirst, f32::NAN)
    }

    /// The output for inputs and output stored as `E` in `layout`; every element of its buffer held `before`.
    pub(super) fn forward_stored<E: Element>(
        &self,
        problem: &Problem,
        layout: Layout,
        before: f32,
    ) -> Result<Vec<f32>, String> {
        let failed =
            |e: AttnError| format!("{}, {}: forward gave an error: {e}", E::DTYPE, at(&problem.shape));
        let stored = problem.store::<E>(layout);
        let mut out = StoredTensor::<E>::filled(problem.shape.out(), layout, before);
        let view = out.view_mut("out").map_err(failed)?;
        self.attention.forward(stored.qkv().map_err(failed)?, view.into()).map_err(failed)?;
        if out.gaps_hold(before) {
            return Ok(out.to_rows());
        }
        Err(format!("{}: memory between the rows of `out` was written ({layout:?})", at(&problem.shape)))
    }

    /// The output and the log-sum-exp in f32, row-major.
    pub(super) fn forward_with_lse(&self, problem: &Problem) -> Result<(Vec<f32>, Vec<f32>), String> {
        let failed = |e: AttnError| format!("{}: forward_with_lse gave an error: {e}", at(&problem.shape));
        let softmax = self.attention.as_softmax().ok_or("as_softmax gave nothing")?;
        let mut out = StoredTensor::<f32>::filled(problem.shape.out(), Layout::HeadsFirst, f32::NAN);
        let mut lse = vec![f32::NAN; problem.shape.rows()];
        let view = out.view_mut("out").map_err(failed)?;
        softmax.forward_with_lse(problem.qkv().map_err(failed)?, view.into(), &mut lse).map_err(failed)?;
        Ok((out.to_rows(), lse))
    }

    /// What the variant says it computes.
    pub(super) fn definition(&self, problem: &Problem) -> Result<Reference, String> {
        self.definition_stored::<f32>(problem)
    }

    /// The definition of inputs rounded to `E`.
    pub(super) fn definition_stored<E: Element>(&self, problem: &Problem) -> Result<Reference, String> {
        let failed = |e: AttnError| format!("{}: definition gave an error: {e}", at(&problem.shape));
        let stored = problem.store::<E>(Layout::HeadsFirst);
        self.attention.definition(&stored.qkv().map_err(failed)?).map_err(failed)
    }

    /// Plain softmax attention: nothing but causality and the scale is configured.
    pub(super) fn is_plain_softmax(&self) -> bool {
        let plain = |key: &String| key == "causal" || key == "scale";
        self.profile.target == attn_core::Target::Softmax && self.options.0.keys().all(plain)
    }
}

/// The sizes in words, for messages.
pub(super) fn at(s: &AttnShape) -> String {
    let AttnShape { batch, n_heads_q, n_heads_kv, n_q, n_kv, head_dim, head_dim_v } = s;
    format!(
        "batch {batch}, heads {n_heads_q}/{n_heads_kv}, n_q {n_q}, n_kv {n_kv}, head_dim {head_dim}, \
         head_dim_v {head_dim_v}"
    )
}

/// `got [batch, n_heads_q, n_q, head_dim_v]` must agree with `want`.
pub(super) fn agree(what: &str, s: &AttnShape, got: &[f32], want: &[f64], tol: Tol) -> Outcome {
    agree_in(what, s, &s.out(), got, want, tol)
}

/// `got [batch, n_heads_q, n_q]` must agree with `want`.
pub(super) fn agree_lse(what: &str, s: &AttnShape, got: &[f32], want: &[f64], tol: Tol) -> Outcome {
    agree_in(what, s, &s.out()[..3], got, want, tol)
}

fn agree_in(what: &str, s: &AttnShape, axes: &[usize], got: &[f32], want: &[f64], tol: Tol) -> Outcome {
    compare::compare(got, want, tol).map(drop).map_err(|mismatch| {
        let place = match mismatch {
            Mismatch::Elements { first, .. } => format!(" (first at {:?})", first.place(axes)),
            Mismatch::Length { .. } => String::new(),
        };
        format!("{what}: {mismatch}{place}; tolerance {tol}; {}", at(s))
    })
}

/// Every row of `got` for which `concerns(batch, head, i)` must equal that of `want`, bit for bit.
pub(super) fn same_bits(
    what: &str,
    s: &AttnShape,
    got: &[f32],
    want: &[f32],
    concerns: impl Fn(usize, usize, usize) -> bool,
) -> Outcome {
    if got.len() != want.len() {
        return Err(format!("{what}: {} elements and {}; {}", got.len(), want.len(), at(s)));
    }
    let [_, heads, n, width] = s.out();
    for (e, (got, want)) in got.iter().zip(want).enumerate() {
        let row = e / width;
        let (b, h, i) = (row / n / heads, row / n % heads, row % n);
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        if !same && concerns(b, h, i) {
            let place = [b, h, i, e % width];
            return Err(format!("{what}: element {place:?} is {got:e}, not {want:e} to the bit; {}", at(s)));
        }
    }
    Ok(())
}

/// Every row.
pub(super) fn all(_: usize, _: usize, _: usize) -> bool {
    true
}

/// As f64.
pub(super) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}
