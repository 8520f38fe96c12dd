//! The sparse variants by name.

mod compressed;
mod decode;
mod flex;
mod given;
mod layouts;
mod masks;
mod named;
mod nsa;
mod pages;
mod prefill;
mod routed;
mod sorted;
mod windows;

use crate::{Decider, SparseAttention};
use attn_core::registry::{Entry, Options};
use attn_core::{Attention, AttnError, Result};

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    [
        decode::entries(),
        flex::entries(),
        layouts::entries(),
        masks::entries(),
        pages::entries(),
        prefill::entries(),
        routed::entries(),
        sorted::entries(),
        windows::entries(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The decider with the options that all have.
fn attention<D: Decider>(options: &Options, decider: D) -> Result<SparseAttention<D>> {
    Ok(SparseAttention { softmax_scale: options.get("scale")?, ..SparseAttention::new(decider) })
}

/// [`attention`], boxed.
fn build<D: Decider>(options: &Options, decider: D) -> Result<Box<dyn Attention>> {
    Ok(Box::new(attention(options, decider)?))
}

/// A length that has to be positive.
fn at_least_1(options: &Options, name: &str, default: usize) -> Result<usize> {
    match options.get_or(name, default)? {
        0 => Err(AttnError::value(format!("option `{name}`"), 0, "at least 1")),
        length => Ok(length),
    }
}

/// A length that has to be positive if it is given.
fn length(options: &Options, name: &str) -> Result<Option<usize>> {
    match options.get(name)? {
        Some(0) => Err(AttnError::value(format!("option `{name}`"), 0, "at least 1")),
        length => Ok(length),
    }
}

/// An option of variants that are always causal.
fn only_causal(options: &Options, name: &'static str) -> Result<()> {
    if options.get_or("causal", true)? { Ok(()) } else { Err(AttnError::unsupported(name, "`causal=false`")) }
}
