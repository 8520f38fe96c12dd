//! Neighbourhoods and lines.

use super::{build_parted, lengths, list, per_axis};
use crate::{Axial, AxisWindow, Neighborhood, Pattern};
use attn_core::registry::{Entry, OptionSpec, Options, run_qkv};
use attn_core::{Attention, AttnError, Family, Result};

const DILATION: OptionSpec = OptionSpec {
    name: "dilation",
    default: "1",
    help: "distance of neighbouring keys, one for all axes or by commas",
};
const STRIDE: OptionSpec = OptionSpec {
    name: "stride",
    default: "1",
    help: "queries that share a window, one for all axes or by commas",
};
const CAUSAL: OptionSpec = OptionSpec {
    name: "causal",
    default: "false",
    help: "nothing after the query along the axis, one for all axes or by commas (true|false)",
};
pub(super) const GRID: OptionSpec = OptionSpec {
    name: "grid",
    default: "",
    help: "lengths of the axes, by commas; default the closest to a cube that n_kv positions fill",
};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: <Axial<2> as Pattern>::NAME,
            family: Family::Sparse,
            summary: "The lines of a grid that meet in the query (Ho et al. 2019)",
            options: &[
                OptionSpec { name: "axes", default: "2", help: "axes of the grid (2|3)" },
                OptionSpec { name: "axis", default: "", help: "the one axis attended along; default all" },
                OptionSpec {
                    name: "causal",
                    default: "false",
                    help: "no later position of the line (true|false)",
                },
                GRID,
                OptionSpec::SCALE,
            ],
            constructor: |options| match options.get_or("axes", 2)? {
                2 => axial::<2>(options),
                3 => axial::<3>(options),
                other => Err(AttnError::value("option `axes`", other, "2 or 3")),
            },
            runner: run_qkv,
        },
        Entry {
            name: <Neighborhood<1> as Pattern>::NAME,
            family: Family::Sparse,
            summary: "A window of constant size, moved inwards at the ends (Hassani et al. 2023)",
            options: &[
                OptionSpec { name: "kernel_size", default: "257", help: "keys of the window" },
                DILATION,
                STRIDE,
                CAUSAL,
                GRID,
                OptionSpec::SCALE,
            ],
            constructor: |options| neighborhood::<1>(options, 257),
            runner: run_qkv,
        },
        Entry {
            name: <Neighborhood<2> as Pattern>::NAME,
            family: Family::Sparse,
            summary: "A window of an image, moved inwards at the borders (Hassani et al. 2023)",
            options: &[
                OptionSpec {
                    name: "kernel_size",
                    default: "13",
                    help: "keys of the window along each axis, one for all or by commas",
                },
                DILATION,
                STRIDE,
                CAUSAL,
                GRID,
                OptionSpec::SCALE,
            ],
            constructor: |options| neighborhood::<2>(options, 13),
            runner: run_qkv,
        },
        Entry {
            name: <Neighborhood<3> as Pattern>::NAME,
            family: Family::Sparse,
            summary: "A window of a video, moved inwards at the borders (Hassani et al. 2023)",
            options: &[
                OptionSpec {
                    name: "kernel_size",
                    default: "7",
                    help: "keys of the window along each axis, one for all or by commas",
                },
                DILATION,
                STRIDE,
                CAUSAL,
                GRID,
                OptionSpec::SCALE,
            ],
            constructor: |options| neighborhood::<3>(options, 7),
            runner: run_qkv,
        },
    ]
}

fn neighborhood<const D: usize>(options: &Options, kernel_size: usize) -> Result<Box<dyn Attention>> {
    let kernels: [usize; D] = lengths(options, "kernel_size", kernel_size)?;
    let (dilations, strides): ([usize; D], [usize; D]) =
        (lengths(options, "dilation", 1)?, lengths(options, "stride", 1)?);
    let causal: [bool; D] = per_axis(options, "causal", false)?;
    if let Some(a) = (0..D).find(|a| strides[*a] > kernels[*a]) {
        let expected = format!("at most the kernel size, {}", kernels[a]);
        return Err(AttnError::value("option `stride`", strides[a], expected));
    }
    let axis = |a: usize| AxisWindow {
        kernel_size: kernels[a],
        dilation: dilations[a],
        stride: strides[a],
        causal: causal[a],
    };
    build_parted(options, Neighborhood { axes: std::array::from_fn(axis), grid: grid::<D>(options)? })
}

fn axial<const D: usize>(options: &Options) -> Result<Box<dyn Attention>> {
    let axis = options.get("axis")?;
    if let Some(axis) = axis.filter(|axis| *axis >= D) {
        return Err(AttnError::value("option `axis`", axis, format!("below the {D} axes")));
    }
    let causal = options.get_or("causal", false)?;
    build_parted(options, Axial { grid: grid::<D>(options)?, axis, causal })
}

/// The lengths of the axes, if they are given.
pub(super) fn grid<const D: usize>(options: &Options) -> Result<Option<[usize; D]>> {
    let sizes = list::<usize>(options, GRID.name)?;
    if sizes.is_empty() {
        return Ok(None);
    }
    let found = format!("{sizes:?}");
    match <[usize; D]>::try_from(sizes) {
        Ok(sizes) if !sizes.contains(&0) => Ok(Some(sizes)),
        _ => Err(AttnError::value("option `grid`", found, format!("{D} lengths of at least 1"))),
    }
}
