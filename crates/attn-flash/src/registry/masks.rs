//! Masks from tensors and options: all that are given must let a pair pass.

use super::by_sequence::BySequence;
use super::formula::FormulaMask;
use crate::Flash;
use crate::engine::Problem;
use attn_core::mask::{And, DenseMask, Documents, Mask, PrefixLm};
use attn_core::registry::{NamedTensors, Options};
use attn_core::{AttnError, Result};

/// Tensors that masks are made of; not for packed sequences, whose rows they could not name.
pub(super) const TENSORS: [&str; 3] = ["mask", "documents_q", "documents_kv"];

/// A dense mask's booleans, which the mask borrows.
pub(super) type Dense<'a> = Option<(&'a [usize], Vec<bool>)>;

/// The tensor `mask`.
pub(super) fn dense(tensors: &NamedTensors) -> Result<Dense<'_>> {
    tensors.booleans("mask")
}

/// What hides a pair besides the band of `flash`.
pub(super) fn masks<'a>(
    flash: &Flash,
    options: &Options,
    tensors: &'a NamedTensors,
    dense: &'a Dense<'_>,
    problem: &Problem<'_>,
) -> Result<impl Mask + use<'a>> {
    let shape = problem.shape();
    let dense = dense.as_ref().map(|(axes, seen)| DenseMask::new(seen, axes, &shape)).transpose()?;
    let documents = match (tensors.i32("documents_q")?, tensors.i32("documents_kv")?) {
        (None, None) => None,
        (Some((_, q)), Some((_, kv))) => Some(Documents::new(q, kv, &shape)?),
        (q, _) => {
            let (name, found) = match q {
                Some(_) => ("documents_kv", "documents_q"),
                None => ("documents_q", "documents_kv"),
            };
            return Err(AttnError::Missing { name: name.into(), found: found.into() });
        }
    };
    let prefix = match options.get::<usize>("prefix")? {
        Some(prefix) if prefix > shape.n_kv => {
            let expected = format!("at most n_kv = {}", shape.n_kv);
            return Err(AttnError::value("option `prefix`", prefix, expected));
        }
        Some(prefix) => Some(BySequence::new(problem, flash.align, |shape, _| {
            PrefixLm::new(vec![prefix.min(shape.n_kv)], shape, flash.align)
        })?),
        None => None,
    };
    let formula = options.get::<String>("mask_mod")?;
    let formula = formula.map(|text| FormulaMask::new("mask_mod", &text)).transpose()?;
    Ok(And(And(dense, documents), And(prefix, formula)))
}
