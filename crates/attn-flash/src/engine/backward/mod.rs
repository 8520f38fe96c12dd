//! The backward pass of the softmax engine: gradients from the log-sum-exps, without a score matrix.
//!
//! With `p_ij = e^(s_ij - lse_i)` recomputed tile by tile, `f_ij` what dropout multiplies weights with (else 1), `r_ij` the
//! scaled dot product and `s_ij = score_mod(r_ij) + key_bias_j`:
//!
//! ```text
//! delta_i = dout_i . out_i - dlse_i
//! dp_ij   = dout_i . v_j                          ds_ij = p_ij (f_ij dp_ij - delta_i)
//! dv_j    = sum_i f_ij p_ij dout_i                dr_ij = ds_ij score_mod'(r_ij)
//! dq_i    = softmax_scale sum_j dr_ij k_j         dk_j  = softmax_scale sum_i dr_ij q_i
//! dsink_h = - sum_i e^(sink_h - lse_i) delta_i    dkey_bias_j = sum_i ds_ij
//! ```
//!
//! Queries that share a key/value head add to the same `dk`, `dv`. Normalised queries and keys pass their gradients on through
//! the norm of each row. A row with `lse = -inf` sees nothing and contributes nothing; an invisible pair contributes nothing,
//! whatever stands in its rows.
//!
//! One pass, five products a tile. Key blocks and query blocks meet in an order that depends on the problem alone
//! (`schedule`), so the gradients have the same bits on any number of threads.
//!
//! Sources: Dao et al. 2022 (FlashAttention), appendix B; Dao 2023 (FlashAttention-2).

mod apart;
mod bias;
mod blocks;
mod cells;
mod delta;
mod meeting;
mod queries;
mod scatter;
mod schedule;
mod sizes;
mod sums;
mod tile;
mod weights;

use super::Spec;
use super::few;
use super::problem::{KvView, Problem};
use super::rows::HeadRows;
use attn_core::mask::{Head, Mask};
use attn_core::qk_norm::RowNorm;
use attn_core::score::{BiasIndex, ScoreMod};
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, OutMut, Result, TensorView, check_lse};
use blocks::{Cut, KeyBlock, RowBlock, Whole};
use meeting::{Meeting, Workspace};
use sizes::Tiles;
use std::sync::{Mutex, PoisonError};
use sums::Sums;

/// What the forward pass gave.
#[derive(Debug, Clone, Copy)]
pub struct ForwardResult<'a> {
    /// `(batch, n_heads_q, n_q, head_dim_v)`.
    pub out: TensorView<'a>,
    /// `[batch, n_heads_q, n_q]`.
    pub lse: &'a [f32],
}

/// Gradients with respect to what the forward pass gave.
#[derive(Debug, Clone, Copy)]
pub struct OutputGrad<'a> {
    /// `(batch, n_heads_q, n_q, head_dim_v)`, of any dtype.
    pub out: TensorView<'a>,
    /// `[batch, n_heads_q, n_q]`, if the loss depends on the log-sum-exps.
    pub lse: Option<&'a [f32]>,
}

/// What [`attend_backward_from_delta`] takes of the rows.
#[derive(Debug, Clone, Copy)]
pub struct RowState<'a> {
    /// Log-sum-exps, `[batch, n_heads_q, n_q]`.
    pub lse: &'a [f32],
    /// `dout_i . out_i - dlse_i`, `[batch, n_heads_q, n_q]`.
    pub delta: &'a [f32],
    /// Gradient of the output, `(batch, n_heads_q, n_q, head_dim_v)`, of any dtype.
    pub grad_out: TensorView<'a>,
}

/// Gradients to be written; what they held is not read. Those of q, k and v may have any dtype: sums are f32 and rounded
/// once.
pub struct Grads<'a> {
    /// `(batch, n_heads_q, n_q, head_dim)`.
    pub q: OutMut<'a>,
    /// `(batch, n_heads_kv, n_kv, head_dim)`.
    pub k: OutMut<'a>,
    /// `(batch, n_heads_kv, n_kv, head_dim_v)`.
    pub v: OutMut<'a>,
    /// `[n_heads_q]`.
    pub sinks: Option<&'a mut [f32]>,
    /// As long as the key bias; its elements are summed over whatever they are added to.
    pub key_bias: Option<&'a mut [f32]>,
    /// A bias that the score mod ends with: which pair reads which element, and `[elements]`.
    pub bias: Option<(&'a dyn BiasIndex, &'a mut [f32])>,
    /// Weights of the norms, `[head_dim]` each.
    pub gamma_q: Option<&'a mut [f32]>,
    /// As `gamma_q`, for keys.
    pub gamma_k: Option<&'a mut [f32]>,
}

impl<'a> Grads<'a> {
    /// Gradients of q, k and v; nothing else asked for.
    pub fn new(q: OutMut<'a>, k: OutMut<'a>, v: OutMut<'a>) -> Self {
        Self { q, k, v, sinks: None, key_bias: None, bias: None, gamma_q: None, gamma_k: None }
    }

    /// What a loss has that depends on no query.
    fn fill_zero(self) {
        let Self { q, k, v, sinks, key_bias, bias, gamma_q, gamma_k } = self;
        [q, k, v].into_iter().for_each(|mut grad| grad.fill_zero());
        let bias = bias.map(|(_, grad)| grad);
        [sinks, key_bias, bias, gamma_q, gamma_k].into_iter().flatten().for_each(|grad| grad.fill(0.0));
    }

    fn check<M: ?Sized, C: ?Sized>(&self, shape: &AttnShape, spec: &Spec<'_, M, C>) -> Result<()> {
        check_shape("grad_q", self.q.shape(), shape.q())?;
        check_shape("grad_k", self.k.shape(), shape.k())?;
        check_shape("grad_v", self.v.shape(), shape.v())?;
        let norm = spec.qk_norm;
        check_len("grad_sinks", &self.sinks, spec.sinks)?;
        check_len("grad_key_bias", &self.key_bias, spec.key_bias)?;
        check_len("grad_gamma_q", &self.gamma_q, norm.and_then(|norm| norm.gamma_q))?;
        check_len("grad_gamma_k", &self.gamma_k, norm.and_then(|norm| norm.gamma_k))?;
        match &self.bias {
            Some((index, grad)) if grad.len() != index.len() => {
                Err(AttnError::shape("grad_bias", "elements", grad.len(), index.len()))
            }
            _ => Ok(()),
        }
    }
}

fn check_shape(tensor: &str, found: [usize; 4], expected: [usize; 4]) -> Result<()> {
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if found[a] != expected[a] {
            return Err(AttnError::shape(tensor, axis, found[a], expected[a]));
        }
    }
    Ok(())
}

/// A gradient of numbers that are not there cannot be asked for.
fn check_len(name: &str, grad: &Option<&mut [f32]>, numbers: Option<&[f32]>) -> Result<()> {
    match (grad, numbers) {
        (Some(grad), Some(numbers)) if grad.len() != numbers.len() => {
            Err(AttnError::shape(name, "elements", grad.len(), numbers.len()))
        }
        (Some(_), None) => Err(AttnError::value(name, "asked for", "nothing, as there is no such input")),
        _ => Ok(()),
    }
}

/// Writes the gradients of a loss, given those with respect to the output and the log-sum-exps of [`super::attend`] on the
/// same problem with the same `spec`.
///
/// Cost: five products over the visible pairs, `pairs * (6 head_dim + 4 head_dim_v)` FLOPs; memory: one f32 a row, `O(1)` a thread,
/// and f32 sums beside gradients of half types.
///
/// # Errors
/// [`AttnError`] for an argument that does not fit; [`AttnError::Unsupported`] for a problem with a cache or pages, and for a
/// score mod without derivative. Nothing has then been written.
pub fn attend_backward<'p, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    problem: impl Into<Problem<'p>>,
    forward: ForwardResult<'_>,
    grad: OutputGrad<'_>,
    grads: Grads<'_>,
    spec: &Spec<'_, M, C>,
) -> Result<()> {
    let problem = problem.into();
    let shape = problem.shape();
    check_shape("out", forward.out.shape(), shape.out())?;
    check_shape("grad_out", grad.out.shape(), shape.out())?;
    if let Some(grad_lse) = grad.lse
        && grad_lse.len() != shape.rows()
    {
        return Err(AttnError::shape("grad_lse", "rows", grad_lse.len(), shape.rows()));
    }
    check(&problem, forward.lse, &grads, spec)?;
    let delta = delta::deltas(&shape, forward.out, grad.out, grad.lse);
    let rows = RowState { lse: forward.lse, delta: &delta, grad_out: grad.out };
    run(&problem, rows, grads, spec);
    Ok(())
}

/// As [`attend_backward`], for rows whose `delta` is known: parts of a result that was merged from several calls.
///
/// With the merged log-sum-exps and deltas, each part gives its own share of the gradients.
///
/// # Errors
/// As [`attend_backward`].
pub fn attend_backward_from_delta<'p, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    problem: impl Into<Problem<'p>>,
    rows: RowState<'_>,
    grads: Grads<'_>,
    spec: &Spec<'_, M, C>,
) -> Result<()> {
    let problem = problem.into();
    let shape = problem.shape();
    check_shape("grad_out", rows.grad_out.shape(), shape.out())?;
    if rows.delta.len() != shape.rows() {
        return Err(AttnError::shape("delta", "rows", rows.delta.len(), shape.rows()));
    }
    check(&problem, rows.lse, &grads, spec)?;
    run(&problem, rows, grads, spec);
    Ok(())
}

fn check<M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    problem: &Problem<'_>,
    lse: &[f32],
    grads: &Grads<'_>,
    spec: &Spec<'_, M, C>,
) -> Result<()> {
    let shape = problem.shape();
    spec.check(&shape)?;
    spec.check_made_for(problem)?;
    check_lse(lse, &shape)?;
    grads.check(&shape, spec)?;
    if !problem.is_plain() {
        return Err(AttnError::unsupported("the backward pass", "keys and values in a cache or in pages"));
    }
    if !spec.score_mod.has_derivative() {
        return Err(AttnError::unsupported("the backward pass", "a score mod without derivative"));
    }
    Ok(())
}

/// A backward pass on its way.
struct Pass<'a, M: ?Sized, C: ?Sized> {
    problem: &'a Problem<'a>,
    spec: &'a Spec<'a, M, C>,
    grad_out: KvView<'a>,
    tiles: Tiles,
    /// Whether the gradient of the key bias is asked for.
    sum_keys: bool,
}

impl<'a, M: ?Sized, C: ?Sized> Pass<'a, M, C> {
    /// Gradients of the outputs of one head of a sequence.
    fn grad_out_rows(&self, head: Head) -> HeadRows<'a> {
        let batch = self.problem.batch_of(head.batch);
        self.grad_out.head(batch, head.head).slice(self.problem.q_range(head.batch))
    }

    /// What is added to the scores of the keys of a sequence.
    fn key_bias(&self, sequence: usize, kv_head: usize) -> Option<&'a [f32]> {
        let (shape, keys) = (self.problem.shape(), self.problem.kv_range(sequence));
        let head = self.problem.batch_of(sequence) * shape.n_heads_kv + kv_head;
        self.spec.key_bias.map(|bias| match bias.len() == shape.n_kv {
            true => &bias[keys],
            false => &bias[head * shape.n_kv..][keys],
        })
    }
}

fn run<M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    problem: &Problem<'_>,
    rows: RowState<'_>,
    grads: Grads<'_>,
    spec: &Spec<'_, M, C>,
) {
    let shape = problem.shape();
    if shape.rows() == 0 {
        return grads.fill_zero();
    }
    let Grads { q, k, v, sinks, key_bias, bias, gamma_q, gamma_k } = grads;
    let pass = Pass {
        problem,
        spec,
        grad_out: rows.grad_out.into(),
        tiles: Tiles::auto(problem, spec.mask),
        sum_keys: key_bias.is_some(),
    };
    if let (Some(sinks), Some(grad)) = (spec.sinks, sinks) {
        delta::sink_gradients(&shape, sinks, rows.lse, rows.delta, grad);
    }

    if let Some((index, grad)) = bias {
        pass.bias_gradient([rows.lse, rows.delta], index, grad);
    }

    let n_sums = if pass.sum_keys { shape.batch * shape.n_heads_kv * shape.n_kv } else { 0 };
    let mut key_sums = vec![0.0; n_sums];
    if spec.tiles.is_some_and(|tiles| tiles.are_rows_apart()) && few::serves(spec) {
        match pass.by_cells() {
            Some(cells) => pass.run_by_cells(&cells, rows, [q, k, v], &mut key_sums),
            None => pass.run_apart(rows, [q, k, v], &mut key_sums),
        }
        return sum_key_bias(&shape, key_bias, &key_sums);
    }
    let whole = Whole { q, k, v, lse: rows.lse, delta: rows.delta, key_sums: &mut key_sums };
    let Cut { mut keys, mut rows, schedule } = pass.cut(whole);
    // Blocks that meet nobody have no gradient.
    keys.iter_mut().filter(|block| block.left == 0).for_each(|block| pass.finish_keys(block));
    rows.iter_mut().filter(|block| block.left == 0).for_each(|block| pass.finish_rows(block));
    let keys: Vec<_> = keys.into_iter().map(Mutex::new).collect();
    let rows: Vec<_> = rows.into_iter().map(Mutex::new).collect();
    let isa = Isa::current();
    schedule.run(
        || Workspace::new(&pass),
        |workspace, w, i| {
            // Never contended: a block takes part in one meeting at a time.
            let mut keys = keys[w].lock().unwrap_or_else(PoisonError::into_inner);
            let mut rows = rows[i].lock().unwrap_or_else(PoisonError::into_inner);
            let (keys, rows) = (&mut *keys, &mut *rows);
            isa.run(Meeting { pass: &pass, keys, rows, workspace });
            keys.left -= 1;
            if keys.left == 0 {
                pass.finish_keys(keys);
            }
            rows.left -= 1;
            if rows.left == 0 {
                pass.finish_rows(rows);
            }
        },
    );

    let keys = keys.into_iter().map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner));
    let rows = rows.into_iter().map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner));
    sum_parts(gamma_k, keys.map(|block| block.grad_gamma));
    sum_parts(gamma_q, rows.map(|block| block.grad_gamma));
    sum_key_bias(&shape, key_bias, &key_sums);
}

/// Writes the gradient of the key bias from the sums of all heads.
fn sum_key_bias(shape: &AttnShape, key_bias: Option<&mut [f32]>, key_sums: &[f32]) {
    let Some(key_bias) = key_bias else { return };
    if key_bias.len() == key_sums.len() {
        key_bias.copy_from_slice(key_sums);
    } else {
        sum_parts(Some(key_bias), key_sums.chunks(shape.n_kv.max(1)).map(<[f32]>::to_vec));
    }
}

/// The sum of all parts, in their order; empty ones are none.
fn sum_parts(sum: Option<&mut [f32]>, parts: impl Iterator<Item = Vec<f32>>) {
    let Some(sum) = sum else { return };
    let mut sums = vec![0.0f64; sum.len()];
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(x));
    }
    sum.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum as f32);
}

impl<M: ?Sized, C: ?Sized> Pass<'_, M, C> {
    /// All gradients of these keys are summed.
    fn finish_keys(&self, block: &mut KeyBlock<'_>) {
        block.grad_v.finish(|_, _| {});
        let Some(norm) = &self.spec.qk_norm else { return block.grad_k.finish(|_, _| {}) };
        let rows = self.problem.kv_rows(block.sequence, block.kv_head).0.piece(block.keys.clone());
        block.grad_gamma = norm_gradients(&mut block.grad_k, rows, norm.k());
    }

    /// All gradients of these queries are summed.
    fn finish_rows(&self, block: &mut RowBlock<'_>) {
        let Some(norm) = &self.spec.qk_norm else { return block.grad_q.finish(|_, _| {}) };
        let rows = self.problem.q_rows(block.head.batch, block.head.head).slice(block.rows.clone());
        block.grad_gamma = norm_gradients(&mut block.grad_q, rows, norm.q());
    }
}

/// Replaces the gradients of normalised rows by those of `rows`; gives that of the norm's weights.
fn norm_gradients(grads: &mut Sums<'_>, rows: HeadRows<'_>, norm: RowNorm<'_>) -> Vec<f32> {
    let width = rows.width();
    let (mut x, mut grad) = (vec![0.0; width], vec![0.0; width]);
    let mut grad_gamma = vec![0.0; width];
    grads.finish(|i, row| {
        rows.slice(i..i + 1).copy_to(&mut x);
        norm.backward(&x, row, &mut grad, Some(&mut grad_gamma));
        row.copy_from_slice(&grad);
    });
    grad_gamma
}
