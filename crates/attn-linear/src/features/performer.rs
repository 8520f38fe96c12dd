//! Performer: softmax or ReLU kernels by random orthogonal features (FAVOR+).

use super::maps::Map;
use super::random::Random;
use super::{FeatureSpec, FeatureVariant, Normaliser, projection};
use attn_core::{AttnError, Result};
use std::sync::Arc;

/// The kernel that FAVOR+ features stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernel {
    /// `e^(q . k / sqrt(d))`, estimated without bias but for `feature_eps`.
    #[default]
    Softmax,
    /// `relu` of projections, another kernel.
    Relu,
}

/// Performer: `phi(q) (phi(K)^T V)` over `phi(q) . sum phi(k)`, with the maps of [`Random`].
///
/// Without `weight` it is drawn from `seed`: blocks of `head_dim` orthogonal rows, of the lengths that independent normal
/// vectors have, or of `sqrt(head_dim)`.
///
/// Source: Choromanski et al. 2021 (Rethinking Attention with Performers).
#[derive(Debug, Clone, PartialEq)]
pub struct Performer {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// What is estimated.
    pub kernel: Kernel,
    /// Random features; `None` is `head_dim ln head_dim`.
    pub features: Option<usize>,
    /// Rows of the projection have length `sqrt(head_dim)` instead of random ones.
    pub equal_lengths: bool,
    /// Added to every feature; `None` is 1e-4 for softmax, 1e-3 for ReLU.
    pub feature_eps: Option<f32>,
    /// What the divisor is: `D` without `causal`, `phi(q) . (z + 1e-6)` with it.
    pub denom_eps: f32,
    /// Keys' exponents are lowered by the largest of all keys: safe for any keys, but it looks at later ones, if through
    /// `feature_eps` only. `None` does so without `causal`.
    pub key_max: Option<bool>,
    /// What the projection is drawn with.
    pub seed: u64,
    /// The projection `[features, head_dim]`.
    pub weight: Option<Arc<Random>>,
}

impl Default for Performer {
    fn default() -> Self {
        Self {
            causal: false,
            kernel: Kernel::Softmax,
            features: None,
            equal_lengths: false,
            feature_eps: None,
            denom_eps: 1e-6,
            key_max: None,
            seed: 0,
            weight: None,
        }
    }
}

impl Performer {
    /// With a projection `[features, head_dim]` as given.
    ///
    /// # Errors
    /// [`AttnError::Shape`] unless it holds whole rows.
    pub fn with_weight(mut self, weight: Vec<f32>, head_dim: usize) -> Result<Self> {
        if head_dim == 0 || weight.is_empty() || !weight.len().is_multiple_of(head_dim) {
            return Err(AttnError::shape("proj", "elements", weight.len(), format!("rows of {head_dim}")));
        }
        let features = weight.len() / head_dim;
        self.weight = Some(Arc::new(self.random(weight, features, head_dim)));
        Ok(self)
    }

    fn random(&self, weight: Vec<f32>, features: usize, head_dim: usize) -> Random {
        let relu = self.kernel == Kernel::Relu;
        let eps = self.feature_eps.unwrap_or(if relu { 1e-3 } else { 1e-4 });
        Random::new(weight, features, head_dim, relu, eps)
    }

    pub(super) fn looks_ahead(&self) -> bool {
        self.key_max.unwrap_or(!self.causal) && self.kernel == Kernel::Softmax
    }
}

impl FeatureVariant for Performer {
    const NAME: &'static str = "performer";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, head_dim: usize, _: usize) -> Result<FeatureSpec> {
        let random = match &self.weight {
            Some(random) => random.clone(),
            None => {
                let usual = (head_dim as f64 * (head_dim as f64).ln()) as usize;
                let features = self.features.unwrap_or(usual.max(4));
                if features == 0 {
                    return Err(AttnError::value("features", 0, "at least 1"));
                }
                let weight = projection::orthogonal(features, head_dim, self.equal_lengths, self.seed);
                Arc::new(self.random(weight, features, head_dim))
            }
        };
        if random.width() != head_dim {
            return Err(AttnError::shape("proj", "head_dim", random.width(), head_dim));
        }
        Ok(FeatureSpec {
            queries: Map::Favor(random.clone()),
            keys: Map::Favor(random),
            normaliser: if self.causal {
                Normaliser::EachPlus(self.denom_eps)
            } else {
                Normaliser::Plus(0.0)
            },
            scale: 1.0,
            key_max: self.looks_ahead(),
            gate: None,
        })
    }

    fn is_convex(&self) -> bool {
        !self.causal
    }

    fn max_error(&self) -> f64 {
        2e-5
    }
}
