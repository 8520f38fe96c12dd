//! The window and the entries, each a call of the engine, merged through their log-sum-exps.

use super::{CompressedAttention, Entries};
use crate::block_mask::lists::{Lists, wide};
use crate::routed::dsa::{LargestTokens, tokens};
use crate::routed::ended::{Ended, n_ended};
use crate::routed::indexer::{IndexQueries, select};
use crate::routed::key_panels::Panels;
use crate::routed::router::rows_apart;
use crate::{BlockMask, SharedMask};
use attn_core::mask::{Align, Band, Mask};
use attn_core::merge::{apply_sinks, merge_into};
use attn_core::score::Unchanged;
use attn_core::{AttnShape, Result, View, ViewMut};
use attn_flash::engine::{AnySpec, KvView, Problem, attend_any};
use std::sync::Arc;

/// Some rows of queries, the last of which stands at the last token.
#[derive(Clone)]
pub(super) struct Call<'a> {
    pub(super) attention: CompressedAttention,
    /// `n_kv` tokens, of which `raw` holds the last ones.
    pub(super) shape: AttnShape,
    pub(super) softmax_scale: f32,
    pub(super) q: View<'a, f32>,
    /// Keys and values of tokens, at least those that the rows' windows see.
    pub(super) raw: (KvView<'a>, KvView<'a>),
    pub(super) entries: (KvView<'a>, KvView<'a>),
    /// Who sees which entry.
    pub(super) seen: SharedMask,
}

impl CompressedAttention {
    /// Who sees which of `n_entries`, by what an indexer chose (or was given) in the sparse form.
    pub(super) fn seen(
        &self,
        s: &AttnShape,
        n_entries: usize,
        chosen: Option<(usize, &[Vec<usize>])>,
    ) -> Result<SharedMask> {
        let over = AttnShape { n_kv: n_entries, ..*s };
        Ok(match chosen {
            None => Arc::new(Ended::of(self.rate, self.rate, s)),
            Some((lists, chosen)) => {
                let narrow = |list: &Vec<usize>| list.iter().map(|entry| *entry as u32).collect();
                let chosen: Vec<Vec<u32>> = chosen.iter().map(narrow).collect();
                let mask: BlockMask = tokens(&over, lists, Lists::of(&chosen))?;
                Arc::new(mask)
            }
        })
    }

    /// What an indexer over entries chooses; none in the heavy form.
    pub(super) fn choose<'k, K: Panels + 'k>(
        &self,
        s: &AttnShape,
        queries: &IndexQueries<K::Number>,
        keys: impl Fn(usize) -> &'k K + Sync,
    ) -> Vec<Vec<usize>> {
        let Entries::Sparse { top_k, .. } = self.entries else { return Vec::new() };
        let ended = Ended::of(self.rate, self.rate, s);
        let chosen = select(queries, keys, &LargestTokens { top_k, visible: |row| ended.visible(row) });
        chosen.iter().map(wide).collect()
    }

    /// Entries of the first `n` tokens.
    pub(super) fn n_entries(&self, n: usize) -> usize {
        n_ended(n, self.rate, self.rate)
    }
}

impl Call<'_> {
    pub(super) fn raw_problem(&self) -> Result<Problem<'_>> {
        Problem::cached(self.q, self.raw.0, self.raw.1, None)
    }

    pub(super) fn entry_problem(&self) -> Result<Problem<'_>> {
        Problem::cached(self.q, self.entries.0, self.entries.1, None)
    }

    pub(super) fn band(&self) -> Result<Band> {
        let raw = self.raw_problem()?.shape();
        Ok(Band { left: Some(self.attention.window - 1), ..Band::causal(&raw, Align::BottomRight) })
    }

    pub(super) fn raw_spec<'m>(&self, band: &'m Band) -> AnySpec<'m> {
        AnySpec::new(self.softmax_scale, band, &Unchanged)
    }

    pub(super) fn entry_spec<'m>(&self, seen: &'m (dyn Mask + 'm)) -> Result<AnySpec<'m>> {
        let shape = self.entry_problem()?.shape();
        Ok(match self.attention.entries {
            Entries::Heavy => AnySpec::new(self.softmax_scale, seen, &Unchanged),
            Entries::Sparse { .. } => rows_apart(seen, 1, self.softmax_scale, &shape),
        })
    }

    /// Output and log-sum-exps.
    pub(super) fn attend(&self, sinks: Option<&[f32]>) -> Result<(Vec<f32>, Vec<f32>)> {
        let s = self.shape;
        let (mut out, mut lse) = (vec![0.0; s.rows() * s.head_dim_v], vec![f32::NEG_INFINITY; s.rows()]);
        if s.rows() == 0 {
            return Ok((out, lse));
        }
        let band = self.band()?;
        let view = ViewMut::contiguous("out", &mut out, s.out())?;
        attend_any(self.raw_problem()?, view.into(), Some(&mut lse), &self.raw_spec(&band))?;
        if self.entries.0.shape()[2] > 0 {
            let (mut part, mut part_lse) = (vec![0.0; out.len()], vec![0.0; lse.len()]);
            let view = ViewMut::contiguous("out", &mut part, s.out())?;
            let spec = self.entry_spec(&*self.seen)?;
            attend_any(self.entry_problem()?, view.into(), Some(&mut part_lse), &spec)?;
            merge_into(&mut out, &mut lse, &part, &part_lse)?;
        }
        if let Some(sinks) = sinks {
            let rows: Vec<f32> = (0..s.rows()).map(|row| sinks[row / s.n_q % s.n_heads_q]).collect();
            apply_sinks(&mut out, &mut lse, &rows)?;
        }
        Ok((out, lse))
    }
}
