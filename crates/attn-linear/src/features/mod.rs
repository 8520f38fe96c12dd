//! Kernelised attention: weights `phi(q) . phi(k)`, so that keys and values are summed once, whatever the number of queries.
//!
//! ```text
//! o_i = sum_j (phi(q_i) . phi(k_j)) v_j / den_i          den_i from D_i = sum_j phi(q_i) . phi(k_j)
//! ```
//!
//! over all keys, or with `causal` over those up to the query's own. A variant is two [maps](Map), a [`Normaliser`] and a scale.

mod attention;
mod cell;
mod definition;
mod gradients;
mod hedgehog;
mod kernels;
mod largest;
mod maps;
mod performer;
mod products;
mod projection;
mod random;
mod registry;
mod variant;

pub use attention::FeatureAttention;
pub use gradients::FeatureGrads;
pub use hedgehog::Layer;
pub use kernels::{Based, CosFormer, Efficient, Hedgehog, LinearRelu, ReBased, Rfa};
pub use maps::{Map, Place, Side};
pub use performer::{Kernel, Performer};
pub use products::{Affine, Products};
pub use random::Random;
pub(crate) use registry::entries;
use variant::Gate;
pub use variant::{FeatureInputs, FeatureSpec, FeatureVariant, Normaliser};
