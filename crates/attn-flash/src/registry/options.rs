//! The options of `flash`.

use crate::{Flash, HalfProducts};
use attn_core::mask::Align;
use attn_core::registry::{OptionSpec, Options};
use attn_core::{AttnError, Result};

const fn option(name: &'static str, default: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { name, default, help }
}

/// What shapes the call on tensors, and no [`Flash`] by itself.
const OF_CALLS: [&str; 5] = ["prefix", "mask_mod", "score_mod", "dropout_p", "qk_norm"];

pub(super) const ALL: &[OptionSpec] = &[
    OptionSpec::CAUSAL,
    OptionSpec::SCALE,
    option(
        "align",
        "bottom-right",
        "where queries stand if n_q != n_kv: bottom-right, top-left, or the position of query 0",
    ),
    option("window_left", "", "keys seen before a query's position"),
    option("window_right", "", "keys seen after a query's position"),
    option("softcap", "", "scores become c tanh(s / c)"),
    option(
        "half_products",
        "auto",
        "bf16 and f16 forward: widen to f32, native pairs of bf16, or auto, native where it can run",
    ),
    option("prefix", "", "keys before this one are seen by all, later ones causally"),
    option("mask_mod", "", "a pair must satisfy this, as (i + j) % 2 == 0, with b, h, i, j"),
    option("score_mod", "", "the new score, as s - 0.1 |i - j|, with b, h, i, j; behind the cap"),
    option("max_distance", "128", "distances from here on share a bucket of `t5_table`"),
    option("bidirectional", "true", "half of `t5_table`'s buckets are for keys behind the query"),
    option("dropout_p", "", "weights are dropped with this probability"),
    option("seed", "0", "of the dropout"),
    option("qk_norm", "", "queries and keys are normalised first: rms or l2"),
    option("qk_norm_eps", "", "of the norm; default 1e-6 for rms, 1e-12 for l2"),
];

/// The variant by itself, without the options of calls.
pub(super) fn flash(options: &Options) -> Result<Flash> {
    let align = match options.0.get("align").map(String::as_str) {
        None | Some("" | "bottom-right") => Align::BottomRight,
        Some("top-left") => Align::TopLeft,
        Some(offset) => Align::Offset(offset.parse().map_err(|_| {
            AttnError::value(
                "option `align`",
                format!("`{offset}`"),
                "bottom-right, top-left or a whole number",
            )
        })?),
    };
    let flash = Flash {
        softmax_scale: options.get("scale")?,
        causal: options.get_or("causal", false)?,
        align,
        window_left: options.get("window_left")?,
        window_right: options.get("window_right")?,
        softcap: options.get("softcap")?,
        tiles: None,
        half_products: options.get_or("half_products", HalfProducts::Auto)?,
    };
    if let Some(cap) = flash.softcap.filter(|c| !c.is_finite() || *c < 0.0) {
        return Err(AttnError::value("option `softcap`", cap, "a positive finite number, or 0 for none"));
    }
    Ok(flash)
}

/// The variant as an `Attention` of q, k and v alone: an option that only calls on tensors know is an error.
pub(super) fn attention(options: &Options) -> Result<Flash> {
    for name in OF_CALLS {
        if options.get::<String>(name)?.is_some() {
            return Err(AttnError::unsupported("flash", format!("`{name}` but in calls on named tensors")));
        }
    }
    // Without their tensors or options these shape nothing; what is no value of theirs is still an error.
    options.get::<usize>("max_distance")?;
    options.get::<bool>("bidirectional")?;
    options.get::<u64>("seed")?;
    options.get::<f32>("qk_norm_eps")?;
    flash(options)
}
