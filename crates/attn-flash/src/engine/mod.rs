//! The softmax engine: exact softmax attention over the keys that a mask leaves visible, in one pass.
//!
//! Every exact, sparse and hierarchical variant runs here. A caller says who sees whom ([`attn_core::mask::Mask`]),
//! what happens to scores ([`attn_core::score::ScoreMod`]), how much mass a key stands for ([`Spec::key_bias`]) and
//! where the tensors lie ([`Problem`]); masks and score mods are type parameters, compiled into the kernel.
//!
//! Work is cut into blocks of queries, one task each (`tasks`). A mask names the spans of keys that a block can see;
//! nothing else is visited. Spans are the tile plan: long ones are read in place, short ones (single tokens, small
//! pages) are gathered into one tile. Few queries against many keys are split along the keys and merged. Rows with lists of
//! their own run cell of keys by cell of keys (`cells`).
//! Results do not depend on the number of threads: a task's arithmetic is fixed by its position alone.

mod ahead;
mod any;
mod backward;
mod block;
mod cells;
mod chunks;
mod company;
mod few;
mod finish;
mod half_products;
mod native_bf16;
mod online_softmax;
mod panel;
mod problem;
mod rows;
mod tasks;
mod tile;

use crate::tiles::TileSizes;
pub use any::{AnySpec, attend_any, attend_backward_any, attend_backward_from_delta_any};
use attn_core::dropout::Dropout;
use attn_core::mask::Mask;
use attn_core::parallel::for_each_task;
use attn_core::qk_norm::QkNorm;
use attn_core::score::ScoreMod;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, OutMut, Result, check_lse};
pub use backward::{ForwardResult, Grads, OutputGrad, RowState, attend_backward, attend_backward_from_delta};
use block::{QueryBlock, Workspace};
use cells::RowsByCells;
pub use half_products::HalfProducts;
pub use problem::{KvView, PagedKv, Problem};
use tasks::Task;

/// What to compute; the tensors are given beside it.
#[derive(Debug)]
pub struct Spec<'a, M: ?Sized, C: ?Sized> {
    /// Multiplies raw dot products.
    pub softmax_scale: f32,
    /// Who sees whom.
    pub mask: &'a M,
    /// Applied to scaled scores, before the mask.
    pub score_mod: &'a C,
    /// Added to the score of each key: `[n_kv]` for all heads alike, or `[batch, n_heads_kv, n_kv]`. A key that stands
    /// for `c` tokens (with the mean of their values) carries `ln c`.
    pub key_bias: Option<&'a [f32]>,
    /// A logit for each query head that enters the normaliser and has no value, `[n_heads_q]`.
    pub sinks: Option<&'a [f32]>,
    /// Weights dropped at random, after the normaliser; the log-sum-exp is without dropout.
    pub dropout: Option<Dropout<'a>>,
    /// Queries and keys are normalised row by row before the product.
    pub qk_norm: Option<QkNorm<'a>>,
    /// Block sizes; `None` chooses by shape.
    pub tiles: Option<TileSizes>,
    /// How the forward pass multiplies bf16 and f16.
    pub half_products: HalfProducts,
}

impl<M: ?Sized, C: ?Sized> Clone for Spec<'_, M, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: ?Sized, C: ?Sized> Copy for Spec<'_, M, C> {}

impl<'a, M: ?Sized, C: ?Sized> Spec<'a, M, C> {
    /// Scale, mask and score mod; everything else off.
    pub fn new(softmax_scale: f32, mask: &'a M, score_mod: &'a C) -> Self {
        Self {
            softmax_scale,
            mask,
            score_mod,
            key_bias: None,
            sinks: None,
            dropout: None,
            qk_norm: None,
            tiles: None,
            half_products: HalfProducts::Auto,
        }
    }

    /// The bias of the keys that a task sees, counted from its sequence's start.
    fn key_bias_of(&self, problem: &Problem<'_>, task: &Task<'_>) -> Option<&'a [f32]> {
        let (shape, bias) = (problem.shape(), self.key_bias?);
        let first = match bias.len() == shape.n_kv {
            true => 0,
            false => {
                let head =
                    problem.batch_of(task.sequence) * shape.n_heads_kv + shape.kv_head(task.heads.start);
                head * shape.n_kv
            }
        };
        Some(&bias[first..][problem.kv_range(task.sequence)])
    }

    fn check(&self, shape: &AttnShape) -> Result<()> {
        let n_keys =
            shape.batch.checked_mul(shape.n_heads_kv).and_then(|heads| heads.checked_mul(shape.n_kv));
        if let Some(bias) = self.key_bias
            && bias.len() != shape.n_kv
            && Some(bias.len()) != n_keys
        {
            let all = n_keys.map_or("too many".into(), |n| n.to_string());
            let expected = format!("n_kv = {} or batch * n_heads_kv * n_kv = {all}", shape.n_kv);
            return Err(AttnError::shape("key_bias", "elements", bias.len(), expected));
        }
        if let Some(sinks) = self.sinks
            && sinks.len() != shape.n_heads_q
        {
            return Err(AttnError::shape("sinks", "n_heads_q", sinks.len(), shape.n_heads_q));
        }
        if let Some(norm) = &self.qk_norm {
            norm.check(shape)?;
        }
        if !self.softmax_scale.is_finite() {
            return Err(AttnError::value("softmax_scale", self.softmax_scale, "a finite number"));
        }
        Ok(())
    }
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Spec<'_, M, C> {
    /// Checks that mask, score mod and dropout were made for sequences like those of `problem`.
    fn check_made_for(&self, problem: &Problem<'_>) -> Result<()> {
        let sequences = 0..problem.n_sequences();
        let longest = |len: &dyn Fn(usize) -> usize| sequences.clone().map(len).max().unwrap_or(0);
        let shape = AttnShape {
            batch: sequences.len(),
            n_q: longest(&|s| problem.q_range(s).len()),
            n_kv: longest(&|s| problem.kv_range(s).len()),
            ..problem.shape()
        };
        self.mask.check(&shape)?;
        self.score_mod.check(&shape)?;
        self.dropout.map_or(Ok(()), |dropout| dropout.check(&shape))
    }
}

/// Attends and writes `out (batch, n_heads_q, n_q, head_dim_v)`, and `lse [batch, n_heads_q, n_q]` if given.
///
/// `out` has the dtype of the queries. Masks and score mods see the number of a sequence as `batch`, and rows and keys
/// counted from the sequence's start.
///
/// Cost: two products over the visible pairs, `2 * pairs * (head_dim + head_dim_v)` FLOPs; memory: the workspace of
/// [`TileSizes::workspace_bytes`] a thread.
///
/// # Errors
/// [`AttnError`] if `out`, `lse` or a part of `spec` does not fit; nothing has then been written.
pub fn attend<'a, M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    problem: impl Into<Problem<'a>>,
    out: OutMut<'_>,
    lse: Option<&mut [f32]>,
    spec: &Spec<'_, M, C>,
) -> Result<()> {
    let problem = problem.into();
    let shape = problem.shape();
    attn_core::check_like("out", out.shape(), out.dtype(), problem.q(), shape.head_dim_v)?;
    if let Some(lse) = &lse {
        check_lse(lse, &shape)?;
    }
    spec.check(&shape)?;
    spec.check_made_for(&problem)?;
    let tiles = spec.tiles.unwrap_or_else(|| TileSizes::auto(&shape));
    let isa = Isa::current();
    if let Some(plan) = cells::Plan::new(&shape, spec, tiles) {
        tasks::for_each(&problem, spec, plan.tiles, out, lse, |tasks| {
            for_each_task(tasks.into_iter(), cells::Workspace::default, |workspace, task| {
                let key_bias = spec.key_bias_of(&problem, &task);
                let (mask, sinks, softmax_scale) = (&spec.mask, spec.sinks, spec.softmax_scale);
                let problem = &problem;
                isa.run(RowsByCells { problem, mask, softmax_scale, key_bias, sinks, plan, workspace, task });
            });
        });
        return Ok(());
    }
    // A few rows with lists of their own are a task each, which may be split.
    let alone = tiles.are_rows_apart() && cells::are_few(&shape);
    let tiles = if alone { tiles.with_block_q(1) } else { tiles };
    let dot = native_bf16::choose(&problem, spec, isa)?;
    tasks::for_each(&problem, spec, tiles, out, lse, |tasks| {
        for_each_task(
            tasks.into_iter(),
            || Workspace::new(&problem, tiles, dot),
            |workspace, task| isa.run(QueryBlock { problem: &problem, spec, tiles, workspace, task }),
        );
    });
    Ok(())
}
