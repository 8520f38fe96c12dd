//! Variants that are one line of options each.

use super::hedgehog::Layer;
use super::maps::Map;
use super::products::{Affine, Products};
use super::random::Random;
use super::{FeatureSpec, FeatureVariant, Normaliser, projection};
use attn_core::{AttnError, Result};
use std::sync::Arc;

/// The same map for both sides.
fn spec(map: Map, normaliser: Normaliser) -> FeatureSpec {
    FeatureSpec { queries: map.clone(), keys: map, normaliser, scale: 1.0, key_max: false, gate: None }
}

/// Linear attention with `phi(x) = max(x, 0)`, as vision models have it: over all keys, `D + eps`.
///
/// Sources: Cai et al. 2023 (EfficientViT); Xie et al. 2024 (SANA, eps 1e-15).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LinearRelu {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Added to the sum of weights.
    pub eps: f32,
}

impl FeatureVariant for LinearRelu {
    const NAME: &'static str = "linear-relu";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, _: usize, _: usize) -> Result<FeatureSpec> {
        Ok(spec(Map::Relu, Normaliser::Plus(self.eps)))
    }
}

/// cosFormer: ReLU features that turn with the position, so that near keys weigh more: weight
/// `relu(q_i) . relu(k_j) cos(pi (i - j) / 2 m)`, divisor `max(D, eps)`.
///
/// Source: Qin et al. 2022 (cosFormer: Rethinking Softmax in Attention), equation 10.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosFormer {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Length `m` of a quarter turn, at least that of sequences; `None` is the longer of queries and keys, which a stream
    /// cannot know.
    pub length: Option<usize>,
    /// Least divisor.
    pub eps: f32,
}

impl Default for CosFormer {
    fn default() -> Self {
        Self { causal: false, length: None, eps: 1e-6 }
    }
}

impl FeatureVariant for CosFormer {
    const NAME: &'static str = "cosformer";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, _: usize, n: usize) -> Result<FeatureSpec> {
        let m = self.length.unwrap_or(n);
        if m < n {
            return Err(AttnError::value("length", m, format!("at least the {n} rows of the problem")));
        }
        Ok(spec(Map::Cosine(m), Normaliser::AtLeast(self.eps)))
    }

    fn needs_length(&self) -> bool {
        self.length.is_none()
    }

    fn is_key_order_free(&self) -> bool {
        false
    }
}

/// Based: the second-order Taylor expansion of the softmax kernel, weight `1 + s + s^2 / 2` with `s = q . k / sqrt(d)`.
///
/// The state has `1 + d + d (d + 1) / 2` rows: meant for a `head_dim` of 16 or so.
///
/// Source: Arora et al. 2024 (Simple linear attention language models balance the recall-throughput tradeoff).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Based {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Whether weights are divided by their sum.
    pub normalise: bool,
    /// Added to the sum.
    pub eps: f32,
}

impl Default for Based {
    fn default() -> Self {
        Self { causal: true, normalise: true, eps: 1e-6 }
    }
}

impl FeatureVariant for Based {
    const NAME: &'static str = "based";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, _: usize, _: usize) -> Result<FeatureSpec> {
        let normaliser = if self.normalise { Normaliser::Plus(self.eps) } else { Normaliser::None };
        Ok(spec(Map::Taylor(Products::Taylor), normaliser))
    }
}

/// ReBased: weight `s^2` with `s = LN(q) . LN(k) / sqrt(d)`, layer norms with learned scale and shift.
///
/// Source: Aksenov et al. 2024 (Linear Transformers with Learnable Kernel Functions are Better In-Context Models).
#[derive(Debug, Clone, PartialEq)]
pub struct ReBased {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Added to the sum of weights.
    pub eps: f32,
    /// What the layer norms learned.
    pub affine: Arc<Affine>,
}

impl Default for ReBased {
    fn default() -> Self {
        Self { causal: true, eps: 1e-6, affine: Arc::default() }
    }
}

impl FeatureVariant for ReBased {
    const NAME: &'static str = "rebased";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, head_dim: usize, _: usize) -> Result<FeatureSpec> {
        let Affine { query, key } = &*self.affine;
        let all = [
            ("query scale", &query.0),
            ("query shift", &query.1),
            ("key scale", &key.0),
            ("key shift", &key.1),
        ];
        for (name, data) in all {
            if !data.is_empty() && data.len() != head_dim {
                return Err(AttnError::shape(name, "head_dim", data.len(), head_dim));
            }
        }
        let map = Map::Quadratic(Products::Normalised(self.affine.clone()));
        Ok(spec(map, Normaliser::Plus(self.eps)))
    }

    /// A first token whose weight is near 0 is divided by it.
    fn max_error(&self) -> f64 {
        2e-4
    }
}

/// Hedgehog: learned features `softmax([2 y, -2 y])`, `y = W x + b`, that imitate softmax weights. Without `layer` it is the
/// identity, what training starts with.
///
/// Source: Zhang, Bhatia, Kumbong, Ré 2024 (The Hedgehog and the Porcupine).
#[derive(Debug, Clone, PartialEq)]
pub struct Hedgehog {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Multiplies `y`: 2 in flash-linear-attention, 1 in the paper.
    pub factor: f32,
    /// Added to the sum of weights.
    pub eps: f32,
    /// `W [features, head_dim]` and `b` of queries and keys.
    pub layer: Option<Arc<Layer>>,
}

impl Default for Hedgehog {
    fn default() -> Self {
        Self { causal: true, factor: 2.0, eps: 1e-10, layer: None }
    }
}

impl Hedgehog {
    /// With learned maps: `(W [features, head_dim], b [features])` of queries and of keys.
    ///
    /// # Errors
    /// [`AttnError::Shape`] naming the tensor that does not fit.
    pub fn with_layer(
        mut self,
        query: (&[f32], &[f32]),
        key: (&[f32], &[f32]),
        head_dim: usize,
    ) -> Result<Self> {
        let features = query.1.len();
        let sizes = [
            ("wq", query.0.len(), features * head_dim),
            ("wk", key.0.len(), features * head_dim),
            ("bk", key.1.len(), features),
        ];
        for (name, found, expected) in sizes {
            if found != expected {
                return Err(AttnError::shape(name, "elements", found, expected));
            }
        }
        if features == 0 || head_dim == 0 {
            return Err(AttnError::shape("bq", "elements", features, "at least 1"));
        }
        self.layer = Some(Arc::new(Layer::new(query, key, head_dim, self.factor)));
        Ok(self)
    }
}

impl FeatureVariant for Hedgehog {
    const NAME: &'static str = "hedgehog";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, head_dim: usize, _: usize) -> Result<FeatureSpec> {
        let layer = match &self.layer {
            Some(layer) => layer.clone(),
            None => Arc::new(Layer::identity(head_dim, self.factor)),
        };
        if layer.width() != head_dim {
            return Err(AttnError::shape("wq", "head_dim", layer.width(), head_dim));
        }
        Ok(spec(Map::Hedgehog(layer), Normaliser::Plus(self.eps)))
    }

    fn is_convex(&self) -> bool {
        true
    }
}

/// Efficient attention: softmax of queries over channels, of keys over tokens; `o = rho_q (rho_k^T V)`. Causal: keys are `e^k`,
/// the divisor `max(D, 1e-3)`.
///
/// Source: Shen, Zhang, Zhao, Yi, Li 2021 (Efficient Attention: Attention with Linear Complexities).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Efficient {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Multiplies the weights; `None` is 1, as in the paper. Packages take `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
}

impl FeatureVariant for Efficient {
    const NAME: &'static str = "efficient";

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, _: usize, _: usize, _: usize) -> Result<FeatureSpec> {
        let scale = self.scale.unwrap_or(1.0);
        if !(scale.is_finite() && scale != 0.0) {
            return Err(AttnError::value("scale", scale, "a finite number other than 0"));
        }
        Ok(FeatureSpec {
            queries: Map::Softmax,
            keys: Map::Exp,
            normaliser: if self.causal { Normaliser::AtLeast(1e-3) } else { Normaliser::Rows },
            scale,
            key_max: !self.causal,
            gate: None,
        })
    }

    fn is_convex(&self) -> bool {
        self.scale.is_none() && !self.causal
    }
}

/// Random feature attention: `phi(x) = [sin, cos](W x / |x|)` stands for the Gaussian kernel; the divisor is `max(D, 1e-6)`, since
/// estimated weights may be negative. With gates `r_t` the past fades, `S_t = r_t S_(t-1) + (1 - r_t) phi(k_t) v_t^T`, and so does
/// the sum of weights.
///
/// Source: Peng, Pappas, Yogatama, Schwartz, Smith, Kong 2021 (Random Feature Attention).
#[derive(Debug, Clone, PartialEq)]
pub struct Rfa {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Rows of the projection: half the features.
    pub features: usize,
    /// Least divisor.
    pub eps: f32,
    /// The gate of all tokens in `[0, 1]` where none are given; `None` is no gate. Causal only.
    pub gate: Option<f32>,
    /// What the projection is drawn with.
    pub seed: u64,
    /// The projection `[heads or 1, features, head_dim]`.
    pub weight: Option<Arc<Random>>,
}

impl Default for Rfa {
    fn default() -> Self {
        Self { causal: true, features: 128, eps: 1e-6, gate: None, seed: 0, weight: None }
    }
}

impl Rfa {
    /// With a projection `[heads or 1, features, head_dim]` as given.
    ///
    /// # Errors
    /// [`AttnError::Shape`] unless it has that many elements.
    pub fn with_weight(mut self, weight: Vec<f32>, [heads, features, head_dim]: [usize; 3]) -> Result<Self> {
        if weight.len() != heads * features * head_dim || weight.is_empty() {
            return Err(AttnError::shape("proj", "elements", weight.len(), heads * features * head_dim));
        }
        self.weight = Some(Arc::new(Random::new(weight, features, head_dim, false, 0.0)));
        Ok(self)
    }
}

impl FeatureVariant for Rfa {
    const NAME: &'static str = "rfa";
    const GATED: bool = true;

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn spec(&self, n_heads_q: usize, head_dim: usize, _: usize) -> Result<FeatureSpec> {
        if self.features == 0 {
            return Err(AttnError::value("features", 0, "at least 1"));
        }
        let random = match &self.weight {
            Some(random) => random.clone(),
            None => {
                let weight = projection::normal(self.features, head_dim, self.seed);
                Arc::new(Random::new(weight, self.features, head_dim, false, 0.0))
            }
        };
        if random.width() != head_dim {
            return Err(AttnError::shape("proj", "head_dim", random.width(), head_dim));
        }
        if ![1, n_heads_q].contains(&random.heads()) {
            return Err(AttnError::shape("proj", "heads", random.heads(), format!("1 or {n_heads_q}")));
        }
        Ok(FeatureSpec { gate: self.gate, ..spec(Map::Fourier(random), Normaliser::AtLeast(self.eps)) })
    }
}
