//! The exact variants by name.

use crate::{Flash, Naive};
use attn_core::mask::{Align, DenseMask, Mask, SeeAll};
use attn_core::registry::{
    Entry, NamedTensor, NamedTensors, OptionSpec, Options, TensorData, output_like, run_qkv,
};
use attn_core::score::{Alibi, Bias, ScoreMod, Unchanged};
use attn_core::{AttnError, Family, Result};

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    vec![
        Entry {
            name: "flash",
            family: Family::Exact,
            summary: "Exact softmax attention by tiles, online softmax (Vaswani et al. 2017; Dao et al. 2022)",
            options: &[
                OptionSpec::CAUSAL,
                OptionSpec::SCALE,
                OptionSpec {
                    name: "align",
                    default: "bottom-right",
                    help: "where queries stand if n_q != n_kv: bottom-right, top-left, or the position of query 0",
                },
                OptionSpec { name: "window_left", default: "", help: "keys seen before a query's position" },
                OptionSpec { name: "window_right", default: "", help: "keys seen after a query's position" },
                OptionSpec { name: "softcap", default: "", help: "scores become c tanh(s / c)" },
            ],
            constructor: |options| Ok(Box::new(flash(options)?)),
            runner: run_flash,
        },
        Entry {
            name: "naive",
            family: Family::Exact,
            summary: "Exact softmax attention row by row in plain loops, to compare with (Vaswani et al. 2017)",
            options: &[OptionSpec::CAUSAL, OptionSpec::SCALE],
            constructor: |options| {
                let causal = options.get_or("causal", false)?;
                Ok(Box::new(Naive { softmax_scale: options.get("scale")?, causal }))
            },
            runner: run_qkv,
        },
    ]
}

fn flash(options: &Options) -> Result<Flash> {
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
    };
    if let Some(cap) = flash.softcap.filter(|c| !c.is_finite() || *c < 0.0) {
        return Err(AttnError::value("option `softcap`", cap, "a positive finite number, or 0 for none"));
    }
    Ok(flash)
}

/// `q`, `k`, `v` and, where given, `mask` (booleans as u8, true = attend), `bias` (f32) and `alibi_slopes` (one a query
/// head); `mask` and `bias` broadcast to `(batch, n_heads_q, n_q, n_kv)` from the right.
fn run_flash(_: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("flash", &["q", "k", "v", "mask", "bias", "alibi_slopes"])?;
    let flash = flash(options)?;
    let x = tensors.qkv()?;
    let shape = x.shape();
    let seen: Option<(&[usize], Vec<bool>)> = match tensors.get("mask") {
        Some(NamedTensor { shape, data: TensorData::U8(data) }) => {
            Some((shape, data.iter().map(|b| *b != 0).collect()))
        }
        Some(_) => {
            let (found, expected) = ("another".into(), "bool or u8".into());
            return Err(AttnError::DType { tensor: "mask".into(), found, expected });
        }
        None => None,
    };
    let mask = seen.as_ref().map(|(axes, seen)| DenseMask::new(seen, axes, &shape)).transpose()?;
    let bias = tensors.f32("bias")?.map(|(axes, bias)| Bias::new(bias, axes, &shape)).transpose()?;
    let alibi = tensors
        .f32("alibi_slopes")?
        .map(|(_, slopes)| Alibi::new(slopes.to_vec(), &shape, flash.align.offset(shape.n_q, shape.n_kv)))
        .transpose()?;
    if bias.is_some() && alibi.is_some() {
        return Err(AttnError::unsupported("flash", "`bias` and `alibi_slopes` together"));
    }
    // Looked up through a table at run time: a file's mask is not worth a kernel of its own.
    let mask = mask.as_ref().map_or(&SeeAll as &dyn Mask, |mask| mask);
    let score_mod: &dyn ScoreMod = match (&bias, &alibi) {
        (Some(bias), _) => bias,
        (None, Some(alibi)) => alibi,
        (None, None) => &Unchanged,
    };
    let [batch, heads, n_q, _] = shape.out();
    let (mut out, mut lse) = (output_like(&x), vec![f32::NAN; shape.rows()]);
    flash.call().mask(mask).score_mod(score_mod).forward(x, out.as_out()?, Some(&mut lse))?;
    let lse = NamedTensor::f32("lse", &[batch, heads, n_q], lse)?;
    Ok(NamedTensors([("o".into(), out), ("lse".into(), lse)].into()))
}
