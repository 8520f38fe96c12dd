//! H-Transformer-1D: near keys one by one, far keys by means over groups whose size doubles with the distance.
//!
//! Sequences of `n` tokens in blocks of `b`; on level `l` a node stands for `2^l` tokens and a block has `b` nodes. With
//! `c_l[J]` the tokens of node `J` (fewer at the end of a sequence),
//!
//! ```text
//! q_l, k_l, v_l   means over the tokens of a node                    (causal: q_l is the first query of the node)
//! S_l[I, J]       = softmax_scale * q_l[I] . k_l[J] + ln c_l[J]      for the pairs that level l sees (see `blocks`)
//! lse_l[I]        = ln sum_J e^(S_l[I, J])                           out_l[I] = sum_J e^(S_l[I, J] - lse_l[I]) v_l[J]
//! out_i, lse_i    = merge over l of (out_l, lse_l)[i / 2^l]
//! ```
//!
//! Level 0 sees the own and both neighbour blocks, token by token; each coarser level the neighbour blocks, without what
//! is covered already; causal: the own block up to the query, and previous blocks. Each pair of tokens is covered exactly
//! once, so the result is a softmax over all keys whose far scores are those of the group means.
//!
//! Exact for `n <= 2 b`, and whenever queries and keys are constant inside the groups. Sequences that are not `b 2^K` long
//! end in a block that is not full: nothing is padded.
//!
//! Source: Zhu and Soricut 2021 (arXiv:2107.11906). We merge levels through their log-sum-exps where the authors' code
//! subtracts one maximum a head, which underflows when scores are spread.

mod blocks;
mod naive;
#[cfg(test)]
mod tests;

use crate::coarsen::{Kind, LevelRows, Nodes, coarsen};
use crate::upsample::{LevelResult, merge_parents};
use attn_core::exact::Reference;
use attn_core::mask::{And, Band, Mask};
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Family, Growth, OutMut, Profile, Qkv, Result,
    SoftmaxAttention, Target, check_lse, softmax_flops, softmax_scale_or_default,
};
use attn_flash::engine::{AnySpec, Problem, attend_any};
use attn_flash::{HalfProducts, TileSizes};
use blocks::{FarBlocks, NearBlocks, coarse_levels};

/// Children of a coarse node.
const RATIO: usize = 2;

/// H-Transformer-1D self-attention (`n_q = n_kv = n`), in time `O(n b (head_dim + head_dim_v))` and memory
/// `O(n (head_dim + head_dim_v))`.
///
/// Shapes: `q [batch, n_heads_q, n, head_dim]`, `k [batch, n_heads_kv, n, head_dim]`,
/// `v [batch, n_heads_kv, n, head_dim_v]`, out `[batch, n_heads_q, n, head_dim_v]`. Coarse levels are kept in f32; tokens
/// are read in place. With bf16 or f16 the output is rounded twice: after level 0 and after the merge.
///
/// Source: Zhu and Soricut 2021.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_hier::HTransformer;
///
/// let (n, d) = (100, 8);
/// let x: Vec<f32> = (0..n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, 1, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = HTransformer::new(16)?.with_causal(true);
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, 1, n, d])?.into())?;
/// assert!((out[0] - x[0]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HTransformer {
    block_size: usize,
    causal: bool,
    softmax_scale: Option<f32>,
}

impl Default for HTransformer {
    fn default() -> Self {
        Self { block_size: Self::DEFAULT_BLOCK, causal: false, softmax_scale: None }
    }
}

impl HTransformer {
    /// Half a block is one panel of the engine: every coarse tile is full.
    pub const DEFAULT_BLOCK: usize = 64;

    /// Blocks of `block_size` nodes, bidirectional, default scale. Larger blocks are slower and nearer to full attention.
    ///
    /// # Errors
    /// [`AttnError::Value`] unless `block_size` is even and at least 2.
    pub fn new(block_size: usize) -> Result<Self> {
        if block_size < 2 || !block_size.is_multiple_of(2) {
            return Err(AttnError::value("block_size", block_size, "an even number, at least 2"));
        }
        Ok(Self { block_size, ..Self::default() })
    }

    /// With or without the causal mask: a query sees no key after its own position.
    #[must_use]
    pub fn with_causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// With a factor for raw dot products instead of `1/sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a NaN or infinite scale.
    pub fn with_softmax_scale(self, softmax_scale: f32) -> Result<Self> {
        let softmax_scale = softmax_scale_or_default(Some(softmax_scale), 1)?;
        Ok(Self { softmax_scale: Some(softmax_scale), ..self })
    }

    /// Nodes of a block; beyond the whole sequence its size means nothing.
    fn block(&self, n: usize) -> usize {
        self.block_size.min(n.next_multiple_of(2).max(2))
    }

    fn band(&self) -> Option<Band> {
        self.causal.then_some(Band { offset: 0, left: None, right: Some(0) })
    }

    fn check(&self, shape: &AttnShape) -> Result<f32> {
        if shape.n_q != shape.n_kv {
            let expected = format!("{} (n_q): {} is self-attention", shape.n_q, self.name());
            return Err(AttnError::shape("k", "n_kv", shape.n_kv, expected));
        }
        softmax_scale_or_default(self.softmax_scale, shape.head_dim)
    }

    fn attend(&self, x: Qkv<'_>, mut out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<()> {
        let shape = x.shape();
        let softmax_scale = self.check(&shape)?;
        x.check_out(&out)?;
        let mut own_lse = Vec::new();
        let lse = match lse {
            Some(lse) => {
                check_lse(lse, &shape)?;
                lse
            }
            None => {
                own_lse.resize(shape.rows(), 0.0);
                &mut own_lse
            }
        };
        let near = And(self.band(), NearBlocks { block: self.block(shape.n_q) });
        attend_any(Problem::batch(x), out.reborrow(), Some(lse), &spec(softmax_scale, &near, None))?;

        let mut levels = self.attend_coarse(&x, softmax_scale)?;
        while let Some(coarse) = levels.pop() {
            match levels.last_mut() {
                Some(finer) => merge_parents(finer.out.as_out()?, &mut finer.lse, &coarse, RATIO)?,
                None => merge_parents(out.reborrow(), lse, &coarse, RATIO)?,
            }
        }
        Ok(())
    }

    /// Levels 1 and up, each by itself.
    fn attend_coarse(&self, x: &Qkv<'_>, softmax_scale: f32) -> Result<Vec<LevelResult>> {
        let shape = x.shape();
        let block = self.block(shape.n_q);
        let far = And(self.band(), FarBlocks { half: block / 2 });
        let query_kind = if self.causal { Kind::First } else { Kind::Mean };
        let mut nodes = Nodes::tokens(shape.n_q);
        let mut results = Vec::new();
        let mut finer: Option<[LevelRows; 3]> = None;
        for _ in 0..coarse_levels(shape.n_q, block) {
            let [q, k, v] = match &finer {
                None => [*x.q(), *x.k(), *x.v()],
                Some([q, k, v]) => [q.view()?.into(), k.view()?.into(), v.view()?.into()],
            };
            let q = coarsen(&q, nodes, RATIO, query_kind)?;
            let k = coarsen(&k, nodes, RATIO, Kind::Mean)?;
            let v = coarsen(&v, nodes, RATIO, Kind::Mean)?;
            nodes = nodes.coarser(RATIO);
            drop(finer.take()); // before the level's result is allocated

            let rows = shape.batch * shape.n_heads_q * nodes.len();
            let out = LevelRows::zeros([shape.batch, shape.n_heads_q, nodes.len(), shape.head_dim_v]);
            let mut result = LevelResult { out, lse: vec![0.0; rows] };
            let level = Qkv::new(q.view()?, k.view()?, v.view()?)?;
            let mass = nodes.log_mass();
            let spec = spec(softmax_scale, &far, Some(&mass));
            attend_any(Problem::batch(level), result.out.as_out()?, Some(&mut result.lse), &spec)?;
            results.push(result);
            finer = Some([q, k, v]);
        }
        Ok(results)
    }
}

fn spec<'a>(softmax_scale: f32, mask: &'a dyn Mask, key_bias: Option<&'a [f32]>) -> AnySpec<'a> {
    // Levels are merged by their log-sum-exps, which products of bf16 pairs would blur.
    let half_products = HalfProducts::Widen;
    AnySpec { key_bias, half_products, ..AnySpec::new(softmax_scale, mask, &Unchanged) }
}

impl Attention for HTransformer {
    fn name(&self) -> &'static str {
        "h-transformer-1d"
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Hier,
            target: Target::SoftmaxApproximately,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: false,
            cross_lengths: false,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 4e-6,
            time: Growth::Linear,
            memory: Growth::Linear,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let n = shape.n_q;
        let block = self.block(n);
        let far = FarBlocks { half: block / 2 };
        let (heads_q, heads_kv) = (shape.batch * shape.n_heads_q, shape.batch * shape.n_heads_kv);
        let input_floats = heads_q * shape.head_dim + heads_kv * (shape.head_dim + shape.head_dim_v);

        let mut pairs = NearBlocks { block }.pairs(n, self.causal);
        // Results stay until the merge; inputs of a level until those of the next are made.
        let (mut results, mut finer, mut peak) = (heads_q * n, 0, heads_q * n);
        let mut nodes = Nodes::tokens(n);
        for _ in 0..coarse_levels(n, block) {
            nodes = nodes.coarser(RATIO);
            pairs += far.pairs(nodes.len(), self.causal);
            let inputs = nodes.len() * input_floats;
            peak = peak.max(results + finer + inputs);
            results += nodes.len() * heads_q * (shape.head_dim_v + 1);
            peak = peak.max(results + inputs + nodes.len());
            finer = inputs;
        }
        let scratch = TileSizes::auto(shape).workspace_bytes(shape) * rayon::current_num_threads() as u64;
        let flops = heads_q as u64 * softmax_flops(pairs, shape);
        Cost::of(shape, dtype, flops, 4 * peak as u64 + scratch)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.attend(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let scale = match self.softmax_scale {
            Some(scale) => f64::from(scale),
            None => 1.0 / (x.shape().head_dim as f64).sqrt(),
        };
        self.check(&x.shape())?;
        Ok(naive::Definition { block: self.block_size, causal: self.causal, scale }.all(x))
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }
}

impl SoftmaxAttention for HTransformer {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.attend(x, out, Some(lse))
    }
}
