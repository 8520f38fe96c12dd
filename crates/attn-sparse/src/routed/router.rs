//! Routers: causal deciders that choose, row by row, from a summary of the keys.
//!
//! A summary (means of chunks, narrow index keys) grows at its end as keys come and is never rebuilt. One code serves
//! prefill, training and decoding:
//!
//! ```text
//! for blocks of queries:   append their keys to the summary;   choose;   attend the chosen keys
//! ```
//!
//! Rows that list the same keys meet them side by side (`attn_flash`'s engine, cell of keys by cell of keys). Long sequences come
//! in larger blocks of queries, so that keys far back still meet many rows at a time.
//!
//! What a row sees depends on nothing behind it, and its arithmetic on nothing but what it sees, so causality is strict to
//! the last bit. Query `i` stands at position `p = i + n_kv - n_q`.

use super::decided::Decided;
use super::stream::RoutedStream;
use crate::decider::{Decision, Work};
use crate::profile::USUAL;
use crate::score_rule::{ScoreRule, SharedScoreMod};
use crate::{BlockMask, SparseAttention, heads};
use attn_core::exact::Reference;
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::registry::NamedTensor;
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnShape, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv, QkvGrads, Result, Saved,
    SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, check_lse, softmax_flops,
    softmax_scale_or_default,
};
use attn_flash::TileSizes;
use attn_flash::engine::{AnySpec, KvView, Problem, attend_any};
use std::fmt;

/// Queries that choose and attend together, at least; ...
const BLOCK: usize = 2048;
/// ... more of long sequences, where few of them choose the same keys, ...
const BLOCKS: usize = 16;
/// ... as long as their lists have no more entries than this, ...
const ENTRIES: usize = 1 << 21;
/// ... and fewer where they would have more than this.
const MOST_ENTRIES: usize = 1 << 25;

/// Chooses keys for queries from a summary of the keys; see the module.
pub trait Router: Clone + fmt::Debug + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// What it keeps of the keys.
    type Summary: Send + Sync + 'static;

    /// An empty summary.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for settings or sizes that the router does not serve.
    fn summary(&self, shape: &StreamShape) -> Result<Self::Summary>;

    /// Appends keys `(batch, n_heads_kv, n, head_dim)`.
    fn append(&self, summary: &mut Self::Summary, k: &TensorView<'_>);

    /// Learns from the queries `(batch, n_heads_q, n_q, head_dim)` that stand at the last of the keys appended, before they
    /// choose. Most routers do not.
    fn observe(&self, summary: &mut Self::Summary, q: &TensorView<'_>) {
        let _ = (summary, q);
    }

    /// Bytes of memory that a summary holds.
    fn bytes(&self, summary: &Self::Summary) -> usize;

    /// What the queries `(batch, n_heads_q, n_q, head_dim)` see, the last of which stands at the last of the `n_kv` keys in
    /// the summary. No row may see a later key.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] if the lists do not fit.
    fn choose(&self, summary: &Self::Summary, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask>;

    /// What happens to the scores of the pairs that [`Router::choose`] chose for these queries, if anything does: a sample weighs
    /// more than it holds.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for a scale that it does not serve.
    fn score_mod(
        &self,
        summary: &Self::Summary,
        q: &TensorView<'_>,
        shape: &AttnShape,
        softmax_scale: f32,
    ) -> Result<Option<SharedScoreMod>> {
        let _ = (summary, q, shape, softmax_scale);
        Ok(None)
    }

    /// Entries of a query's list, at most.
    fn entries(&self) -> usize;

    /// What it will take, known before it runs.
    fn work(&self, shape: &AttnShape) -> Work;

    /// Growth of time.
    fn growth(&self) -> Growth;

    /// What its attention aims at: softmax over chosen pairs, unless queries choose for each other.
    fn target(&self) -> Target {
        Target::SoftmaxOverChosen
    }
}

/// Queries that choose together, whose lists have so many entries.
pub(super) fn rows_together(n_q: usize, entries: usize) -> usize {
    let most = (MOST_ENTRIES / entries.max(1)).clamp(1, BLOCK);
    (n_q / BLOCKS).min(ENTRIES / entries.max(1)).max(most)
}

/// Softmax attention over what a [`Router`] chooses. Causal; streams with its summary beside the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routed<R> {
    /// Who sees whom.
    pub router: R,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl<R: Router> Routed<R> {
    /// The router with the default scale.
    pub fn new(router: R) -> Self {
        Self { router, softmax_scale: None }
    }

    /// Which pairs a call on `x` attends.
    ///
    /// # Errors
    /// Those of the [`Router`].
    pub fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        Ok(self.decide_and_weigh(x)?.0)
    }

    /// Which pairs a call on `x` attends, and what happens to their scores.
    fn decide_and_weigh(&self, x: &Qkv<'_>) -> Result<(Decision, Option<SharedScoreMod>)> {
        let s = x.shape();
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, s.head_dim)?;
        let mut summary = self.router.summary(&StreamShape::of(x))?;
        self.router.append(&mut summary, x.k());
        self.router.observe(&mut summary, x.q());
        if s.rows() == 0 {
            return Ok((Decision::new(SeeAll), None));
        }
        let score_mod = self.router.score_mod(&summary, x.q(), &s, softmax_scale)?;
        Ok((Decision::by_lists(self.router.choose(&summary, x.q(), &s)?), score_mod))
    }

    /// Attention over what was decided.
    fn decided(&self, decision: Decision, score_mod: Option<SharedScoreMod>) -> SparseAttention<Decided> {
        let (softmax_scale, score_rule) = (self.softmax_scale, score_mod.map(ScoreRule::from));
        SparseAttention { softmax_scale, score_rule, ..SparseAttention::new(Decided(decision)) }
    }

    /// Chooses and attends for some queries; the summary holds all of `k`.
    pub(super) fn attend(
        &self,
        summary: &R::Summary,
        q: TensorView<'_>,
        kv: (KvView<'_>, KvView<'_>),
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let problem = Problem::cached(q, kv.0, kv.1, None)?;
        let shape = problem.shape();
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        if shape.rows() == 0 {
            return Ok(());
        }
        let mask = self.router.choose(summary, &q, &shape)?;
        let spec = rows_apart(&mask, mask.sizes().kv, softmax_scale, &shape);
        match self.router.score_mod(summary, &q, &shape, softmax_scale)? {
            None => attend_any(problem, out, lse, &spec),
            Some(score_mod) => attend_any(problem, out, lse, &AnySpec { score_mod: &*score_mod, ..spec }),
        }
    }

    /// Block by block, so that no more than a block's lists exist at a time.
    fn forward_in_blocks(&self, x: Qkv<'_>, out: OutMut<'_>, mut lse: Option<&mut [f32]>) -> Result<()> {
        let s = x.shape();
        softmax_scale_or_default(self.softmax_scale, s.head_dim)?;
        let mut summary = self.router.summary(&StreamShape::of(&x))?;
        let keys_up_to = |row: usize| (row + s.n_kv).saturating_sub(s.n_q).min(s.n_kv);
        let mut appended = 0;
        let mut extend = |summary: &mut R::Summary, end: usize| {
            self.router.append(summary, &x.k().narrow(appended..end));
            appended = end;
        };
        let together = rows_together(s.n_q, self.router.entries());
        if s.n_q <= together {
            extend(&mut summary, s.n_kv);
            self.router.observe(&mut summary, x.q());
            return self.attend(&summary, *x.q(), ((*x.k()).into(), (*x.v()).into()), out, lse);
        }
        let blocks: Vec<_> = (0..s.n_q).step_by(together).map(|at| at..(at + together).min(s.n_q)).collect();
        let n_blocks = blocks.len();
        let mut pieces: Vec<_> = out.into_cuts(blocks.clone()).into_iter().map(Some).collect();
        for (block, rows) in blocks.into_iter().enumerate() {
            let n_keys = keys_up_to(rows.end);
            extend(&mut summary, n_keys);
            self.router.observe(&mut summary, &x.q().narrow(rows.clone()));
            let mut part =
                NamedTensor::unwritten(&[s.batch, s.n_heads_q, rows.len(), s.head_dim_v], x.dtype());
            let mut part_lse = vec![0.0; if lse.is_some() { s.batch * s.n_heads_q * rows.len() } else { 0 }];
            let kv = (x.k().narrow(0..n_keys).into(), x.v().narrow(0..n_keys).into());
            let given_lse = lse.is_some().then_some(part_lse.as_mut_slice());
            self.attend(&summary, x.q().narrow(rows.clone()), kv, part.as_out()?, given_lse)?;
            let part = part.view("o")?;
            for head in 0..s.batch * s.n_heads_q {
                let wide =
                    super::rows::rows_f32(&part, head / s.n_heads_q, head % s.n_heads_q, 0..rows.len());
                if let Some(piece) = &mut pieces[head * n_blocks + block] {
                    for (i, row) in wide.chunks_exact(s.head_dim_v).enumerate() {
                        piece.store(i, row.iter().copied());
                    }
                }
                if let Some(lse) = lse.as_deref_mut() {
                    let to = &mut lse[head * s.n_q + rows.start..][..rows.len()];
                    to.copy_from_slice(&part_lse[head * rows.len()..][..rows.len()]);
                }
            }
        }
        Ok(())
    }
}

impl<R: Router> Attention for Routed<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn profile(&self) -> Profile {
        Profile { target: self.router.target(), time: self.router.growth(), ..USUAL }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let work = self.router.work(shape);
        let flops = softmax_flops(work.pairs, shape) + work.decision_flops;
        let scratch = TileSizes::auto(shape).workspace_bytes(shape) * rayon::current_num_threads() as u64;
        Cost::of(shape, dtype, flops, scratch + work.decision_bytes)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        x.check_out(&out)?;
        self.forward_in_blocks(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let (decision, score_mod) = self.decide_and_weigh(x)?;
        self.decided(decision, score_mod).definition(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        Some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl<R: Router> SoftmaxAttention for Routed<R> {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        x.check_out(&out)?;
        check_lse(lse, &x.shape())?;
        self.forward_in_blocks(x, out, Some(lse))
    }
}

/// What the backward pass needs.
struct Weighed {
    inner: Saved,
    score_mod: Option<SharedScoreMod>,
}

impl<R: Router> Differentiable for Routed<R> {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        let (decision, score_mod) = self.decide_and_weigh(&x)?;
        let inner = self.decided(decision, score_mod.clone()).forward_saving(x, out)?;
        Ok(Saved::new(Weighed { inner, score_mod }))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let Weighed { inner, score_mod } = saved.get()?;
        // What was decided is among what was saved.
        self.decided(Decision::new(SeeAll), score_mod.clone()).backward(x, out, inner, grad_out, grads)
    }
}

impl<R: Router> Streaming for Routed<R> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        RoutedStream::start(self.clone(), shape)
    }
}

/// What the engine computes for a mask whose rows list blocks of `block` keys each.
pub(super) fn rows_apart<'a>(
    mask: &'a (dyn Mask + 'a),
    block: usize,
    softmax_scale: f32,
    shape: &AttnShape,
) -> AnySpec<'a> {
    let tiles = Some(TileSizes::auto(shape).rows_apart_by(block));
    AnySpec { tiles, ..AnySpec::new(softmax_scale, mask, &Unchanged) }
}

/// Pairs of queries that see at most `most` keys each, causally: over all heads of all batch entries.
pub(super) fn pairs_up_to(shape: &AttnShape, most: usize) -> u64 {
    let band = Band { left: Some(most.saturating_sub(1)), ..Band::causal(shape, Align::BottomRight) };
    heads(shape) * attn_core::band_pairs(shape, &band)
}

/// Causal pairs of queries and keys in one head.
pub(super) fn causal_pairs(shape: &AttnShape) -> u64 {
    attn_core::band_pairs(shape, &Band::causal(shape, Align::BottomRight))
}

/// Keys that a query row sees under causality.
pub(super) fn visible(shape: &AttnShape, row: usize) -> usize {
    (row + 1 + shape.n_kv).saturating_sub(shape.n_q).min(shape.n_kv)
}

/// Bytes of the lists of a block of queries: an index and a flag an entry.
pub(super) fn list_bytes(shape: &AttnShape, lists: usize, entries: usize) -> u64 {
    let rows = shape.n_q.min(rows_together(shape.n_q, entries));
    (shape.batch * lists * rows * entries * 16) as u64
}
