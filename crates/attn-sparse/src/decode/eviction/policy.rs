//! What a policy keeps: how much a position is worth, which ones are never evicted, how many stay.

use attn_core::{AttnError, Result};

/// How much a cached position is worth; the one that is worth least goes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Importance {
    /// The later the better: what goes is the oldest.
    Recency,
    /// `-|k_j|`: keys of small norm draw attention.
    KeyNorm,
    /// `-cos(k_j, a)` with `a` the mean of the normalised keys held: keys that differ from the others.
    KeyDifference,
    /// The weight that the last query gave it.
    LastQuery,
    /// The weight that all queries since gave it, added up.
    TotalMass,
    /// The same, divided by the number of these queries.
    MeanMass,
    /// The mean weight that the last `window` queries gave it, smoothed over `kernel` neighbours. These queries' own
    /// positions are kept.
    WindowMass {
        /// Last queries that are asked.
        window: usize,
        /// Neighbours that are smoothed over, itself included; odd.
        kernel: usize,
        /// How.
        pooling: Pooling,
    },
}

/// How neighbours are smoothed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean; beyond the ends there are zeros.
    Mean,
    /// The largest of them.
    Max,
}

/// Which key/value heads decide together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// None: each keeps its own positions, by the mean weight of the query heads that read it.
    Head,
    /// All of a layer keep the same positions, by the mean over all heads.
    Layer,
    /// All of a layer share one budget, `n_heads_kv * budget` positions; what is worth least in any of them goes. Each head
    /// keeps at least `safeguard * budget`.
    Budget {
        /// Between 0 and 1.
        safeguard: f64,
    },
}

/// A policy of eviction. Whatever its worth, a position is kept if it is among the first `n_sinks` or the last `n_recent`.
///
/// | policy | by | source |
/// |---|---|---|
/// | [`EvictionPolicy::streaming_llm`] | recency | Xiao et al. 2024 |
/// | [`EvictionPolicy::h2o`] | total mass | Zhang et al. 2023 |
/// | [`EvictionPolicy::observed_attention`] | mean mass | the same, without the bias to old positions |
/// | [`EvictionPolicy::tova`] | last query, all heads together | Oren et al. 2024 |
/// | [`EvictionPolicy::snap_kv`] | mass of the last queries | Li et al. 2024 |
/// | [`EvictionPolicy::key_norm`] | key norm | Devoto et al. 2024 |
/// | [`EvictionPolicy::key_diff`] | key difference | Park et al. 2025 |
/// | [`EvictionPolicy::duo`] | recency, but some heads keep all | Xiao et al. 2025 |
///
/// Any of them with [`Share::Budget`] is AdaKV (Feng et al. 2024), and with a budget a layer from [`pyramid_budgets`],
/// PyramidKV (Cai et al. 2024).
#[derive(Debug, Clone, PartialEq)]
pub struct EvictionPolicy {
    /// What a position is worth.
    pub importance: Importance,
    /// Positions that a key/value head keeps.
    pub budget: usize,
    /// First positions that are never evicted.
    pub n_sinks: usize,
    /// Last positions that are not evicted yet.
    pub n_recent: usize,
    /// Which heads decide together.
    pub share: Share,
    /// Key/value heads that keep everything.
    pub full_heads: Vec<usize>,
}

impl EvictionPolicy {
    /// By `importance` alone, each head for itself.
    pub fn new(importance: Importance, budget: usize) -> Self {
        Self { importance, budget, n_sinks: 0, n_recent: 0, share: Share::Head, full_heads: Vec::new() }
    }

    /// The first positions and the last ones.
    pub fn streaming_llm(n_sinks: usize, budget: usize) -> Self {
        Self { n_sinks, ..Self::new(Importance::Recency, budget) }
    }

    /// Heavy hitters, and the last `n_recent`.
    pub fn h2o(n_recent: usize, budget: usize) -> Self {
        Self { n_recent, ..Self::new(Importance::TotalMass, budget) }
    }

    /// Heavy hitters by their mean weight.
    pub fn observed_attention(budget: usize) -> Self {
        Self::new(Importance::MeanMass, budget)
    }

    /// What the last query looked at, and its own position.
    pub fn tova(budget: usize) -> Self {
        Self { n_recent: 1, share: Share::Layer, ..Self::new(Importance::LastQuery, budget) }
    }

    /// What the last `window` queries looked at, and they themselves.
    pub fn snap_kv(window: usize, kernel: usize, budget: usize) -> Self {
        let importance = Importance::WindowMass { window, kernel, pooling: Pooling::Mean };
        Self { n_recent: window, ..Self::new(importance, budget) }
    }

    /// Keys of small norm.
    pub fn key_norm(budget: usize) -> Self {
        Self::new(Importance::KeyNorm, budget)
    }

    /// Keys that differ from the others.
    pub fn key_diff(budget: usize) -> Self {
        Self::new(Importance::KeyDifference, budget)
    }

    /// Retrieval heads keep everything, the others the first and the last positions.
    pub fn duo(full_heads: Vec<usize>, n_sinks: usize, budget: usize) -> Self {
        Self { full_heads, ..Self::streaming_llm(n_sinks, budget) }
    }

    /// Last positions that are kept whatever they are worth.
    pub(super) fn recent(&self) -> usize {
        match self.importance {
            Importance::WindowMass { window, .. } => self.n_recent.max(window),
            _ => self.n_recent,
        }
    }

    /// Whether a position must stay when the last one is `last`.
    pub(super) fn is_forced(&self, position: usize, last: usize) -> bool {
        position < self.n_sinks || position + self.recent() > last
    }

    /// Positions that each head keeps at least where a budget is shared.
    pub(super) fn safe(&self) -> usize {
        match self.share {
            Share::Budget { safeguard } => (self.budget as f64 * safeguard) as usize,
            _ => self.budget,
        }
    }

    pub(super) fn keeps_all(&self, kv_head: usize) -> bool {
        self.full_heads.contains(&kv_head)
    }

    /// Most positions that a head may hold before it evicts.
    pub(super) fn most(&self, kv_head: usize, n_heads_kv: usize) -> usize {
        match self.share {
            _ if self.keeps_all(kv_head) => usize::MAX,
            Share::Budget { .. } => self.budget.saturating_mul(n_heads_kv),
            _ => self.budget,
        }
    }

    /// Checks the settings, for a layer of `n_heads_kv` heads.
    ///
    /// # Errors
    /// [`AttnError::Value`] naming what does not fit.
    pub fn check(&self, n_heads_kv: usize) -> Result<()> {
        if self.budget == 0 {
            return Err(AttnError::value("budget", 0, "at least 1"));
        }
        let forced = self.n_sinks.saturating_add(self.recent());
        if forced > self.budget {
            let found = format!("{} and {}", self.n_sinks, self.recent());
            let expected = format!("together at most the budget {}", self.budget);
            return Err(AttnError::value("n_sinks and n_recent (or window)", found, expected));
        }
        if let Importance::WindowMass { window, kernel, .. } = self.importance {
            if window == 0 {
                return Err(AttnError::value("window", 0, "at least 1"));
            }
            if kernel.is_multiple_of(2) {
                return Err(AttnError::value("kernel", kernel, "an odd number"));
            }
        }
        if let Share::Budget { safeguard } = self.share
            && !(0.0..=1.0).contains(&safeguard)
        {
            return Err(AttnError::value("safeguard", safeguard, "between 0 and 1"));
        }
        if let Some(head) = self.full_heads.iter().find(|head| **head >= n_heads_kv) {
            return Err(AttnError::value("full_heads", head, format!("below {n_heads_kv} key/value heads")));
        }
        if !self.full_heads.is_empty() && self.share != Share::Head {
            let expected = "each head for itself where some keep all";
            return Err(AttnError::value("share", format!("{:?}", self.share), expected));
        }
        Ok(())
    }
}

/// Budgets of the layers of a model for a prompt of `n` tokens, falling linearly from the first layer to the last around a
/// mean of `budget`; the last gets about `budget / beta`. Where that cannot be (a budget too near to `n` or below `window`
/// for some layer), all layers get `budget`.
///
/// Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", 2024.
///
/// # Errors
/// [`AttnError::Value`] for no layers or a `beta` below 1.
///
/// ```
/// let budgets = attn_sparse::pyramid_budgets(5, 10_000, 1000, 20.0, 32)?;
/// assert_eq!(budgets, [1950, 1475, 1000, 525, 50]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
pub fn pyramid_budgets(
    n_layers: usize,
    n: usize,
    budget: usize,
    beta: f64,
    window: usize,
) -> Result<Vec<usize>> {
    if n_layers == 0 {
        return Err(AttnError::value("n_layers", 0, "at least 1"));
    }
    if beta.is_nan() || beta < 1.0 {
        return Err(AttnError::value("beta", beta, "at least 1"));
    }
    let (mean, longest) = (budget as f64, n.saturating_sub(window) as f64);
    let (mut least, mut most) = (mean / beta, 2.0 * mean - mean / beta);
    if most >= longest {
        (most, least) = (longest, 2.0 * mean - longest);
    }
    if n_layers == 1 || most < least || least < window as f64 {
        return Ok(vec![budget; n_layers]);
    }
    let step = (most - least) / (n_layers - 1) as f64;
    Ok((0..n_layers).map(|layer| (most - layer as f64 * step).round_ties_even() as usize).collect())
}
