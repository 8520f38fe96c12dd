//! One call over all queries.

use super::{Case, Measured};
use crate::{Result, gauss, measure, memory};
use attn_core::Attention;
use attn_core::registry::output_like;

pub(super) fn measure(attention: &dyn Attention, case: &Case) -> Result<Measured> {
    let tensors = gauss::qkv(&case.shape, case.dtype, case.seed);
    let x = tensors.qkv()?;
    let mut out = output_like(&x);
    let call = || attention.forward(x, out.as_out()?);
    let (times, extra_bytes) = memory::extra_bytes(|| measure::repeat(&case.policy, call));
    Ok(Measured {
        times: times?,
        extra_bytes,
        cost: attention.cost(&case.shape, case.dtype),
        tokens: case.shape.batch * case.shape.n_q,
    })
}
