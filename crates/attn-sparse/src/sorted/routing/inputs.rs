//! What a call may be given besides q, k and v.

use super::Routing;
use super::means::drawn;
use super::nearest::nearest;
use attn_core::{AttnError, Qkv, Result, softmax_scale_or_default};
use std::borrow::Cow;

/// Further inputs of [`Routing`]; what is not given is drawn, chosen or absent.
#[derive(Debug, Clone, Copy, Default)]
pub struct RoutingInputs<'a> {
    /// Centroids `[n_heads_q, num_clusters, head_dim]`, of unit length.
    pub means: Option<&'a [f32]>,
    /// Keys that every query of a cluster sees, `[n_heads_q, num_clusters, num_mem_kv, head_dim]`.
    pub mem_key: Option<&'a [f32]>,
    /// Their values, `[n_heads_q, num_clusters, num_mem_kv, head_dim_v]`.
    pub mem_value: Option<&'a [f32]>,
    /// The queries of each cluster, `[batch, n_heads_q, num_clusters, any]`, instead of the nearest; -1 is none.
    pub q_index: Option<&'a [i32]>,
    /// The keys of each cluster, as `q_index`.
    pub k_index: Option<&'a [i32]>,
}

/// Checked inputs, with what was not given.
pub(super) struct Checked<'a> {
    pub(super) means: Cow<'a, [f32]>,
    pub(super) clusters: usize,
    /// Queries and keys of a cluster.
    pub(super) windows: [usize; 2],
    /// Memory keys and values, and their number in a cluster.
    pub(super) memory: [&'a [f32]; 2],
    pub(super) n_memory: usize,
    pub(super) given: [Option<&'a [i32]>; 2],
    pub(super) softmax_scale: f32,
}

impl<'a> RoutingInputs<'a> {
    pub(super) fn check(&self, config: &Routing, x: &Qkv<'_>) -> Result<Checked<'a>> {
        let shape = x.shape();
        if config.shared_qk && shape.n_q != shape.n_kv {
            let expected = format!("{} (n_q) for shared queries and keys", shape.n_q);
            return Err(AttnError::shape("k", "n_kv", shape.n_kv, expected));
        }
        if !(config.mean_eps >= 0.0 && config.mean_eps.is_finite()) {
            return Err(AttnError::value("mean_eps", config.mean_eps, "a number, at least 0"));
        }
        if config.num_clusters == Some(0) || config.window == Some(0) {
            let name = if config.window == Some(0) { "window" } else { "num_clusters" };
            return Err(AttnError::value(name, 0, "at least 1"));
        }
        let per_cluster = shape.n_heads_q * shape.head_dim;
        let clusters = match self.means {
            Some(means) => means.len().checked_div(per_cluster).unwrap_or(0).max(1),
            None => config.clusters(&shape),
        };
        let elements = |name: &'static str, found: usize, expected: usize, axes: &str| {
            if found == expected {
                return Ok(());
            }
            Err(AttnError::shape(name, "elements", found, format!("{axes} = {expected}")))
        };
        if let Some(means) = self.means {
            let clusters = config.num_clusters.unwrap_or(clusters);
            elements("means", means.len(), per_cluster * clusters, "n_heads_q x num_clusters x head_dim")?;
        }
        let (mem_key, mem_value) = (self.mem_key.unwrap_or(&[]), self.mem_value.unwrap_or(&[]));
        let n_memory = mem_key.len().checked_div(per_cluster * clusters).unwrap_or(0);
        let memories = shape.n_heads_q * clusters * n_memory;
        let axes = "n_heads_q x num_clusters x num_mem_kv x width";
        elements("mem_key", mem_key.len(), memories * shape.head_dim, axes)?;
        elements("mem_value", mem_value.len(), memories * shape.head_dim_v, axes)?;

        let mut windows = config.windows(&shape, clusters);
        let lists = shape.batch * shape.n_heads_q * clusters;
        let given = [("q_index", self.q_index, shape.n_q), ("k_index", self.k_index, shape.n_kv)];
        for (side, (name, index, n)) in given.into_iter().enumerate() {
            let Some(index) = index else { continue };
            windows[side] = index.len().checked_div(lists).unwrap_or(0);
            elements(name, index.len(), windows[side] * lists, "batch x n_heads_q x num_clusters x window")?;
            if let Some(bad) = index.iter().find(|t| **t < -1 || usize::try_from(**t).is_ok_and(|t| t >= n)) {
                return Err(AttnError::value(name, bad, format!("-1, or a row below {n}")));
            }
            let mut sorted: Vec<i32> = Vec::new();
            for list in index.chunks_exact(windows[side].max(1)) {
                sorted.clear();
                sorted.extend(list.iter().filter(|t| **t >= 0));
                sorted.sort_unstable();
                if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                    return Err(AttnError::value(
                        name,
                        format!("{} twice", twice[0]),
                        "each row once a cluster",
                    ));
                }
            }
        }
        let slots = windows.map(|w| clusters.saturating_mul(w + n_memory));
        if slots.iter().chain(&[shape.n_q, shape.n_kv]).any(|n| *n >= i32::MAX as usize) {
            return Err(AttnError::shape("q", "n_q", shape.n_q, "fewer than 2^31 rows and slots"));
        }
        let means = match self.means {
            Some(means) => Cow::Borrowed(means),
            None => Cow::Owned(drawn(config.seed, shape.n_heads_q * clusters, shape.head_dim)),
        };
        Ok(Checked {
            means,
            clusters,
            windows,
            memory: [mem_key, mem_value],
            n_memory,
            given: [self.q_index, self.k_index],
            softmax_scale: softmax_scale_or_default(config.softmax_scale, shape.head_dim)?,
        })
    }
}

impl Checked<'_> {
    /// Queries and keys of the clusters of a head, `[num_clusters, window]` each, ascending; -1 behind the last.
    pub(super) fn lists(&self, config: &Routing, x: &Qkv<'_>, at: [usize; 2]) -> [Vec<i32>; 2] {
        let shape = x.shape();
        let head = at[0] * shape.n_heads_q + at[1];
        let means = &self.means[at[1] * self.clusters * shape.head_dim..][..self.clusters * shape.head_dim];
        let list = |side: usize| {
            let window = self.windows[side];
            let len = self.clusters * window;
            match self.given[side] {
                Some(index) => {
                    let mut list = index[head * len..][..len].to_vec();
                    // As numbers without sign, -1 is the last.
                    list.chunks_exact_mut(window.max(1))
                        .for_each(|list| list.sort_unstable_by_key(|t| *t as u32));
                    list
                }
                None if side == 0 => nearest(x.q(), at, means, window),
                None => nearest(x.k(), [at[0], shape.kv_head(at[1])], means, window),
            }
        };
        let queries = list(0);
        let keys = if config.shared_qk && self.given[1].is_none() && self.windows[0] == self.windows[1] {
            queries.clone()
        } else if config.shared_qk && self.given[1].is_none() {
            nearest(x.q(), at, means, self.windows[1])
        } else {
            list(1)
        };
        [queries, keys]
    }
}
