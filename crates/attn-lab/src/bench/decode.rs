//! One token at a time, appended to a stream that already holds `n_kv` positions.

use super::{Case, Measured};
use crate::measure::Times;
use crate::{Result, gauss, memory};
use attn_core::registry::output_like;
use attn_core::{Attention, AttnError, AttnShape, StreamShape};
use std::time::Instant;

pub(super) fn measure(attention: &dyn Attention, case: &Case) -> Result<Measured> {
    let streaming = attention.as_streaming().ok_or_else(|| {
        AttnError::unsupported(case.variant.clone(), "decode with these options: it cannot stream")
    })?;
    let prompt_shape = AttnShape { n_q: case.shape.n_kv, ..case.shape };
    let prompt = gauss::qkv(&prompt_shape, case.dtype, case.seed);
    let token_shape = AttnShape { n_q: 1, n_kv: 1, ..case.shape };
    let token = gauss::qkv(&token_shape, case.dtype, case.seed.wrapping_add(1));
    let (prompt, token) = (prompt.qkv()?, token.qkv()?);
    let mut state = streaming.start(StreamShape::of(&token))?;
    if prompt_shape.n_q > 0 {
        state.append(prompt, output_like(&prompt).as_out()?)?;
    }
    let mut out = output_like(&token);
    state.append(token, out.as_out()?)?; // warm-up
    // The stream grows while it is timed: by at most a sixteenth, so that its length still means something.
    let most = (case.shape.n_kv / 16).clamp(16, 4096);
    let mut times = Times::new();
    let (outcome, extra_bytes) = memory::extra_bytes(|| -> Result<()> {
        while times.runs() < most && !times.is_done(&case.policy) {
            let from = Instant::now();
            state.append(token, out.as_out()?)?;
            times.push(from.elapsed());
        }
        Ok(())
    });
    outcome?;
    let step = AttnShape { n_q: 1, n_kv: case.shape.n_kv + 1, ..case.shape };
    Ok(Measured { times, extra_bytes, cost: attention.cost(&step, case.dtype), tokens: case.shape.batch })
}
