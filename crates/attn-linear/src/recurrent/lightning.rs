//! Lightning attention: heads that fade at constant rates, geometric over the heads.

use super::front::{self, CAUSAL, CHUNK, UNIT_SCALE};
use super::pull;
use crate::CHUNK_LEN;
use crate::matrix_state::{
    Chunk, Decay, Extra, Given, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width,
};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result};

/// `S_t = e^-slope_h S_(t-1) + k_t v_t^T`, `o_t = scale q_t^T S_t`.
///
/// Extra input: `slope [heads]`. Where it is not given, head `h` of `H` in layer `l` of `L` has
/// `2^(-8 (h+1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)`. The activation before and the norm and gate after are the layer's.
///
/// Sources: Qin et al. 2024 (Lightning Attention-2); MiniMax 2025 (MiniMax-01).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lightning {
    /// Multiplies the output.
    pub scale: f32,
    /// Which layer, from 0.
    pub layer: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Lightning {
    /// The slope of a head where none is given.
    pub fn slope(&self, head: usize, heads: usize) -> f32 {
        let depth = self.layer as f64 / (self.layers as f64 - 1.0 + 1e-5);
        ((-8.0 * (head + 1) as f64 / heads as f64).exp2() * (1.0 - depth + 1e-5)) as f32
    }
}

impl StateVariant for Lightning {
    const NAME: &'static str = "lightning";
    const EXTRAS: &'static [Extra] = &[Extra::head("slope", Width::One)];
    const SUMMARY: &'static str = "Lightning attention: heads fade at constant rates (Qin et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        OptionSpec {
            name: "layer",
            default: "0",
            help: "which layer, for the slopes where no tensor gives them",
        },
        OptionSpec { name: "layers", default: "1", help: "layers of the model" },
        CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let (layer, layers) = (options.get_or("layer", 0)?, options.get_or("layers", 1)?);
        if layer >= layers {
            return Err(AttnError::value("option `layer`", layer, format!("below `layers`, {layers}")));
        }
        let chunk_len = front::chunk_len(options, CHUNK_LEN)?;
        Ok(Self { scale: front::finite(options, "scale", 1.0)?, layer, layers, chunk_len })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        Ok(Plan::new(Options { decay: Decay::Scalar, scale: self.scale, chunk_len: self.chunk_len, ..o }))
    }

    const GIVEN: Given = Given::QKV;

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        chunk.log_decay.fill(-x.number("slope", 0, self.slope(x.head, x.heads)));
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, _: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        grads.log_decay.iter().enumerate().for_each(|(i, g)| to.add("slope", i, -g));
    }
}
