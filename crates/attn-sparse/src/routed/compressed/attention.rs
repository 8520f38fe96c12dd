//! Compressed attention as an [`Attention`], and with given tensors.

use super::attend::Call;
use super::entries::EntryMeans;
use super::inputs::{CompressedInputs, CompressedOutputs};
use super::pooling::Slots;
use super::stream::CompressedStream;
use super::{CompressedAttention, Entries};
use crate::SharedMask;
use crate::profile::USUAL;
use crate::routed::index_inputs::{index_queries, series};
use crate::routed::router::{causal_pairs, list_bytes, pairs_up_to};
use crate::routed::rows::heads_f32;
use crate::store::store;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Head, Predicate};
use attn_core::{
    Attention, AttnShape, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv, QkvGrads, Result, Saved,
    SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, View, check_lse,
    softmax_flops, softmax_scale_or_default,
};

/// Queries whose choices exist at a time.
const BLOCK: usize = 2048;

/// Given tensors as the kernel reads them.
pub(super) mod given {
    use super::{AttnShape, CompressedInputs, heads_f32};

    pub(in super::super) fn shape(x: &CompressedInputs<'_>) -> AttnShape {
        let [batch, n_heads_q, n, width] = x.q.shape();
        AttnShape { batch, n_heads_q, n_heads_kv: 1, n_q: n, n_kv: n, head_dim: width, head_dim_v: width }
    }

    /// Queries and raw rows in f32.
    pub(in super::super) struct Rows {
        pub(in super::super) q: Vec<f32>,
        pub(in super::super) kv: Vec<f32>,
    }

    impl Rows {
        pub(in super::super) fn new(x: &CompressedInputs<'_>) -> Self {
            let n = x.q.shape()[2];
            Self { q: heads_f32(&x.q, 0..n), kv: heads_f32(&x.kv_raw, 0..n) }
        }
    }
}

impl CompressedAttention {
    pub(super) fn slots(&self, x: &CompressedInputs<'_>) -> Result<Slots> {
        let s = given::shape(x);
        let axes = [s.batch, s.n_kv, s.head_dim];
        Slots::new("compress", &x.compress, self.rate, self.is_sparse(), axes)
    }

    /// The call over given rows and entries.
    pub(super) fn given_call<'a>(
        &self,
        s: &AttnShape,
        rows: &'a given::Rows,
        entries: &'a [f32],
        chosen: &[Vec<usize>],
    ) -> Result<Call<'a>> {
        let n_entries = self.n_entries(s.n_kv);
        let raw = View::contiguous("kv_raw", &rows.kv, s.k())?;
        let entries = View::contiguous("compressed", entries, [s.batch, 1, n_entries, s.head_dim])?;
        Ok(Call {
            attention: *self,
            shape: *s,
            softmax_scale: softmax_scale_or_default(self.softmax_scale, s.head_dim)?,
            q: View::contiguous("q", &rows.q, s.q())?,
            raw: (raw.into(), raw.into()),
            entries: (entries.into(), entries.into()),
            seen: self.seen(s, n_entries, self.is_sparse().then_some((1, chosen)))?,
        })
    }

    /// Attention with given tensors: one vector a token is key and value of all heads.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the input that does not fit.
    pub fn forward_with(&self, x: &CompressedInputs<'_>) -> Result<CompressedOutputs> {
        x.check(self)?;
        let s = given::shape(x);
        let compressed = self.slots(x)?.pool();
        let chosen = match (&x.chosen, &x.indexer) {
            (Some(chosen), _) => chosen.to_vec(),
            (None, None) => Vec::new(),
            (None, Some(index)) => {
                let width = index.q.shape()[3];
                let axes = [s.batch, s.n_kv, width];
                let slots = Slots::new("index", &index.compress, self.rate, true, axes)?;
                let keys = slots.pool();
                let keys = View::contiguous("index_k", &keys, [s.batch, 1, slots.n_entries(), width])?;
                let keys = series(&keys.into());
                let queries = index_queries(&index.q, 1, Some(index.w), true);
                self.choose(&s, &queries, |list| &keys[list])
            }
        };
        let rows = given::Rows::new(x);
        let (out, lse) = self.given_call(&s, &rows, &compressed, &chosen)?.attend(x.sinks)?;
        Ok(CompressedOutputs { out, lse, compressed, chosen })
    }

    /// Who sees which mean; `q` are the last rows of queries.
    pub(super) fn seen_by_means(
        &self,
        means: &EntryMeans,
        q: &View<'_, f32>,
        s: &AttnShape,
    ) -> Result<SharedMask> {
        let chosen = match &means.index {
            Some(index) if s.rows() > 0 => {
                let queries = index.queries_of_groups(&(*q).into(), s, true).rounded();
                Some(self.choose(s, &queries, |list| &index.heads[list]))
            }
            _ => None,
        };
        let chosen = chosen.as_ref().map(|chosen| (s.n_heads_kv, chosen.as_slice()));
        self.seen(s, means.cache.len(), chosen)
    }

    /// Runs `each` with the calls of all blocks of `block` query rows, in order.
    fn for_each_block(
        &self,
        x: &Qkv<'_>,
        block: usize,
        mut each: impl FnMut(std::ops::Range<usize>, &Call<'_>) -> Result<()>,
    ) -> Result<()> {
        let s = x.shape();
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, s.head_dim)?;
        let (mut means, mut appended) = (EntryMeans::new(self, &StreamShape::of(x))?, 0);
        if s.rows() == 0 {
            return Ok(());
        }
        for first in (0..s.n_q).step_by(block) {
            let rows = first..first.saturating_add(block).min(s.n_q);
            let end = (rows.end + s.n_kv).saturating_sub(s.n_q).min(s.n_kv);
            means.append(self, &x.k().narrow(appended..end), &x.v().narrow(appended..end))?;
            appended = end;
            let shape = AttnShape { n_q: rows.len(), n_kv: end, ..s };
            let q = heads_f32(x.q(), rows.clone());
            let q = View::contiguous("q", &q, shape.q())?;
            let call = Call {
                attention: *self,
                shape,
                softmax_scale,
                q,
                raw: (x.k().narrow(0..end).into(), x.v().narrow(0..end).into()),
                entries: means.cache.views()?,
                seen: self.seen_by_means(&means, &q, &shape)?,
            };
            each(rows, &call)?;
        }
        Ok(())
    }

    fn forward_in_blocks(&self, x: Qkv<'_>, out: OutMut<'_>, mut lse: Option<&mut [f32]>) -> Result<()> {
        let s = x.shape();
        self.check()?;
        let cuts = (0..s.n_q).step_by(BLOCK).map(|at| at..(at + BLOCK).min(s.n_q)).collect::<Vec<_>>();
        let (n_blocks, mut pieces) = (cuts.len(), out.into_cuts(cuts));
        self.for_each_block(&x, BLOCK, |rows, call| {
            let (part, part_lse) = call.attend(None)?;
            for (head, of_head) in part.chunks_exact(rows.len() * s.head_dim_v).enumerate() {
                let piece = &mut pieces[head * n_blocks + rows.start / BLOCK];
                for (i, row) in of_head.chunks_exact(s.head_dim_v).enumerate() {
                    piece.store(i, row.iter().copied());
                }
                if let Some(lse) = lse.as_deref_mut() {
                    let to = &mut lse[head * s.n_q + rows.start..][..rows.len()];
                    to.copy_from_slice(&part_lse[head * rows.len()..][..rows.len()]);
                }
            }
            Ok(())
        })
    }
}

impl Attention for CompressedAttention {
    fn name(&self) -> &'static str {
        match self.entries {
            Entries::Heavy => "compressed-heavy",
            Entries::Sparse { .. } => "compressed-sparse",
        }
    }

    fn profile(&self) -> Profile {
        Profile { target: Target::Own, time: Growth::Quadratic, ..USUAL }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let entries = crate::heads(s) * causal_pairs(s) / self.rate as u64;
        let (seen, scores, lists) = match self.entries {
            Entries::Heavy => (entries, 0, 0),
            Entries::Sparse { top_k, index_dim } => {
                let width = index_dim.unwrap_or(s.head_dim.div_ceil(4)).min(s.head_dim);
                let seen = entries.min(pairs_up_to(s, top_k));
                (seen, 2 * entries * width as u64, list_bytes(s, s.n_heads_kv, top_k))
            }
        };
        let flops = softmax_flops(seen + pairs_up_to(s, self.window), s) + scores;
        let widths = s.head_dim + s.head_dim_v;
        let means = s.batch * s.n_heads_kv * s.n_kv.div_ceil(self.rate) * widths * 8;
        let rows = s.batch * s.n_heads_q * s.n_q.min(BLOCK) * (s.head_dim + 2 * s.head_dim_v) * 4;
        Cost::of(s, dtype, flops, (means + rows) as u64 + lists)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        x.check_out(&out)?;
        self.forward_in_blocks(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        let mut reference = Reference { out: Vec::new(), lse: Some(Vec::new()) };
        self.for_each_block(x, usize::MAX, |_, call| {
            let n_entries = call.entries.0.shape()[2];
            let axes = |width| [s.batch, s.n_heads_kv, s.n_kv + n_entries, width];
            // Tokens first, then entries.
            let both = |raw: &TensorView<'_>, entries: &TensorView<'_>| -> Vec<f32> {
                let (raw, entries) = (heads_f32(raw, 0..s.n_kv), heads_f32(entries, 0..n_entries));
                let heads = s.batch * s.n_heads_kv;
                let of =
                    |all: &[f32], head: usize| all[head * all.len() / heads..][..all.len() / heads].to_vec();
                (0..heads).flat_map(|head| [of(&raw, head), of(&entries, head)].concat()).collect()
            };
            let tensor = |view: &attn_flash::engine::KvView<'_>| match view {
                attn_flash::engine::KvView::F32(view) => heads_f32(&TensorView::F32(*view), 0..n_entries),
                _ => Vec::new(),
            };
            let (entry_k, entry_v) = (tensor(&call.entries.0), tensor(&call.entries.1));
            let entry_axes = |width| [s.batch, s.n_heads_kv, n_entries, width];
            let k = both(x.k(), &View::contiguous("k", &entry_k, entry_axes(s.head_dim))?.into());
            let v = both(x.v(), &View::contiguous("v", &entry_v, entry_axes(s.head_dim_v))?.into());
            let all = Qkv::new(
                call.q,
                View::contiguous("k", &k, axes(s.head_dim))?,
                View::contiguous("v", &v, axes(s.head_dim_v))?,
            )?;
            let (window, offset) = (self.window as isize, s.n_kv as isize - s.n_q as isize);
            let mask = Predicate(|p: attn_core::mask::Pair| match p.j.checked_sub(s.n_kv) {
                Some(entry) => call.seen.sees(Head { batch: p.batch, head: p.head }.pair(p.i, entry)),
                None => {
                    let distance = p.i as isize + offset - p.j as isize;
                    0 <= distance && distance < window
                }
            });
            let softmax_scale = self.softmax_scale.map(f64::from);
            reference = Exact { softmax_scale, mask: &mask, ..Exact::default() }.all(&all)?;
            Ok(())
        })?;
        Ok(reference)
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

impl SoftmaxAttention for CompressedAttention {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        x.check_out(&out)?;
        check_lse(lse, &x.shape())?;
        self.forward_in_blocks(x, out, Some(lse))
    }
}

impl Streaming for CompressedAttention {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        CompressedStream::start(*self, shape)
    }
}

/// What the backward pass needs.
struct Kept {
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Differentiable for CompressedAttention {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        x.check_out(&out)?;
        let mut kept = Kept { out: Vec::new(), lse: Vec::new() };
        self.for_each_block(&x, usize::MAX, |_, call| {
            (kept.out, kept.lse) = call.attend(None)?;
            Ok(())
        })?;
        store(out, &kept.out)?;
        Ok(Saved::new(kept))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        _: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let s = x.shape();
        crate::routed::index_inputs::check_axes("grad_out", grad_out.shape(), s.out())?;
        let Kept { out, lse } = saved.get()?;
        let QkvGrads { mut q, mut k, mut v } = grads;
        if s.rows() == 0 {
            [&mut q, &mut k, &mut v].into_iter().for_each(OutMut::fill_zero);
            return Ok(());
        }
        let grad_out = heads_f32(&grad_out, 0..s.n_q);
        let mut all = None;
        self.for_each_block(&x, usize::MAX, |_, call| {
            all = Some(call.backward(out, lse, &grad_out)?);
            Ok(())
        })?;
        if let Some(mut all) = all {
            let heads = s.batch * s.n_heads_kv;
            self.means_backward(heads, &all.entry_k, &mut all.k, s.head_dim);
            self.means_backward(heads, &all.entry_v, &mut all.v, s.head_dim_v);
            store(q, &all.q)?;
            store(k, &all.k)?;
            store(v, &all.v)?;
        }
        Ok(())
    }
}
