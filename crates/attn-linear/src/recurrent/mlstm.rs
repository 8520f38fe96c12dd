//! mLSTM, the matrix memory of xLSTM: exponential input gates, stabilised by a running maximum.

use super::front::{self, CAUSAL, CHUNK, log_sigmoid};
use crate::CHUNK_LEN;
use crate::matrix_state::{Chunk, Decay, Extra, Options, Part, Plan, Sizes, StateVariant, Tokens, copy};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// With the raw gates `f`, `i` and the running maximum `m`:
///
/// ```text
/// m_t = max(logsig f + m_(t-1), i)          g = logsig f + m_(t-1) - m_t
/// C_t = e^g C_(t-1) + e^(i - m_t) (scale k) v^T          n_t = e^g n_(t-1) + e^(i - m_t) scale k
/// o_t = C_t^T q / (max(|n_t . q|, e^-m_t) + eps)
/// ```
///
/// `n` is a last column of the engine's matrix, written with the value 1. The memory is `C`, `n` and `m`, which is -inf
/// before the first token; the state they stand for is `C e^m`.
///
/// Extra inputs: `input_gate`, `forget_gate [batch, heads, tokens]`.
///
/// Source: Beck et al. 2024 (xLSTM), equations 19 to 27.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MLstm {
    /// Multiplies the keys; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Added to the divisor.
    pub eps: f32,
    /// The raw input gate where none is given.
    pub input_gate: f32,
    /// The raw forget gate where none is given.
    pub forget_gate: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for MLstm {
    const NAME: &'static str = "mlstm";
    const EXTRAS: &'static [Extra] = &[Extra::scalar("input_gate"), Extra::scalar("forget_gate")];
    const SUMMARY: &'static str = "mLSTM of xLSTM: exponential gates and a normaliser (Beck et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        OptionSpec { name: "scale", default: "", help: "multiplies the keys; default 1/sqrt(head_dim)" },
        OptionSpec { name: "eps", default: "1e-6", help: "added to the divisor" },
        OptionSpec { name: "input_gate", default: "0", help: "raw input gate, where no tensor gives it" },
        OptionSpec { name: "forget_gate", default: "3", help: "raw forget gate, where no tensor gives it" },
        CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            eps: front::finite(options, "eps", 1e-6)?,
            input_gate: front::finite(options, "input_gate", 0.0)?,
            forget_gate: front::finite(options, "forget_gate", 3.0)?,
            chunk_len: front::chunk_len(options, CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (keys, values) = (sizes.head_dim, sizes.head_dim_v);
        let o = Options::new(Self::NAME, keys, values + 1);
        let plan = Plan::new(Options { decay: Decay::Scalar, chunk_len: self.chunk_len, ..o });
        let matrix = |initial, after| Part::matrix(initial, after, 0, keys, values + 1);
        let c = matrix("initial_state", "sT").columns(0, values, values + 1);
        let n = matrix("n0", "nT").columns(values, 1, values + 1).as_row();
        Ok(Plan { parts: vec![c, n], ..plan }.carrying("m0", "mT", 0, f32::NEG_INFINITY))
    }

    fn fill(&self, x: &Tokens<'_>, m: &mut [f32], chunk: &mut Chunk) {
        copy(x.q, &mut chunk.q);
        copy(x.k, &mut chunk.k);
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        // Checked when the problem was planned.
        let scale = self.scale.unwrap_or((1.0 / (key_dim as f64).sqrt()) as f32);
        chunk.notes.resize(x.len(), 0.0);
        for i in 0..x.len() {
            let forget = log_sigmoid(x.number("forget_gate", i, self.forget_gate));
            let input = x.number("input_gate", i, self.input_gate);
            let faded = forget + m[0];
            m[0] = faded.max(input);
            chunk.notes[i] = m[0];
            // Without a past nothing fades; the difference of two infinities would say NaN.
            chunk.log_decay[i] = if m[0] == f32::NEG_INFINITY { 0.0 } else { faded - m[0] };
            let weight = if m[0] == f32::NEG_INFINITY { 0.0 } else { scale * (input - m[0]).exp() };
            chunk.k[i * key_dim..][..key_dim].iter_mut().for_each(|k| *k *= weight);
            let v = &mut chunk.v[i * (value_dim + 1)..][..value_dim + 1];
            v[..value_dim].copy_from_slice(x.v.row(i));
            v[value_dim] = 1.0;
        }
    }

    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: &[f32], out: &mut [f32]) {
        let value_dim = x.v.width();
        let rows = out.chunks_exact_mut(value_dim).zip(reads.chunks_exact(value_dim + 1));
        for ((out, read), m) in rows.zip(&chunk.notes) {
            let divisor = read[value_dim].abs().max((-m).exp()) + self.eps;
            out.iter_mut().zip(read).for_each(|(o, x)| *o = x / divisor);
        }
    }
}
