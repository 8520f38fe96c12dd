//! RoDimus: a gate and a temperature decide decay and key together.

use super::front::{self, CAUSAL, FINE_CHUNK, SCALE, sigmoid, softplus};
use super::pull;
use crate::matrix_state::{Chunk, Decay, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// With `G = softplus(gate_raw)` and `tau = sigmoid(temperature_raw)`:
///
/// ```text
/// S_t = diag(e^(-tau G)) S_(t-1) + (k / |k| o G^tau) v_t^T          o_t = scale q_t^T S_t
/// ```
///
/// Extra inputs: `gate_raw`, `temperature_raw [batch, heads, tokens, head_dim]`.
///
/// Source: He et al. 2025 (Rodimus*: Breaking the Accuracy-Efficiency Trade-Off with Efficient Attentions).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rodimus {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// `gate_raw` where none is given.
    pub gate_raw: f32,
    /// `temperature_raw` where none is given.
    pub temperature_raw: f32,
    /// Keys are divided by at least this.
    pub k_norm_eps: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Rodimus {
    const NAME: &'static str = "rodimus";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("gate_raw", Width::Key), Extra::rows("temperature_raw", Width::Key)];
    const SUMMARY: &'static str =
        "RoDimus: a tempered gate decides what fades and what is written (He et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        SCALE,
        OptionSpec {
            name: "gate_raw",
            default: "-2",
            help: "gate before softplus, where no tensor gives it",
        },
        OptionSpec {
            name: "temperature_raw",
            default: "0",
            help: "temperature before sigmoid, where no tensor gives it",
        },
        OptionSpec { name: "k_norm_eps", default: "1e-12", help: "keys are divided by at least this" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            gate_raw: front::finite(options, "gate_raw", -2.0)?,
            temperature_raw: front::finite(options, "temperature_raw", 0.0)?,
            k_norm_eps: front::finite(options, "k_norm_eps", 1e-12)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Key, scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        let width = x.k.width();
        let (gate, temperature) = (x.extra("gate_raw"), x.extra("temperature_raw"));
        let rows = chunk.k.chunks_exact_mut(width).zip(chunk.log_decay.chunks_exact_mut(width));
        for (i, (k, g)) in rows.enumerate() {
            let length = k.iter().map(|k| k * k).sum::<f32>().sqrt().max(self.k_norm_eps);
            for (c, (k, g)) in k.iter_mut().zip(g).enumerate() {
                let open = softplus(gate.map_or(self.gate_raw, |rows| rows.row(i)[c]));
                let tau = sigmoid(temperature.map_or(self.temperature_raw, |rows| rows.row(i)[c]));
                *g = -tau * open;
                *k *= open.powf(tau) / length;
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        let width = x.k.width();
        let (gates, temperatures) = (x.extra("gate_raw"), x.extra("temperature_raw"));
        for (i, k) in x.k.iter().enumerate() {
            let length = k.iter().map(|k| k * k).sum::<f32>().sqrt();
            let divisor = length.max(self.k_norm_eps);
            for c in 0..width {
                let at = i * width + c;
                let gate = gates.map_or(self.gate_raw, |rows| rows.row(i)[c]);
                let open = softplus(gate);
                let tau = sigmoid(temperatures.map_or(self.temperature_raw, |rows| rows.row(i)[c]));
                let (dk, dg) = (grads.k[at] * chunk.k[at], grads.log_decay[at]);
                // A gate that is all but shut is its own slope.
                let relative = if open > 0.0 { sigmoid(gate) / open } else { 1.0 };
                to.add("gate_raw", at, tau * (dk * relative - dg * sigmoid(gate)));
                let log_open = if open > 0.0 { open.ln() } else { gate };
                to.add("temperature_raw", at, tau * (1.0 - tau) * (dk * log_open - open * dg));
                // Of the key divided by its length.
                to.k[at] = grads.k[at] * open.powf(tau) / divisor;
            }
            if length > self.k_norm_eps {
                let d = &mut to.k[i * width..][..width];
                let along = k.iter().zip(&*d).map(|(k, d)| k * d).sum::<f32>() / (length * length);
                d.iter_mut().zip(k).for_each(|(d, k)| *d -= along * k);
            }
        }
    }
}
