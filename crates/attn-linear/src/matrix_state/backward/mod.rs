//! Gradients of a chunk: the forward pass of [`super::attend`] backwards.
//!
//! With `dN` the gradient of the reads (scale included), `dS` that of the state after the chunk, `U` what is written:
//!
//! ```text
//! dA = tril(dN U^T)      dU = A^T dN + (k o end) dS      Z = (I - P)^-T dU      dP = stril(Z U^T)      dV = Z
//! d(q o down) = dN S^T   d(a o down) = Z S^T             d(k o end) = U dS^T
//! dS <- down_last o dS + (q o down)^T dN + (a o down)^T Z
//! ```
//!
//! Every use of a reader `x` that stands at `G_i` carries the factor `e^(G_i)`, every use of a write's vector `y` carries
//! `e^(-G_j)`, and what is left at the end `e^(G_last)`; hence, per channel and in natural logs,
//!
//! ```text
//! dG_i += x_i o dx_i      dG_j -= y_j o dy_j      dG_last += sum_v dS o S'      d log_decay_t = sum_(i >= t) dG_i
//! ```
//!
//! with `S'` the state after the chunk. A norm `D` adds `dD_i` to the gradients of its row of `A`, `dD_i z` to those of its
//! query, and is a column of `S'` like any other. Where values decay the same holds with reads in the place of readers and values in
//! that of keys.

mod keys;
mod pairs;
mod products;
mod values;

pub(super) use products::turn;

use super::attend::{On, fade_queries, prepare};
use super::head::Wanted;
use super::lanes::dot_f64;
use super::read::read;
use super::scratch::Scratch;
use super::solve::solve;
use super::{Chunk, Decay, Erase, Piece};
use attn_core::simd::{Simd, SimdOp};
use keys::keys_decay;
use values::values_decay;

/// A thread's buffers for the gradients of one chunk.
#[derive(Default)]
pub(super) struct BackScratch {
    /// Gradients of scores `[rows, stride]`.
    scores: Vec<f32>,
    /// Values transposed; the state and its gradient transposed.
    turned: Vec<f32>,
    state_turned: Vec<f32>,
    ended: Vec<f32>,
    /// Gradients of what is written, then of what the erase reads, `[writes, value_dim]`.
    d_written: Vec<f32>,
    d_solved: Vec<f32>,
    /// Rows on their way.
    part: Vec<f32>,
    faded: Vec<f32>,
    weights: Vec<f32>,
    /// `dG [writes, decay_width]`.
    d_sums: Vec<f64>,
    /// Sums of the later rows of these.
    later: Vec<f64>,
}

/// Gradients of one chunk.
pub(super) struct Backward<'a> {
    pub(super) chunk: Piece<'a>,
    /// Before the chunk.
    pub(super) state: &'a [f32],
    /// Of the reads, `[len, value_dim]`.
    pub(super) d_reads: &'a [f32],
    /// Of the norms, `[len]`.
    pub(super) d_norms: &'a [f32],
    /// Of what is written, beside what reads and state say; may be empty.
    pub(super) d_writes: &'a [f32],
    /// Of the state after the chunk; becomes that of the state before it.
    pub(super) d_state: &'a mut [f32],
    /// Becomes the gradients of the chunk's rows; those of the bonus are added to.
    pub(super) grads: &'a mut Chunk,
    pub(super) scratch: &'a mut Scratch,
    pub(super) back: &'a mut BackScratch,
}

impl SimdOp for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, d_reads, d_norms, d_writes, d_state, grads, scratch: x, back } = self;
        let (o, chunk) = (x.options, &chunk);
        grads.resize(&o, chunk.len.max(chunk.writes / o.writes));
        grads.q.truncate(chunk.q.len());
        grads.k.truncate(chunk.k.len());
        grads.v.truncate(chunk.v.len());
        grads.log_decay.truncate(chunk.log_decay.len());
        for rows in
            [&mut grads.q, &mut grads.k, &mut grads.v, &mut grads.a, &mut grads.b, &mut grads.log_decay]
        {
            rows.fill(0.0);
        }
        grads.strength.clear();
        grads.strength.resize(chunk.strength.len(), 0.0);
        grads.bonus.resize(chunk.bonus.len(), 0.0);
        back.d_sums.clear();
        back.d_sums.resize(chunk.log_decay.len(), 0.0);
        prepare(simd, chunk, x, Wanted::Reads, true, &mut || {});
        if x.prepared.fading.key_width <= 1 {
            fade_queries(chunk, x);
        }
        let Scratch { options, prepared, work, read: to, .. } = &mut *x;
        let on = On { o: options, chunk, values: chunk.values(o.value_dim), prepared };
        if o.erase != Erase::None {
            solve(simd, &on, state, work);
        }
        if o.decay == Decay::Value {
            read(simd, &on, state, work, [&mut to.rows, &mut to.norms], None, &mut || {});
            values_decay(simd, chunk, state, d_reads, d_state, grads, x, back);
        } else {
            keys_decay(simd, chunk, state, [d_reads, d_norms, d_writes], d_state, grads, x, back);
        }
        accumulate(&back.d_sums, o.decay_width(), &mut back.later, &mut grads.log_decay);
    }
}

/// `d log_decay_t = sum_(i >= t) dG_i`.
#[inline(always)]
fn accumulate(d_sums: &[f64], width: usize, later: &mut Vec<f64>, out: &mut [f32]) {
    later.clear();
    later.resize(width, 0.0);
    let rows = out.chunks_exact_mut(width.max(1)).zip(d_sums.chunks_exact(width.max(1))).rev();
    for (out, row) in rows {
        for ((out, g), later) in out.iter_mut().zip(row).zip(&mut *later) {
            *later += g;
            *out = *later as f32;
        }
    }
}

/// Adds `sign x o dx` to the sums a row stands at.
#[inline(always)]
fn sum_gradients(d_sums: &mut [f64], width: usize, at: Option<usize>, sign: f64, x: &[f32], dx: &[f32]) {
    let Some(at) = at.filter(|_| width > 0) else { return };
    let out = &mut d_sums[at * width..][..width];
    if width == 1 {
        out[0] += sign * dot_f64(x, dx);
    } else {
        let products = x.iter().zip(dx).map(|(x, dx)| sign * f64::from(*x) * f64::from(*dx));
        out.iter_mut().zip(products).for_each(|(out, x)| *out += x);
    }
}
