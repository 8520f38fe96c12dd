//! The engine with the mask and the score mod chosen at run time, compiled once: for crates that decide who sees whom
//! while the program runs, and would otherwise compile the kernel again for each of their masks.
//!
//! Tiles that are seen completely run the same code as ever; only a tile on a mask's edge pays for the indirect call.

use super::{
    ForwardResult, Grads, OutputGrad, Problem, RowState, Spec, attend, attend_backward,
    attend_backward_from_delta,
};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{OutMut, Result};

/// A [`Spec`] of any mask and any score mod.
pub type AnySpec<'a> = Spec<'a, dyn Mask + 'a, dyn ScoreMod + 'a>;

/// [`attend`] with any mask and score mod.
///
/// # Errors
/// As [`attend`].
pub fn attend_any(
    problem: Problem<'_>,
    out: OutMut<'_>,
    lse: Option<&mut [f32]>,
    spec: &AnySpec<'_>,
) -> Result<()> {
    attend(problem, out, lse, spec)
}

/// [`attend_backward`] with any mask and score mod.
///
/// # Errors
/// As [`attend_backward`].
pub fn attend_backward_any(
    problem: Problem<'_>,
    forward: ForwardResult<'_>,
    grad: OutputGrad<'_>,
    grads: Grads<'_>,
    spec: &AnySpec<'_>,
) -> Result<()> {
    attend_backward(problem, forward, grad, grads, spec)
}

/// [`attend_backward_from_delta`] with any mask and score mod.
///
/// # Errors
/// As [`attend_backward_from_delta`].
pub fn attend_backward_from_delta_any(
    problem: Problem<'_>,
    rows: RowState<'_>,
    grads: Grads<'_>,
    spec: &AnySpec<'_>,
) -> Result<()> {
    attend_backward_from_delta(problem, rows, grads, spec)
}
