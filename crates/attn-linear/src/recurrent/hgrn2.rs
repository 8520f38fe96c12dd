//! HGRN2: the forget gate is the key.

use super::front::{self, CAUSAL, FINE_CHUNK, SCALE, log_sigmoid, sigmoid};
use super::pull;
use crate::matrix_state::{Chunk, Decay, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, copy};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result, softmax_scale_or_default};

/// With the raw forget gates in the place of the keys and a lower bound `lb`:
///
/// ```text
/// f = lb + (1 - lb) sigmoid(k)          S_t = diag(f) S_(t-1) + (1 - f) v_t^T          o_t = scale q_t^T S_t
/// ```
///
/// Source: Qin et al. 2024 (HGRN2: Gated Linear RNNs with State Expansion).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hgrn2 {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Gates are at least this; in `[0, 1)`.
    pub lower_bound: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Hgrn2 {
    const NAME: &'static str = "hgrn2";
    const EXTRAS: &'static [Extra] = &[];
    const SUMMARY: &'static str = "HGRN2: keys are what the forget gates leave (Qin et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        SCALE,
        OptionSpec { name: "lower_bound", default: "0", help: "the least a forget gate can be, in [0, 1)" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let lower_bound = front::finite(options, "lower_bound", 0.0)?;
        if !(0.0..1.0).contains(&lower_bound) {
            return Err(AttnError::value("option `lower_bound`", lower_bound, "in [0, 1)"));
        }
        let chunk_len = front::chunk_len(options, front::FINE_CHUNK_LEN)?;
        Ok(Self { scale: front::scale(options)?, lower_bound, chunk_len })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Key, scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        copy(x.k, &mut chunk.log_decay);
        let lb = self.lower_bound;
        for (k, g) in chunk.k.iter_mut().zip(&mut chunk.log_decay) {
            let raw = *k;
            *k = (1.0 - lb) * sigmoid(-raw);
            *g = if lb == 0.0 { log_sigmoid(raw) } else { (lb + (1.0 - lb) * sigmoid(raw)).ln() };
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        let open = 1.0 - self.lower_bound;
        let rows = x.k.iter().flatten().zip(to.k.iter_mut()).zip(&grads.log_decay);
        // f = lb + (1 - lb) sigmoid: dk = -f', dg = f' / f, where 1/f times a vanishing f' is 1 - sigmoid without a bound.
        rows.for_each(|((raw, d), dg)| {
            let gate = self.lower_bound + open * sigmoid(*raw);
            let by_gate =
                if self.lower_bound == 0.0 { sigmoid(-raw) } else { open * pull::sigmoid_slope(*raw) / gate };
            *d = dg * by_gate - *d * open * pull::sigmoid_slope(*raw);
        });
    }
}
