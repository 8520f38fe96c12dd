//! What front ends do to single tokens: gates, norms, strengths.

use crate::matrix_state::{Chunk, Tokens, copy, copy_or};
use attn_core::registry::{OptionSpec, Options};
use attn_core::view::Rows;
use attn_core::{AttnError, Result, softmax_scale_or_default};

/// Chunks of variants whose decays differ by channel or whose erase is a triangular solve.
pub(crate) const FINE_CHUNK_LEN: usize = 16;

pub(crate) const SCALE: OptionSpec =
    OptionSpec { name: "scale", default: "", help: "multiplies the output; default 1/sqrt(head_dim)" };
pub(crate) const UNIT_SCALE: OptionSpec =
    OptionSpec { name: "scale", default: "1", help: "multiplies the output" };
pub(crate) const CAUSAL: OptionSpec =
    OptionSpec { name: "causal", default: "true", help: "always true: a recurrence has no other form" };
pub(crate) const CHUNK: OptionSpec =
    OptionSpec { name: "chunk_len", default: "32", help: "tokens the chunked form handles at once" };
pub(crate) const FINE_CHUNK: OptionSpec =
    OptionSpec { name: "chunk_len", default: "16", help: "tokens the chunked form handles at once" };
pub(crate) const LOG_DECAY: OptionSpec = OptionSpec {
    name: "log_decay",
    default: "-0.05",
    help: "natural log of the decay of every token, where no tensor gives it",
};
pub(crate) const BETA: OptionSpec =
    OptionSpec { name: "beta", default: "0.5", help: "write strength, where no tensor gives it" };
pub(crate) const QK_NORM: OptionSpec = OptionSpec {
    name: "qk_norm",
    default: "true",
    help: "divides queries and keys by their length, sqrt(sum + 1e-6) (true|false)",
};

/// Refuses `causal=false`.
pub(crate) fn causal_only(name: &'static str, options: &Options) -> Result<()> {
    if options.get_or("causal", true)? { Ok(()) } else { Err(AttnError::unsupported(name, "causal=false")) }
}

/// A chunk length of at least 1.
pub(crate) fn chunk_len(options: &Options, default: usize) -> Result<usize> {
    match options.get_or("chunk_len", default)? {
        0 => Err(AttnError::value("option `chunk_len`", 0, "at least 1")),
        len => Ok(len),
    }
}

/// A finite option.
pub(crate) fn finite(options: &Options, name: &str, default: f32) -> Result<f32> {
    let x: f32 = options.get_or(name, default)?;
    if x.is_finite() {
        Ok(x)
    } else {
        Err(AttnError::value(format!("option `{name}`"), x, "a finite number"))
    }
}

/// A scale, or `None` for the default.
pub(crate) fn scale(options: &Options) -> Result<Option<f32>> {
    let scale: Option<f32> = options.get("scale")?;
    softmax_scale_or_default(scale, 1)?;
    Ok(scale)
}

/// A natural log of a decay: at most 0.
pub(crate) fn log_decay(options: &Options, default: f32) -> Result<f32> {
    let g: f32 = options.get_or("log_decay", default)?;
    if g <= 0.0 { Ok(g) } else { Err(AttnError::value("option `log_decay`", g, "at most 0 (a natural log)")) }
}

pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`.
pub(crate) fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `ln(1 / (1 + e^-x))`.
pub(crate) fn log_sigmoid(x: f32) -> f32 {
    -softplus(-x)
}

/// `x / sqrt(x . x + eps)` for every row.
pub(crate) fn normalise(rows: &mut [f32], width: usize, eps: f32) {
    for row in rows.chunks_exact_mut(width) {
        let sum: f32 = lanes_sum(row);
        let factor = 1.0 / (sum + eps).sqrt();
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

/// The sum of squares, in eight partial sums that vectors can hold.
fn lanes_sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let mut pieces = row.chunks_exact(8);
    for piece in pieces.by_ref() {
        lanes.iter_mut().zip(piece).for_each(|(sum, x)| *sum += x * x);
    }
    let rest: f32 = pieces.remainder().iter().map(|x| x * x).sum();
    lanes.iter().sum::<f32>() + rest
}

/// q as it is.
pub(crate) fn copy_q(x: &Tokens<'_>, chunk: &mut Chunk) {
    copy(x.q, &mut chunk.q);
}

/// q, k and v as they are.
pub(crate) fn copy_qkv(x: &Tokens<'_>, chunk: &mut Chunk) {
    copy(x.q, &mut chunk.q);
    copy(x.k, &mut chunk.k);
    copy(x.v, &mut chunk.v);
}

/// Multiplies `out` by the numbers of `rows`, or by a constant where there are none.
pub(crate) fn multiply_by(rows: Option<Rows<'_, f32>>, default: f32, out: &mut [f32]) {
    match rows {
        Some(rows) => {
            let pairs = rows.iter().zip(out.chunks_exact_mut(rows.width()));
            pairs.for_each(|(row, out)| out.iter_mut().zip(row).for_each(|(out, x)| *out *= x));
        }
        None => out.iter_mut().for_each(|out| *out *= default),
    }
}

/// The decays as given, or the constant.
pub(crate) fn copy_decays(x: &Tokens<'_>, default: f32, chunk: &mut Chunk) {
    copy_or(x.extra("log_decay"), default, &mut chunk.log_decay);
}

/// The delta rule's erase and write: `a = -beta k`, `v <- beta v`, with `beta(w)` of write `w`.
pub(crate) fn delta(chunk: &mut Chunk, key_dim: usize, value_dim: usize, beta: impl Fn(usize) -> f32) {
    let rows = chunk.k.chunks_exact(key_dim).zip(chunk.a.chunks_exact_mut(key_dim));
    for (w, ((k, a), v)) in rows.zip(chunk.v.chunks_exact_mut(value_dim)).enumerate() {
        let beta = beta(w);
        a.iter_mut().zip(k).for_each(|(a, k)| *a = -beta * k);
        v.iter_mut().for_each(|v| *v *= beta);
    }
}
