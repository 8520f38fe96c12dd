//! The norm of queries and keys from options and the tensors of its weights.

use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::registry::{NamedTensors, Options};
use attn_core::{AttnError, Result};

/// Weights of channels, `[head_dim]` each.
pub(super) const TENSORS: [&str; 2] = ["q_weight", "k_weight"];

/// The options `qk_norm` and `qk_norm_eps`.
pub(super) fn norm<'a>(options: &Options, tensors: &'a NamedTensors) -> Result<Option<QkNorm<'a>>> {
    let eps = options.get::<f32>("qk_norm_eps")?;
    let kind = match options.get::<String>("qk_norm")?.as_deref() {
        Some("rms") => NormKind::Rms { eps: eps.unwrap_or(1e-6) },
        Some("l2") => NormKind::L2 { eps: eps.unwrap_or(1e-12) },
        Some(other) => return Err(AttnError::value("option `qk_norm`", format!("`{other}`"), "rms or l2")),
        None => {
            return match TENSORS.into_iter().find(|name| tensors.get(name).is_some()) {
                Some(name) => Err(AttnError::value(
                    "option `qk_norm`",
                    "absent",
                    format!("rms or l2 beside the tensor `{name}`"),
                )),
                None => Ok(None),
            };
        }
    };
    let weights = |name| Ok(tensors.f32(name)?.map(|(_, weights)| weights));
    Ok(Some(QkNorm { kind, gamma_q: weights("q_weight")?, gamma_k: weights("k_weight")? }))
}
