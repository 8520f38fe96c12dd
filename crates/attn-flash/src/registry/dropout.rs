//! Dropout from options and the tensor `keep`.

use attn_core::dropout::Dropout;
use attn_core::registry::{NamedTensors, Options};
use attn_core::{AttnError, AttnShape, Result};

/// The tensor `keep`, which the dropout borrows.
pub(super) type Keep<'a> = Option<(&'a [usize], Vec<bool>)>;

/// The tensor `keep`: booleans as u8, true = keep, broadcast like `mask`.
pub(super) fn keep(tensors: &NamedTensors) -> Result<Keep<'_>> {
    tensors.booleans("keep")
}

/// The options `dropout_p` and `seed`; with `keep`, that decides instead of random numbers.
pub(super) fn dropout<'a>(
    options: &Options,
    keep: &'a Keep<'_>,
    shape: &AttnShape,
) -> Result<Option<Dropout<'a>>> {
    let p = options.get::<f32>("dropout_p")?;
    let seed = options.get_or::<u64>("seed", 0)?;
    match (p, keep) {
        (None, None) => Ok(None),
        (Some(p), None) => Dropout::new(p, seed).map(Some),
        (Some(p), Some((axes, keep))) => Dropout::keep_mask(p, keep, axes, shape).map(Some),
        (None, Some(_)) => {
            Err(AttnError::value("option `dropout_p`", "absent", "a probability beside the tensor `keep`"))
        }
    }
}
