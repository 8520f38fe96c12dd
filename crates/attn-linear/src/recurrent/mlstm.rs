//! mLSTM, the matrix memory of xLSTM: exponential input gates, stabilised by a running maximum.

use super::front::{self, CAUSAL, CHUNK, log_sigmoid, sigmoid};
use super::pull;
use crate::CHUNK_LEN;
use crate::matrix_state::{
    Chunk, Decay, Extra, Given, Options, Plan, Pull, Reads, Sizes, StateVariant, Tokens, copy,
};
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
/// `n` is the engine's norm. The memory is `C`, `n` and `m`, which is -inf
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
        let o = Options::new(Self::NAME, keys, values);
        let plan = Plan::new(Options { decay: Decay::Scalar, norm: true, chunk_len: self.chunk_len, ..o });
        Ok(plan.with_norm("n0", "nT").carrying("m0", "mT", 0, f32::NEG_INFINITY))
    }

    const GIVEN: Given = Given { q: true, k: false, v: true };

    fn fill(&self, x: &Tokens<'_>, m: &mut [f32], chunk: &mut Chunk) {
        copy(x.k, &mut chunk.k);
        let key_dim = x.k.width();
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
        }
    }

    const FINISHES: bool = true;

    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        let rows = out.chunks_exact_mut(x.v.width()).zip(reads.rows.chunks_exact(x.v.width()));
        for (((out, read), norm), m) in rows.zip(reads.norms).zip(&chunk.notes) {
            let divisor = norm.abs().max((-m).exp()) + self.eps;
            out.iter_mut().zip(read).for_each(|(o, x)| *o = x / divisor);
        }
    }

    const DIFFERENTIABLE: bool = true;

    /// Leaves the gradient of `m` through the floor `e^-m` of the divisor.
    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        chunk: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        [d_rows, d_norms]: [&mut [f32]; 2],
        to: &mut Pull<'_>,
    ) {
        let width = x.v.width();
        to.notes.resize(x.len(), 0.0);
        let rows = d_rows.chunks_exact_mut(width).zip(d_out.chunks_exact(width));
        for (i, ((d_row, d_out), row)) in rows.zip(reads.rows.chunks_exact(width)).enumerate() {
            let (norm, floor) = (reads.norms[i], (-chunk.notes[i]).exp());
            let divisor = norm.abs().max(floor) + self.eps;
            d_row.iter_mut().zip(d_out).for_each(|(d_row, d)| *d_row = d / divisor);
            let d_divisor = -row.iter().zip(&*d_row).map(|(x, d)| x * d).sum::<f32>() / divisor;
            if norm.abs() > floor {
                d_norms[i] = norm.signum() * d_divisor;
            } else if floor.is_finite() {
                to.notes[i] = -floor * d_divisor;
            }
        }
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        let key_dim = x.k.width();
        let scale = self.scale.unwrap_or((1.0 / (key_dim as f64).sqrt()) as f32);
        for i in (0..x.len()).rev() {
            let forget = x.number("forget_gate", i, self.forget_gate);
            let (input, m) = (x.number("input_gate", i, self.input_gate), chunk.notes[i]);
            let weight = if m == f32::NEG_INFINITY { 0.0 } else { scale * (input - m).exp() };
            let dk = &mut to.k[i * key_dim..][..key_dim];
            let d_input: f32 = weight * x.k.row(i).iter().zip(&*dk).map(|(k, d)| k * d).sum::<f32>();
            dk.iter_mut().for_each(|d| *d *= weight);
            // From nothing, nothing fades.
            let faded = if chunk.log_decay[i] == f32::NEG_INFINITY { 0.0 } else { grads.log_decay[i] };
            let d_m = to.d_carry[0] + to.notes[i] - faded - d_input;
            // The larger of the two is the new maximum.
            let stays = chunk.log_decay[i] == 0.0;
            let (d_faded, d_input) = if stays { (faded + d_m, d_input) } else { (faded, d_input + d_m) };
            to.d_carry[0] = d_faded;
            to.add("forget_gate", i, sigmoid(-forget) * d_faded);
            to.add("input_gate", i, d_input);
        }
    }
}
