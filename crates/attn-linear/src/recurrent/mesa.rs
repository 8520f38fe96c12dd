//! MesaNet: regression at every token.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, UNIT_SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Part, Plan, Pull, Reads, Recurrence, Sizes, StateVariant, Tokens, Width,
    copy, copy_or,
};
use attn_core::Result;
use attn_core::registry::OptionSpec;

/// MesaNet: the least-squares fit of the values so far, solved at every token:
///
/// ```text
/// H_t = e^g_t H_(t-1) + beta_t k_t k_t^T          G_t = e^g_t G_(t-1) + beta_t k_t v_t^T
/// o_t = scale G_t^T x_t          (H_t + diag(lambda)) x_t = q_t
/// ```
///
/// The solve is by conjugate gradients to the precision of f32, for all tokens of a chunk together; by Cholesky where these do
/// not arrive, and for gradients. Extra inputs: `beta`, `log_decay [batch, heads,
/// tokens]`, `lambda [heads, head_dim]`, above 0.
///
/// Source: von Oswald et al. 2025 (MesaNet), equations 4 to 6.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MesaNet {
    /// Multiplies the output.
    pub scale: f32,
    /// The write strength where none is given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// The regulariser where none is given; above 0.
    pub lambda: f32,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// Tokens handled at once.
    pub chunk_len: usize,
}

impl StateVariant for MesaNet {
    const NAME: &'static str = "mesanet";
    const EXTRAS: &'static [Extra] =
        &[Extra::scalar("beta"), Extra::scalar("log_decay"), Extra::head("lambda", Width::Key)];
    const SUMMARY: &'static str =
        "MesaNet: the least-squares fit of the past, solved exactly (von Oswald et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        front::QK_NORM,
        BETA,
        LOG_DECAY,
        OptionSpec { name: "lambda", default: "1", help: "regulariser, where no tensor gives it; above 0" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let lambda = front::finite(options, "lambda", 1.0)?;
        if lambda <= 0.0 {
            return Err(attn_core::AttnError::value("option `lambda`", lambda, "above 0"));
        }
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            lambda,
            qk_norm: options.get_or("qk_norm", true)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let (keys, values) = (sizes.head_dim, sizes.head_dim_v);
        let o = Options::new(Self::NAME, keys, keys + values);
        let o = Options { recurrence: Some(Recurrence::Regression), ..o };
        let plan =
            Plan::new(Options { decay: Decay::Scalar, scale: self.scale, chunk_len: self.chunk_len, ..o });
        let whole = |initial, after| Part::matrix(initial, after, 0, keys, keys + values);
        let parts = vec![
            whole("hkk0", "hkkT").columns(0, keys, keys + values),
            whole("hkv0", "hkvT").columns(keys, values, keys + values),
        ];
        Ok(Plan { parts, ..plan })
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        let (keys, values) = (x.k.width(), x.v.width());
        copy(x.q, &mut chunk.q);
        copy(x.k, &mut chunk.k);
        if self.qk_norm {
            front::normalise(&mut chunk.q, keys, 1e-6);
            front::normalise(&mut chunk.k, keys, 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        for (i, row) in chunk.v.chunks_exact_mut(keys + values).enumerate() {
            let k = &mut chunk.k[i * keys..][..keys];
            row[..keys].copy_from_slice(k);
            row[keys..].copy_from_slice(x.v.row(i));
            let beta = x.number("beta", i, self.beta);
            k.iter_mut().for_each(|k| *k *= beta);
        }
        chunk.bonus.resize(keys, 0.0);
        let lambda = x.extra("lambda").filter(|_| !x.is_empty());
        copy_or(lambda.map(|rows| rows.slice(0..1)), self.lambda, &mut chunk.bonus);
    }

    const FINISHES: bool = true;

    fn finish(&self, x: &Tokens<'_>, _: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        let (keys, values) = (x.k.width(), x.v.width());
        let rows = out.chunks_exact_mut(values).zip(reads.rows.chunks_exact(keys + values));
        rows.for_each(|(out, read)| {
            out.iter_mut().zip(&read[keys..]).for_each(|(o, x)| *o = reads.scale * x)
        });
    }

    const DIFFERENTIABLE: bool = true;

    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        _: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        [d_rows, _]: [&mut [f32]; 2],
        _: &mut Pull<'_>,
    ) {
        let (keys, values) = (x.k.width(), x.v.width());
        let rows = d_rows.chunks_exact_mut(keys + values).zip(d_out.chunks_exact(values));
        rows.for_each(|(d_row, d)| d_row[keys..].iter_mut().zip(d).for_each(|(to, d)| *to = reads.scale * d));
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let (keys, values) = (x.k.width(), x.v.width());
        to.q.copy_from_slice(&grads.q);
        pull::decays(grads, to);
        let mut made = Vec::with_capacity(chunk.k.len());
        let rows = chunk.v.chunks_exact(keys + values).zip(grads.v.chunks_exact(keys + values));
        for (i, (row, d_row)) in rows.enumerate() {
            let (k, by_key) = (&row[..keys], &grads.k[i * keys..][..keys]);
            let beta = x.number("beta", i, self.beta);
            let d_k = to.k[i * keys..][..keys].iter_mut().zip(d_row).zip(by_key);
            d_k.for_each(|((d, by_row), by_key)| *d = by_row + beta * by_key);
            to.v[i * values..][..values].copy_from_slice(&d_row[keys..]);
            to.add("beta", i, k.iter().zip(by_key).map(|(k, d)| k * d).sum());
            made.extend_from_slice(k);
        }
        if self.qk_norm {
            pull::normalised(x.q, &chunk.q, 1e-6, to.q);
            pull::normalised(x.k, &made, 1e-6, to.k);
        }
        // One row for all tokens: the first one's gradient is that of the chunk.
        if let Some(d) = to.extra("lambda") {
            d[..keys].copy_from_slice(&grads.bonus);
        }
    }

    fn max_error(&self) -> f64 {
        1e-4
    }
}
