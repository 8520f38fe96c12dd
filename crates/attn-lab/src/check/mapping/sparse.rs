//! The sparse family's names in the golden files, and ours.

use super::{Row, Rule};
use attn_core::Family;

mod chosen;
mod patterns;

const SPARSE: Row = Row {
    family: Family::Sparse,
    variant: "",
    ours: "",
    set: &[],
    options: &[],
    remarks: &[],
    inputs: &[],
    given: &[],
};

/// All of them.
pub(super) fn tables() -> impl Iterator<Item = &'static Row> {
    [patterns::TABLE, chosen::TABLE].into_iter().flatten()
}
