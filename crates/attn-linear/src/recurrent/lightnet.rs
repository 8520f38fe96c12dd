//! LightNet: a softmax over the past as gates.

use super::front::{self, CAUSAL, FINE_CHUNK, SCALE};
use super::pull;
use crate::matrix_state::{Chunk, Decay, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// `ln(e^a + e^b)`; -inf where both are.
fn log_add(a: f32, b: f32) -> f32 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if high == f32::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// One token of the logits `x`: with `z' = ln(e^z + e^x)`, gives the decay `z - z'` and the share `e^(x - z')`, and moves `z`.
pub(crate) fn absorb(x: f32, z: &mut f32) -> (f32, f32) {
    let before = std::mem::replace(z, log_add(*z, x));
    if *z == f32::NEG_INFINITY { (0.0, 0.0) } else { (before - *z, (x - *z).exp()) }
}

/// [`absorb`] backwards, from what it gave, `(g, share)`, and the gradients of these: moves that of `z`, gives that of `x`.
pub(crate) fn pull_absorb((g, share): (f32, f32), (d_g, d_share): (f32, f32), d_z: &mut f32) -> f32 {
    let d_after = *d_z - d_g - d_share * share;
    *d_z = d_g + d_after * g.exp();
    (d_share + d_after) * share
}

/// With `z_t = logcumsumexp(k)_t` in every key channel:
///
/// ```text
/// S_t = diag(e^(z_(t-1) - z_t)) S_(t-1) + e^(k_t - z_t) v_t^T          o_t = scale q_t^T S_t
/// ```
///
/// Every row of the state is a softmax average of the values so far. `z` is part of the memory.
///
/// Source: Qin et al. 2024 (You Only Scan Once: LightNet), equation 6.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LightNet {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for LightNet {
    const NAME: &'static str = "lightnet";
    const EXTRAS: &'static [Extra] = &[];
    const SUMMARY: &'static str =
        "LightNet: rows of the state are softmax averages of the past (Qin et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let chunk_len = front::chunk_len(options, front::FINE_CHUNK_LEN)?;
        Ok(Self { scale: front::scale(options)?, chunk_len })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let plan = Plan::new(Options { decay: Decay::Key, scale, chunk_len: self.chunk_len, ..o });
        Ok(plan.carrying("z0", "zT", sizes.head_dim, f32::NEG_INFINITY))
    }

    fn fill(&self, x: &Tokens<'_>, z: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        let width = x.k.width();
        let rows = chunk.k.chunks_exact_mut(width).zip(chunk.log_decay.chunks_exact_mut(width));
        for (k, g) in rows {
            for ((k, g), z) in k.iter_mut().zip(g).zip(&mut *z) {
                (*g, *k) = absorb(*k, z);
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        let width = x.k.width();
        for at in (0..x.len() * width).rev() {
            let (made, d) = ((chunk.log_decay[at], chunk.k[at]), (grads.log_decay[at], grads.k[at]));
            to.k[at] = pull_absorb(made, d, &mut to.d_carry[at % width]);
        }
    }
}
