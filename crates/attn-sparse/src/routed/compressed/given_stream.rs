//! Streams with learned entries: raw rows of the window, entries of all tokens, and the slots of the entry that has begun.

use super::attend::Call;
use super::inputs::{CompressedInputs, EntryIndexer};
use super::pooling::{EntryPooling, Slots};
use super::{CompressedAttention, Entries};
use crate::routed::index_inputs::index_queries;
use crate::routed::key_panels::KeyPanels;
use crate::routed::rows::heads_f32;
use attn_core::{AttnError, AttnShape, Result, View, softmax_scale_or_default};
use attn_flash::cache::{CacheKind, CacheShape, Kept, KvCache};

/// Slots of entries that are not complete, and of the window before them.
#[derive(Debug)]
struct Tail {
    name: &'static str,
    /// `[batch][tokens, width]`.
    kv: Vec<Vec<f32>>,
    gate: Vec<Vec<f32>>,
    /// Entries before the first token held.
    skipped: usize,
}

impl Tail {
    fn new(name: &'static str, batch: usize) -> Self {
        let empty = || vec![Vec::new(); batch];
        Self { name, kv: empty(), gate: empty(), skipped: 0 }
    }

    /// Appends tokens; gives the entries that they complete, `[batch][entries, width]`.
    fn append(
        &mut self,
        x: &EntryPooling<'_>,
        rate: usize,
        twice: bool,
        entry: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let (batch, n) = (self.kv.len(), x.kv.shape()[2]);
        let width = if twice { 2 * entry } else { entry };
        // Checks the axes.
        Slots::new(self.name, x, rate, twice, [batch, n, entry])?;
        let (kv, gate) = (heads_f32(&x.kv, 0..n), heads_f32(&x.gate, 0..n));
        for at in 0..batch {
            self.kv[at].extend_from_slice(&kv[at * n * width..][..n * width]);
            self.gate[at].extend_from_slice(&gate[at * n * width..][..n * width]);
        }
        let held = self.kv.first().map_or(0, |rows| rows.len() / width.max(1));
        let (kv, gate) = (self.kv.concat(), self.gate.concat());
        let axes = [batch, 1, held, width];
        let (kv, gate) = (View::contiguous("kv", &kv, axes)?, View::contiguous("gate", &gate, axes)?);
        let held_slots = EntryPooling { kv: kv.into(), gate: gate.into(), position_bias: x.position_bias };
        let slots = Slots::new(self.name, &held_slots, rate, twice, [batch, held, entry])?;
        let (pooled, complete) = (slots.pool(), slots.n_entries());
        // The first entry held is there for the one after it only, unless it is the first of all.
        let old = usize::from(twice && self.skipped > 0).min(complete);
        let rows = |at: usize| pooled[(at * complete + old) * entry..(at + 1) * complete * entry].to_vec();
        let entries = (0..batch).map(rows).collect();
        let keep_from = if twice { complete.saturating_sub(1) } else { complete };
        for rows in self.kv.iter_mut().chain(&mut self.gate) {
            rows.drain(..keep_from * rate * width);
        }
        self.skipped += keep_from;
        Ok(entries)
    }

    fn bytes(&self) -> usize {
        self.kv.iter().chain(&self.gate).map(|rows| 4 * rows.capacity()).sum()
    }
}

/// A stream of [`CompressedAttention`] with learned entries, sinks and indexers.
#[derive(Debug)]
pub struct CompressedGivenStream {
    attention: CompressedAttention,
    batch: usize,
    n_heads_q: usize,
    head_dim: usize,
    softmax_scale: f32,
    raw: KvCache,
    entries: KvCache,
    slots: Tail,
    index_slots: Tail,
    /// One series a batch entry, once their width is known.
    index_keys: Vec<KeyPanels<f32>>,
    len: usize,
}

impl CompressedAttention {
    /// An empty stream of `batch` sequences with `n_heads_q` query heads of width `head_dim`, in f32.
    ///
    /// # Errors
    /// [`AttnError`] for settings that do not fit.
    pub fn stream_given(
        &self,
        batch: usize,
        n_heads_q: usize,
        head_dim: usize,
    ) -> Result<CompressedGivenStream> {
        self.check()?;
        let shape = CacheShape { batch, n_heads_kv: 1, head_dim, head_dim_v: head_dim };
        Ok(CompressedGivenStream {
            attention: *self,
            batch,
            n_heads_q,
            head_dim,
            softmax_scale: softmax_scale_or_default(self.softmax_scale, head_dim)?,
            raw: KvCache::new(shape, CacheKind::F32)?,
            entries: KvCache::new(shape, CacheKind::F32)?,
            slots: Tail::new("compress", batch),
            index_slots: Tail::new("index", batch),
            index_keys: Vec::new(),
            len: 0,
        })
    }
}

impl CompressedGivenStream {
    /// Appends tokens, each with all its inputs; gives what they attend, `[batch, n_heads_q, n, head_dim]`.
    ///
    /// # Errors
    /// [`AttnError`] for inputs that do not fit the stream, and for a choice that is given.
    pub fn append(&mut self, x: &CompressedInputs<'_>) -> Result<Vec<f32>> {
        x.check(&self.attention)?;
        let [batch, heads, n, width] = x.q.shape();
        let axes =
            [("batch", batch, self.batch), ("heads", heads, self.n_heads_q), ("width", width, self.head_dim)];
        for (axis, found, expected) in axes {
            if found != expected {
                return Err(AttnError::shape("q", axis, found, expected));
            }
        }
        if x.chosen.is_some() {
            return Err(AttnError::value("chosen", "given", "an indexer: streams choose as tokens come"));
        }
        let (rate, twice) = (self.attention.rate, self.attention.is_sparse());
        let new = self.slots.append(&x.compress, rate, twice, width)?;
        let n_new = new.first().map_or(0, |rows| rows.len() / width.max(1));
        let new = new.concat();
        let new = View::contiguous("compressed", &new, [batch, 1, n_new, width])?;
        self.entries.append(new, new)?;
        let kv = heads_f32(&x.kv_raw, 0..n);
        let kv = View::contiguous("kv_raw", &kv, [batch, 1, n, width])?;
        self.raw.append(kv, kv)?;
        self.len += n;

        let shape = AttnShape {
            batch,
            n_heads_q: heads,
            n_heads_kv: 1,
            n_q: n,
            n_kv: self.len,
            head_dim: width,
            head_dim_v: width,
        };
        let chosen = match &x.indexer {
            Some(index) => self.choose(index, &shape)?,
            None => Vec::new(),
        };
        let q = heads_f32(&x.q, 0..n);
        let sparse = matches!(self.attention.entries, Entries::Sparse { .. });
        let call = Call {
            attention: self.attention,
            shape,
            softmax_scale: self.softmax_scale,
            q: View::contiguous("q", &q, shape.q())?,
            raw: self.raw.views()?,
            entries: self.entries.views()?,
            seen: self.attention.seen(
                &shape,
                self.entries.len(),
                sparse.then_some((1, chosen.as_slice())),
            )?,
        };
        let out = call.attend(x.sinks)?.0;
        self.raw.keep(Kept { sinks: 0, last: Some(self.attention.window - 1) });
        Ok(out)
    }

    /// Appends what the indexer reads; gives the entries that the new tokens choose.
    fn choose(&mut self, index: &EntryIndexer<'_>, shape: &AttnShape) -> Result<Vec<Vec<usize>>> {
        let width = index.q.shape()[3];
        if self.index_keys.is_empty() {
            self.index_keys = (0..self.batch).map(|_| KeyPanels::new(width)).collect();
        }
        if let Some(keys) = self.index_keys.first()
            && keys.width() != width
        {
            return Err(AttnError::shape("index_q", "width", width, keys.width()));
        }
        let new = self.index_slots.append(&index.compress, self.attention.rate, true, width)?;
        for (keys, rows) in self.index_keys.iter_mut().zip(&new) {
            rows.chunks_exact(width.max(1)).for_each(|row| keys.push(row.iter().copied()));
        }
        let queries = index_queries(&index.q, 1, Some(index.w), true);
        Ok(self.attention.choose(shape, &queries, |list| &self.index_keys[list]))
    }

    /// Tokens appended.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let index: usize = self.index_keys.iter().map(KeyPanels::bytes).sum();
        self.raw.bytes() + self.entries.bytes() + self.slots.bytes() + self.index_slots.bytes() + index
    }
}
