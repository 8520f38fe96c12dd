//! One round of some heads, gathered: what the engine attends.
//!
//! Each head of the problem's tensors is a batch entry here, and each chunk of its sorted order a head: `q [entries, chunks,
//! chunk, head_dim]`. Keys are stored once, the chunk before the first one in front, `[entries, (chunks + 1) chunk, width]`,
//! and read through overlapping windows of two chunks.

use super::Reformer;
use super::order::Orders;
use crate::sorted::repeats::Repeats;
use crate::sorted::rows::{gather, normalize};
use crate::sorted::slots::{Lane, Slots};
use attn_core::{AttnShape, Qkv, Result, TensorView, View};
use std::sync::Arc;

/// A query head with its orders.
#[derive(Debug, Clone)]
pub(super) struct Unit {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) kv_head: usize,
    pub(super) q: Arc<Orders>,
    pub(super) k: Arc<Orders>,
}

/// Buffers for a round of some units.
pub(super) struct Chunks<'a> {
    config: &'a Reformer,
    x: Qkv<'a>,
    n_buckets: usize,
    self_logit: f32,
    units: &'a [Unit],
    n_chunks: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q_positions: Vec<i32>,
    k_positions: Vec<i32>,
    labels: Option<[Vec<i32>; 2]>,
    /// Chunks and buckets of all tokens in all rounds, where pairs are counted.
    repeats: Option<[(Vec<u32>, Vec<i32>); 2]>,
}

impl<'a> Chunks<'a> {
    pub(super) fn new(
        config: &'a Reformer,
        x: Qkv<'a>,
        (n_buckets, self_logit): (usize, f32),
        units: &'a [Unit],
    ) -> Self {
        let shape = x.shape();
        let (chunk, n_chunks) = (config.bucket_size, shape.n_q.div_ceil(config.bucket_size));
        let slots = [n_chunks, n_chunks + 1].map(|chunks| units.len() * chunks * chunk);
        let labels = (!config.attend_across_buckets).then(|| slots.map(|slots| vec![0; slots]));
        let all = |of: &dyn Fn(&Unit) -> Arc<Orders>| {
            let chunks = units.iter().flat_map(|unit| of(unit).chunks().collect::<Vec<_>>()).collect();
            (chunks, units.iter().flat_map(|unit| of(unit).buckets.clone()).collect())
        };
        let repeats = (!config.allow_duplicate_attention)
            .then(|| [all(&|unit| unit.q.clone()), all(&|unit| unit.k.clone())]);
        Self {
            config,
            x,
            n_buckets,
            self_logit,
            units,
            n_chunks,
            q: vec![0.0; slots[0] * shape.head_dim],
            k: vec![0.0; slots[1] * shape.head_dim],
            v: vec![0.0; slots[1] * shape.head_dim_v],
            q_positions: vec![0; slots[0]],
            k_positions: vec![0; slots[1]],
            labels,
            repeats,
        }
    }

    /// Rows of one unit: queries, and keys.
    pub(super) fn rows(&self) -> [usize; 2] {
        [self.n_chunks * self.config.bucket_size, (self.n_chunks + 1) * self.config.bucket_size]
    }

    /// Gathers a round.
    pub(super) fn load(&mut self, round: usize) {
        let shape = self.x.shape();
        let [n_q, n_k] = self.rows();
        let (d, d_v) = (shape.head_dim, shape.head_dim_v);
        let shared = self.config.shared_qk;
        for (at, unit) in self.units.iter().enumerate() {
            let (of_q, of_kv) = ([unit.batch, unit.head], [unit.batch, unit.kv_head]);
            let (keys, of_k) = if shared { (self.x.q(), of_q) } else { (self.x.k(), of_kv) };
            gather(self.x.q(), of_q, &mut self.q[at * n_q * d..][..n_q * d], |slot| {
                unit.q.token(round, slot)
            });
            let key = |row: usize| unit.k.key(round, row).map(|(_, token)| token);
            gather(keys, of_k, &mut self.k[at * n_k * d..][..n_k * d], key);
            gather(self.x.v(), of_kv, &mut self.v[at * n_k * d_v..][..n_k * d_v], key);
            self.q_positions[at * n_q..][..n_q]
                .iter_mut()
                .zip(unit.q.positions(round))
                .for_each(|(to, p)| *to = p);
            let positions = self.k_positions[at * n_k..][..n_k].iter_mut();
            positions.zip(unit.k.key_positions(round)).for_each(|(to, p)| *to = p);
            if let Some([of_q, of_k]) = &mut self.labels {
                for (slot, label) in of_q[at * n_q..][..n_q].iter_mut().enumerate() {
                    let token = unit.q.token(round, slot);
                    *label = token.map_or(-1, |token| unit.q.label(round, token, self.n_buckets));
                }
                for (row, label) in of_k[at * n_k..][..n_k].iter_mut().enumerate() {
                    let key = unit.k.key(round, row);
                    *label = key.map_or(-1, |(of, token)| unit.k.label(of, token, self.n_buckets));
                }
            }
        }
        if shared {
            normalize(&mut self.k, d);
        }
    }

    /// The gathered tensors.
    pub(super) fn qkv(&self) -> Result<Qkv<'_>> {
        let (shape, chunk) = (self.x.shape(), self.config.bucket_size);
        let view = |name: &'static str, rows, windows: usize, width: usize| -> Result<TensorView<'_>> {
            let axes = [self.units.len(), self.n_chunks, windows * chunk, width];
            let entry = (self.n_chunks + windows - 1) * chunk * width;
            Ok(View::new(name, rows, axes, [entry, chunk * width, width, 1])?.into())
        };
        let d = shape.head_dim;
        Qkv::new(
            view("q", &self.q, 1, d)?,
            view("k", &self.k, 2, d)?,
            view("v", &self.v, 2, shape.head_dim_v)?,
        )
    }

    /// The sizes of the gathered problem.
    pub(super) fn shape(&self) -> AttnShape {
        let shape = self.x.shape();
        AttnShape {
            batch: self.units.len(),
            n_heads_q: self.n_chunks,
            n_heads_kv: self.n_chunks,
            n_q: self.config.bucket_size,
            n_kv: 2 * self.config.bucket_size,
            ..shape
        }
    }

    /// Who sees whom.
    pub(super) fn slots(&self) -> Slots<'_> {
        let ([n_q, n_k], group) = (self.rows(), self.config.bucket_size);
        let repeats = self.repeats.as_ref().map(|[q, k]| Repeats {
            n: self.x.shape().n_q,
            n_rounds: self.config.n_hashes,
            n_chunks: self.n_chunks,
            q: &q.0,
            k: &k.0,
            buckets: (!self.config.attend_across_buckets).then_some([&q.1, &k.1]),
        });
        Slots {
            q: Lane { numbers: &self.q_positions, entry: n_q, group },
            k: Lane { numbers: &self.k_positions, entry: n_k, group },
            causal: self.config.causal,
            self_logit: self.config.shared_qk.then_some(self.self_logit),
            buckets: self.labels.as_ref().map(|[of_q, of_k]| {
                [Lane { numbers: of_q, entry: n_q, group }, Lane { numbers: of_k, entry: n_k, group }]
            }),
            repeats,
        }
    }
}
