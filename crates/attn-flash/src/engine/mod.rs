//! The softmax engine: exact softmax attention over the keys that a mask leaves visible, in one pass.
//!
//! Every exact, sparse and hierarchical variant runs here. A caller says who sees whom ([`attn_core::mask::Mask`]),
//! what happens to scores ([`attn_core::score::ScoreMod`]) and how much mass a key stands for ([`Spec::key_bias`]);
//! all three are type parameters or plain slices, compiled into the kernel.
//!
//! Work is cut into blocks of queries, one task each. The mask names the spans of keys a block can see; nothing else
//! is visited. Results do not depend on the number of threads: a task's arithmetic is fixed by its position alone.

mod block;
mod online_softmax;

use crate::tiles::TileSizes;
use attn_core::mask::Mask;
use attn_core::parallel::for_each_task;
use attn_core::score::ScoreMod;
use attn_core::simd::Isa;
use attn_core::view::BlockMut;
use attn_core::{AttnError, Element, OutMut, Qkv, Result, TypedOp, TypedQkv, ViewMut, check_lse};
use block::{QueryBlock, Workspace};

/// What to compute; the tensors are given beside it.
#[derive(Debug, Clone, Copy)]
pub struct Spec<'a, M: ?Sized, C: ?Sized> {
    /// Multiplies raw dot products.
    pub softmax_scale: f32,
    /// Who sees whom.
    pub mask: &'a M,
    /// Applied to scaled scores, before the mask.
    pub score_mod: &'a C,
    /// Added to the score of each key, `[n_kv]`, the same for all heads: a key that stands for `c` tokens (with the
    /// mean of their values) carries `ln c`.
    pub key_bias: Option<&'a [f32]>,
    /// Block sizes; `None` chooses by shape.
    pub tiles: Option<TileSizes>,
}

/// Attends `x` and writes `out`, and `lse [batch, n_heads_q, n_q]` if given.
///
/// Cost: two products over the visible pairs, `2 * pairs * (head_dim + head_dim_v)` FLOPs; memory: the workspace of
/// [`TileSizes::workspace_bytes`] a thread.
///
/// # Errors
/// [`AttnError`] if `out`, `lse` or `key_bias` do not fit; nothing has then been written.
pub fn attend<M: Mask + ?Sized, C: ScoreMod + ?Sized>(
    x: Qkv<'_>,
    out: OutMut<'_>,
    lse: Option<&mut [f32]>,
    spec: &Spec<'_, M, C>,
) -> Result<()> {
    x.with_out(out, Attend { spec, lse })
}

struct Attend<'a, M: ?Sized, C: ?Sized> {
    spec: &'a Spec<'a, M, C>,
    lse: Option<&'a mut [f32]>,
}

/// One block of queries with its place in the outputs.
struct Task<'a, E> {
    block: BlockMut<'a, E>,
    lse: Option<&'a mut [f32]>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> TypedOp for Attend<'_, M, C> {
    type Output = ();

    fn run<E: Element>(self, x: TypedQkv<'_, E>, out: ViewMut<'_, E>) -> Result<()> {
        let (shape, spec) = (x.shape, self.spec);
        if let Some(lse) = &self.lse {
            check_lse(lse, &shape)?;
        }
        if let Some(bias) = spec.key_bias
            && bias.len() != shape.n_kv
        {
            return Err(AttnError::shape("key_bias", "n_kv", bias.len(), shape.n_kv));
        }
        if !spec.softmax_scale.is_finite() {
            return Err(AttnError::value("softmax_scale", spec.softmax_scale, "a finite number"));
        }
        let tiles = spec.tiles.unwrap_or_else(|| TileSizes::auto(&shape));
        let isa = Isa::current();
        let tasks = tasks(out, self.lse, shape.n_q, tiles.block_q());
        for_each_task(
            tasks.into_iter(),
            || Workspace::new(&shape, tiles, E::as_f32(&[]).is_none()),
            |workspace, Task { block, lse }| {
                isa.run(QueryBlock { x: &x, spec, tiles, workspace, block, lse })
            },
        );
        Ok(())
    }
}

/// One task a block, the last rows first: under a causal mask they are the longest.
fn tasks<'a, E: Element>(
    out: ViewMut<'a, E>,
    lse: Option<&'a mut [f32]>,
    n_q: usize,
    block_q: usize,
) -> Vec<Task<'a, E>> {
    let blocks = out.into_blocks(block_q);
    let mut tasks: Vec<_> = match lse {
        // Rows of `lse` are cut exactly like rows of `out`: a head at a time, then a block at a time.
        Some(lse) => {
            let parts = lse.chunks_mut(n_q.max(1)).flat_map(|head| head.chunks_mut(block_q));
            blocks.zip(parts).map(|(block, lse)| Task { block, lse: Some(lse) }).collect()
        }
        None => blocks.map(|block| Task { block, lse: None }).collect(),
    };
    tasks.reverse();
    tasks
}
