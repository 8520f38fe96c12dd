//! The sparse family's names in the golden files, and ours.

use super::{Row, Rule};
use attn_core::Family;
use attn_core::registry::{NamedTensor, TensorData};
use attn_testkit::golden::GoldenCase;

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

/// `tensor`, filled up with "none" (-1) where it lists indices `[batch, 1, ..]` of the first head of several: the
/// reference of `vertical-slash` finds distances for that head alone, and the others have none.
pub(super) fn for_all_heads(tensor: &NamedTensor, case: &GoldenCase) -> NamedTensor {
    let n_heads = case.inputs.get("q").and_then(|q| q.shape.get(1).copied()).unwrap_or(1);
    match (&tensor.data, tensor.shape.as_slice()) {
        (TensorData::I32(data), &[batch, 1, len]) if case.variant == "vertical-slash" => {
            let none = vec![-1; (n_heads.max(1) - 1) * len];
            let all = data.chunks(len.max(1)).flat_map(|first| [first, none.as_slice()].concat()).collect();
            NamedTensor { shape: vec![batch, n_heads.max(1), len], data: TensorData::I32(all) }
        }
        _ => tensor.clone(),
    }
}

/// All of them.
pub(super) fn tables() -> impl Iterator<Item = &'static Row> {
    [patterns::TABLE, chosen::TABLE].into_iter().flatten()
}
