//! Some queries of a head, as a tile needs them: rows, their transposes, and what the forward pass left.

use super::Pass;
use super::weights::{LANES, Rows};
use crate::engine::rows::Wide;
use attn_core::mask::Head;
use attn_core::qk_norm::RowNorm;
use attn_core::simd::Simd;
use attn_core::tile::{all_finite, transpose};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Scratch for at most [`LANES`] queries.
pub(super) struct QueryScratch {
    /// `[LANES, head_dim]` and `[LANES, head_dim_v]`, for rows that are not read in place.
    q: Vec<f32>,
    grad_out: Vec<f32>,
    /// `[head_dim, LANES]`, scaled, and `[head_dim_v, LANES]`.
    q_t: Vec<f32>,
    grad_out_t: Vec<f32>,
}

impl QueryScratch {
    pub(super) fn new(head_dim: usize, head_dim_v: usize) -> Self {
        let zeros = |width: usize| vec![0.0; LANES * width];
        Self {
            q: zeros(head_dim),
            grad_out: zeros(head_dim_v),
            q_t: zeros(head_dim),
            grad_out_t: zeros(head_dim_v),
        }
    }
}

/// See the module.
pub(super) struct Queries<'a> {
    pub(super) head: Head,
    /// Rows, counted from the sequence's start.
    pub(super) rows: Range<usize>,
    pub(super) q: Wide<'a>,
    pub(super) grad_out: Wide<'a>,
    pub(super) q_t: &'a [f32],
    pub(super) grad_out_t: &'a [f32],
    pub(super) state: Rows,
    /// Some queries see nothing.
    pub(super) some_dead: bool,
    /// No query and no gradient of an output is NaN or infinite.
    pub(super) finite: bool,
}

impl<'a> Queries<'a> {
    /// Takes `rows` of `head`, whose log-sum-exps and deltas are `lse` and `delta`.
    #[inline(always)]
    pub(super) fn load<S: Simd, M: ?Sized, C: ?Sized>(
        simd: S,
        pass: &'a Pass<'a, M, C>,
        head: Head,
        rows: Range<usize>,
        [lse, delta]: [&[f32]; 2],
        scratch: &'a mut QueryScratch,
    ) -> Self {
        let (shape, n_rows) = (pass.problem.shape(), rows.len());
        let q = pass.problem.q_rows(head.batch, head.head).slice(rows.clone());
        let q = match &pass.spec.qk_norm {
            None => q.wide(&mut scratch.q),
            Some(norm) => {
                q.copy_to(&mut scratch.q);
                normalise(&mut scratch.q[..n_rows * shape.head_dim], shape.head_dim, norm.q());
                Wide { data: &scratch.q, stride: shape.head_dim }
            }
        };
        let grad_out = pass.grad_out_rows(head).slice(rows.clone()).wide(&mut scratch.grad_out);
        let matrix =
            |wide: Wide<'a>, width| attn_core::view::Rows::new(wide.data, n_rows, width, wide.stride);
        transpose(simd, matrix(q, shape.head_dim), pass.spec.softmax_scale, &mut scratch.q_t, LANES);
        transpose(simd, matrix(grad_out, shape.head_dim_v), 1.0, &mut scratch.grad_out_t, LANES);

        let mut state = Rows { reference: [f32::INFINITY; LANES], delta: [0.0; LANES] };
        let mut some_dead = false;
        for (lane, (&lse, &delta)) in lse.iter().zip(delta).enumerate() {
            if lse == f32::NEG_INFINITY {
                some_dead = true;
            } else {
                (state.reference[lane], state.delta[lane]) = (lse * LOG2_E, delta);
            }
        }
        let finite = |t: &[f32]| all_finite(t);
        let finite = finite(&scratch.q_t) && finite(&scratch.grad_out_t);
        let (q_t, grad_out_t) = (&*scratch.q_t, &*scratch.grad_out_t);
        Self { head, rows, q, grad_out, q_t, grad_out_t, state, some_dead, finite }
    }
}

/// Normalises rows `[_, width]` in place.
pub(super) fn normalise(rows: &mut [f32], width: usize, norm: RowNorm<'_>) {
    let mut normal = vec![0.0; width];
    for row in rows.chunks_exact_mut(width) {
        norm.apply(row, &mut normal);
        row.copy_from_slice(&normal);
    }
}
