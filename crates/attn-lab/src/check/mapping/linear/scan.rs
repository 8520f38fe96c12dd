//! Variants of the scan engine.

use super::super::{Row, Rule};
use super::LINEAR;

pub(super) const TABLE: &[Row] = &[
    Row { variant: "hgrn", ours: "hgrn", remarks: &["layout"], ..LINEAR },
    Row {
        variant: "mamba1",
        ours: "mamba1",
        options: &[("dt_softplus", Rule::Only("true"))],
        remarks: &["layout"],
        ..LINEAR
    },
    Row {
        variant: "longhorn",
        ours: "longhorn",
        options: &[("scale", Rule::Only("1.0"))],
        remarks: &["gate"],
        ..LINEAR
    },
    Row { variant: "rwkv4", ours: "rwkv4", remarks: &["decay", "layout"], ..LINEAR },
    Row {
        variant: "rglru",
        ours: "rglru",
        options: &[("c", Rule::Only("8.0"))],
        remarks: &["layout", "reset"],
        ..LINEAR
    },
    Row {
        variant: "aft",
        ours: "aft-simple",
        options: &[
            ("causal", Rule::As("causal")),
            ("kind", Rule::Kinds(&[("simple", "aft-simple"), ("full", "aft-full"), ("local", "aft-local")])),
            ("window", Rule::As("window")),
        ],
        remarks: &["layout"],
        ..LINEAR
    },
];
