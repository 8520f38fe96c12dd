//! The linear family's names in the golden files, and ours.

use super::{Row, Rule};
use attn_core::Family;

mod kernel;
mod scan;
mod state;

const LINEAR: Row = Row {
    family: Family::Linear,
    variant: "",
    ours: "",
    set: &[],
    options: &[],
    remarks: &[],
    inputs: &[],
    given: &[],
};
const SCALE: &[(&str, Rule)] = &[("scale", Rule::As("scale"))];

/// All of them.
pub(super) fn tables() -> impl Iterator<Item = &'static Row> {
    [state::TABLE, scan::TABLE, kernel::TABLE].into_iter().flatten()
}
