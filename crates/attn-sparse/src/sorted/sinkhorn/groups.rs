//! Buckets of some heads, gathered: what the engine attends.
//!
//! Each head of the problem is a batch entry here, and each bucket a head: `q [entries, groups, size, head_dim]`, and keys
//! `[entries, groups, mixtures size + size, width]`, mixtures in front. For `Causal` one more group holds the tokens before the
//! first bucket.

use super::SinkhornKind;
use super::forward::Forward;
use super::layout::Buckets;
use super::mixture::Weights;
use crate::sorted::rows::gather;
use crate::sorted::slots::{Lane, MEMORY, NOBODY, Slots};
use attn_core::{AttnShape, Qkv, Result, TensorView, View};
use rayon::prelude::*;

/// A query head: its buckets, weights, and the rows that are mixed.
pub(super) struct Unit {
    pub(super) at: [usize; 2],
    pub(super) kv_head: usize,
    pub(super) buckets: Buckets,
    pub(super) weights: Weights,
    /// Keys and values of all sources, `[size, sources, width]`.
    pub(super) sources: [Vec<f32>; 2],
}

impl Unit {
    pub(super) fn new(forward: &Forward<'_>, at: [usize; 2]) -> Self {
        let (shape, inputs) = (forward.x.shape(), forward.inputs);
        let buckets = Buckets::new(forward.config, &shape, at[1]);
        let (weights, kv_head) = (forward.weights(at), shape.kv_head(at[1]));
        let n_null = weights.sources - buckets.count;
        let sources = |from: &TensorView<'_>, null: Option<&[f32]>| {
            let width = from.shape()[3];
            let mut rows = vec![0.0; buckets.size * weights.sources * width];
            gather(from, [at[0], kv_head], &mut rows, |row| {
                let (e, source) = (row / weights.sources, row % weights.sources);
                buckets.token(source.checked_sub(n_null)?, e)
            });
            if let Some(null) = null {
                for slot in rows.chunks_exact_mut(weights.sources * width) {
                    for row in slot[..n_null * width].chunks_exact_mut(width) {
                        row.copy_from_slice(&null[at[1] * width..][..width]);
                    }
                }
            }
            rows
        };
        let sources = [sources(forward.x.k(), inputs.null_key), sources(forward.x.v(), inputs.null_value)];
        Self { at, kv_head, buckets, weights, sources }
    }

    /// Sources in front of the buckets.
    pub(super) fn n_null(&self) -> usize {
        self.weights.sources - self.buckets.count
    }

    /// Whether anything is mixed into slot `e` of a row.
    fn is_filled(&self, row: usize, e: usize) -> bool {
        let present = |source: usize| match source.checked_sub(self.n_null()) {
            Some(bucket) => e < self.buckets.len(bucket),
            None => true,
        };
        self.weights.row(row).any(|(source, _)| present(source))
    }
}

/// Sizes of the groups of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    kind: SinkhornKind,
    pub(super) size: usize,
    pub(super) groups: usize,
    pub(super) mixtures: usize,
    buckets: usize,
}

impl Sizes {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let (shape, kind) = (forward.x.shape(), forward.config.kind);
        let size = forward.config.size(&shape);
        let buckets = shape.n_q.div_ceil(size);
        let groups = buckets + usize::from(kind == SinkhornKind::Causal);
        Self { kind, size, groups, mixtures: forward.config.mixtures(&shape), buckets }
    }

    /// Keys of a group.
    pub(super) fn keys(&self) -> usize {
        (self.mixtures + 1) * self.size
    }

    /// The row of weights of mixture `r` of a group.
    pub(super) fn row(&self, group: usize, r: usize) -> Option<usize> {
        match self.kind {
            _ if group >= self.buckets => None,
            SinkhornKind::SortCut => Some(r),
            _ => Some(group * self.mixtures + r),
        }
    }

    /// Sizes of the gathered problem.
    pub(super) fn shape(&self, units: usize, of: AttnShape) -> AttnShape {
        let (groups, size) = (self.groups, self.size);
        AttnShape { batch: units, n_heads_q: groups, n_heads_kv: groups, n_q: size, n_kv: self.keys(), ..of }
    }
}

/// The gathered rows of some units.
pub(super) struct Groups {
    pub(super) shape: AttnShape,
    causal: bool,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q_positions: Vec<i32>,
    k_positions: Vec<i32>,
}

impl Groups {
    pub(super) fn new(forward: &Forward<'_>, units: &[Unit]) -> Self {
        let (x, sizes) = (&forward.x, Sizes::new(forward));
        let shape = sizes.shape(units.len(), x.shape());
        let [mut q, mut k, mut v] =
            [shape.q(), shape.k(), shape.v()].map(|axes| vec![0.0; axes.iter().product()]);
        let (n_q, n_k) = (sizes.groups * sizes.size, sizes.groups * sizes.keys());
        let (mut q_positions, mut k_positions) =
            (vec![NOBODY; units.len() * n_q], vec![NOBODY; units.len() * n_k]);
        for (u, unit) in units.iter().enumerate() {
            let (size, keys) = (sizes.size, sizes.keys());
            let own = keys - size;
            let query = |slot: usize| unit.buckets.token(slot / size, slot % size);
            let key = |slot: usize| unit.buckets.token(slot / keys, (slot % keys).checked_sub(own)?);
            let d = shape.head_dim;
            gather(x.q(), unit.at, &mut q[u * n_q * d..][..n_q * d], query);
            for (to, from, sources) in [(&mut k, x.k(), &unit.sources[0]), (&mut v, x.v(), &unit.sources[1])]
            {
                let width = from.shape()[3];
                let to = &mut to[u * n_k * width..][..n_k * width];
                gather(from, [unit.at[0], unit.kv_head], to, key);
                let mixed = unit.weights.mix(sources, width);
                to.par_chunks_mut(keys * width).enumerate().for_each(|(group, to)| {
                    for (r, to) in to[..own * width].chunks_exact_mut(size * width).enumerate() {
                        let Some(row) = sizes.row(group, r) else { return };
                        for (e, to) in to.chunks_exact_mut(width).enumerate() {
                            to.copy_from_slice(&mixed[(e * unit.weights.rows + row) * width..][..width]);
                        }
                    }
                });
            }
            let position = |token: Option<usize>| token.map_or(NOBODY, |token| token as i32);
            let to = q_positions[u * n_q..][..n_q].par_iter_mut().enumerate();
            to.for_each(|(slot, to)| *to = position(query(slot)));
            k_positions[u * n_k..][..n_k].par_iter_mut().enumerate().for_each(|(slot, to)| {
                let (group, at) = (slot / keys, slot % keys);
                let row = if at < own { sizes.row(group, at / size) } else { None };
                *to = match row {
                    Some(row) if unit.is_filled(row, at % size) => MEMORY,
                    _ => position(key(slot)),
                };
            });
        }
        let causal = forward.config.kind == SinkhornKind::Causal;
        Self { shape, causal, q, k, v, q_positions, k_positions }
    }

    /// The gathered tensors.
    pub(super) fn qkv(&self) -> Result<Qkv<'_>> {
        Qkv::new(
            View::contiguous("q", &self.q, self.shape.q())?,
            View::contiguous("k", &self.k, self.shape.k())?,
            View::contiguous("v", &self.v, self.shape.v())?,
        )
    }

    /// Who sees whom.
    pub(super) fn slots(&self) -> Slots<'_> {
        let lane = |numbers, group: usize| Lane { numbers, entry: self.shape.n_heads_q * group, group };
        Slots {
            q: lane(&self.q_positions, self.shape.n_q),
            k: lane(&self.k_positions, self.shape.n_kv),
            causal: self.causal,
            self_logit: None,
            buckets: None,
            repeats: None,
        }
    }
}
