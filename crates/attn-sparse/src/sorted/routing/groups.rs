//! The clusters of some heads, gathered: what the engine attends.
//!
//! Each head of the problem is a batch entry here, and each cluster a head: `q [entries, clusters, window, head_dim]`, and keys
//! `[entries, clusters, num_mem_kv + window, width]` with the memory in front.

use super::Routing;
use super::inputs::Checked;
use crate::sorted::rows::{Places, gather, normalize};
use crate::sorted::self_score::SelfScore;
use crate::sorted::slots::{Lane, MEMORY, NOBODY, Slots};
use attn_core::{AttnShape, Qkv, Result, View};

/// A query head with the tokens of its clusters.
#[derive(Debug, Clone)]
pub(super) struct Unit {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) kv_head: usize,
    /// Query of each slot, `[clusters, window]`; -1 is none.
    pub(super) queries: Vec<i32>,
    /// Key of each slot, `[clusters, num_mem_kv + window]`; negative is none, or memory.
    pub(super) keys: Vec<i32>,
    /// Where the queries are.
    pub(super) places: Places,
}

impl Unit {
    pub(super) fn new(
        config: &Routing,
        x: &Qkv<'_>,
        inputs: &Checked<'_>,
        [batch, head]: [usize; 2],
    ) -> Self {
        let shape = x.shape();
        let [queries, listed] = inputs.lists(config, x, [batch, head]);
        let mut keys = Vec::with_capacity(inputs.clusters * (inputs.n_memory + inputs.windows[1]));
        for cluster in 0..inputs.clusters {
            keys.extend(std::iter::repeat_n(MEMORY, inputs.n_memory));
            keys.extend(&listed[cluster * inputs.windows[1]..][..inputs.windows[1]]);
        }
        let places = Places::new(&queries, shape.n_q);
        Self { batch, head, kv_head: shape.kv_head(head), queries, keys, places }
    }
}

/// The gathered rows of some units.
pub(super) struct Groups {
    causal: bool,
    self_logit: Option<f32>,
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q_positions: Vec<i32>,
    k_positions: Vec<i32>,
}

impl Groups {
    pub(super) fn new(config: &Routing, x: &Qkv<'_>, inputs: &Checked<'_>, units: &[Unit]) -> Self {
        let of = x.shape();
        let [window_q, window_k] = inputs.windows;
        let shape = AttnShape {
            batch: units.len(),
            n_heads_q: inputs.clusters,
            n_heads_kv: inputs.clusters,
            n_q: window_q,
            n_kv: inputs.n_memory + window_k,
            ..of
        };
        let [mut q, mut k, mut v] =
            [shape.q(), shape.k(), shape.v()].map(|axes| vec![0.0; axes.iter().product()]);
        let (mut q_positions, mut k_positions) = (Vec::new(), Vec::new());
        let offset = of.n_kv as i32 - of.n_q as i32;
        let token = |tokens: &[i32], slot: usize| usize::try_from(tokens[slot]).ok();
        for (u, unit) in units.iter().enumerate() {
            let (n_q, n_k) = (unit.queries.len(), unit.keys.len());
            let (d, d_v) = (of.head_dim, of.head_dim_v);
            let (of_q, of_kv) = ([unit.batch, unit.head], [unit.batch, unit.kv_head]);
            gather(x.q(), of_q, &mut q[u * n_q * d..][..n_q * d], |slot| token(&unit.queries, slot));
            let (keys, values) = (&mut k[u * n_k * d..][..n_k * d], &mut v[u * n_k * d_v..][..n_k * d_v]);
            let (rows, from) = if config.shared_qk { (x.q(), of_q) } else { (x.k(), of_kv) };
            gather(rows, from, keys, |slot| token(&unit.keys, slot));
            gather(x.v(), of_kv, values, |slot| token(&unit.keys, slot));
            if config.shared_qk {
                normalize(keys, d);
            }
            for (memory, rows, width) in [(inputs.memory[0], keys, d), (inputs.memory[1], values, d_v)] {
                let per_cluster = inputs.n_memory * width;
                let clusters = rows.chunks_exact_mut((shape.n_kv * width).max(1));
                for (cluster, rows) in
                    clusters.enumerate().take(if per_cluster > 0 { inputs.clusters } else { 0 })
                {
                    let from = (unit.head * inputs.clusters + cluster) * per_cluster;
                    rows[..per_cluster].copy_from_slice(&memory[from..][..per_cluster]);
                }
            }
            q_positions.extend(unit.queries.iter().map(|t| if *t < 0 { NOBODY } else { t + offset }));
            let position = |t: &i32| if *t < 0 && *t != MEMORY { NOBODY } else { *t };
            k_positions.extend(unit.keys.iter().map(position));
        }
        let longest = |rows: &[f32]| {
            let squares = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
            rows.chunks_exact(of.head_dim).map(squares).fold(0.0, f32::max).sqrt()
        };
        let self_logit = config.shared_qk.then(|| {
            let lowest = -inputs.softmax_scale.abs() * longest(&q) * longest(&k);
            SelfScore::new(config.self_logit, lowest).used
        });
        Self { causal: config.causal, self_logit, shape, q, k, v, q_positions, k_positions }
    }

    /// The sizes of the gathered problem.
    pub(super) fn shape(&self) -> AttnShape {
        self.shape
    }

    /// The gathered tensors.
    pub(super) fn qkv(&self) -> Result<Qkv<'_>> {
        let shape = self.shape;
        Qkv::new(
            View::contiguous("q", &self.q, shape.q())?,
            View::contiguous("k", &self.k, shape.k())?,
            View::contiguous("v", &self.v, shape.v())?,
        )
    }

    /// Who sees whom.
    pub(super) fn slots(&self) -> Slots<'_> {
        let lane = |numbers, group: usize| Lane { numbers, entry: self.shape.n_heads_q * group, group };
        Slots {
            q: lane(&self.q_positions, self.shape.n_q),
            k: lane(&self.k_positions, self.shape.n_kv),
            causal: self.causal,
            self_logit: self.self_logit,
            buckets: None,
            repeats: None,
        }
    }
}
