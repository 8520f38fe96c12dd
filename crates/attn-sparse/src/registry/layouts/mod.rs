//! Layouts: global tokens, strides, blocks, grids.

mod blocks;
mod grids;
mod strides;
mod tokens;
mod videos;

use super::length;
use super::named::list;
use crate::{Parted, PartedAttention};
use attn_core::registry::{Entry, Options};
use attn_core::{Attention, AttnError, Result};

pub(super) fn entries() -> Vec<Entry> {
    [blocks::entries(), grids::entries(), strides::entries(), tokens::entries(), videos::entries()]
        .into_iter()
        .flatten()
        .collect()
}

/// The pattern with the options that all have, attended part by part.
fn build_parted(options: &Options, pattern: impl Parted) -> Result<Box<dyn Attention>> {
    Ok(Box::new(PartedAttention::new(pattern).with_scale(options.get("scale")?)))
}

/// One value an axis: as many as there are axes, or one for all.
fn per_axis<T: std::str::FromStr + Copy, const D: usize>(
    options: &Options,
    name: &str,
    default: T,
) -> Result<[T; D]> {
    let values = list::<T>(options, name)?;
    match values.as_slice() {
        [] => Ok([default; D]),
        [one] => Ok([*one; D]),
        many => <[T; D]>::try_from(many).map_err(|_| {
            AttnError::value(
                format!("option `{name}`"),
                format!("{} values", many.len()),
                format!("1 or {D}"),
            )
        }),
    }
}

/// [`per_axis`] for lengths that have to be positive.
fn lengths<const D: usize>(options: &Options, name: &str, default: usize) -> Result<[usize; D]> {
    let lengths = per_axis::<usize, D>(options, name, default)?;
    if lengths.contains(&0) {
        return Err(AttnError::value(format!("option `{name}`"), 0, "at least 1"));
    }
    Ok(lengths)
}
