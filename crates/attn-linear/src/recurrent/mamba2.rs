//! Mamba-2: a state-space layer as linear attention with a decay a token.

use super::front::{self, CAUSAL, CHUNK, UNIT_SCALE, softplus};
use super::pull;
use crate::CHUNK_LEN;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Plan, Pull, Reads, Sizes, StateVariant, Tokens, Width,
};
use attn_core::Result;
use attn_core::registry::OptionSpec;

/// With `q = C`, `k = B` (heads in groups) and `v = x`:
///
/// ```text
/// S_t = e^(A dt_t) S_(t-1) + k_t (dt_t v_t)^T          o_t = scale q_t^T S_t + D v_t
/// ```
///
/// Extra inputs: `dt [batch, heads, tokens]`, `a [heads]` (below 0), `d [heads]`, and `dt_bias [heads]`; with `softplus`,
/// `dt` becomes `softplus(dt + dt_bias)`. The convolution before and the gated norm after are the layer's.
///
/// Source: Dao and Gu 2024 (Transformers are SSMs).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mamba2 {
    /// Multiplies the read.
    pub scale: f32,
    /// `dt` is given before its softplus.
    pub softplus: bool,
    /// `A` where none is given.
    pub a: f32,
    /// `dt`, after any softplus, where none is given.
    pub dt: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Mamba2 {
    fn step(&self, x: &Tokens<'_>, i: usize) -> f32 {
        let Some(dt) = x.extra("dt") else { return self.dt };
        let dt = dt.row(i)[0] + x.number("dt_bias", i, 0.0);
        if self.softplus { softplus(dt) } else { dt }
    }
}

impl StateVariant for Mamba2 {
    const NAME: &'static str = "mamba2";
    const EXTRAS: &'static [Extra] = &[
        Extra::scalar("dt"),
        Extra::head("a", Width::One),
        Extra::head("d", Width::One),
        Extra::head("dt_bias", Width::One),
    ];
    const SUMMARY: &'static str = "Mamba-2 (SSD): a state space read as linear attention (Dao and Gu 2024)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        OptionSpec {
            name: "softplus",
            default: "false",
            help: "dt is given before its softplus (true|false)",
        },
        OptionSpec { name: "a", default: "-1", help: "A, where no tensor gives it; below 0" },
        OptionSpec { name: "dt", default: "0.05", help: "dt, where no tensor gives it" },
        CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            softplus: options.get_or("softplus", false)?,
            a: front::finite(options, "a", -1.0)?,
            dt: front::finite(options, "dt", 0.05)?,
            chunk_len: front::chunk_len(options, CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        Ok(Plan::new(Options { decay: Decay::Scalar, scale: self.scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        let rows = chunk.v.chunks_exact_mut(x.v.width()).zip(&mut chunk.log_decay);
        for (i, (v, log_decay)) in rows.enumerate() {
            let dt = self.step(x, i);
            *log_decay = x.number("a", i, self.a) * dt;
            v.iter_mut().for_each(|v| *v *= dt);
        }
    }

    const FINISHES: bool = true;

    fn finish(&self, x: &Tokens<'_>, _: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        out.iter_mut().zip(reads.rows).for_each(|(o, read)| *o = reads.scale * read);
        if let Some(d) = x.extra("d") {
            for (i, out) in out.chunks_exact_mut(x.v.width()).enumerate() {
                out.iter_mut().zip(x.v.row(i)).for_each(|(o, v)| *o += d.row(i)[0] * v);
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, _: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        let width = x.v.width();
        for i in 0..x.len() {
            let (dt, a, d) = (self.step(x, i), x.number("a", i, self.a), x.number("d", i, 0.0));
            let (v, d_out) = (x.v.row(i), &d_out[i * width..][..width]);
            let (dv, dg) = (&mut to.v[i * width..][..width], grads.log_decay[i]);
            let written: f32 = v.iter().zip(&*dv).map(|(v, dv)| v * dv).sum();
            let skipped: f32 = v.iter().zip(d_out).map(|(v, d)| v * d).sum();
            dv.iter_mut().zip(d_out).for_each(|(dv, d_out)| *dv = dt * *dv + d * d_out);
            let raw = x.number("dt", i, 0.0) + x.number("dt_bias", i, 0.0);
            let slope = if self.softplus { front::sigmoid(raw) } else { 1.0 };
            let d_dt = slope * (a * dg + written);
            to.add("dt", i, d_dt);
            to.add("dt_bias", i, d_dt);
            to.add("a", i, dt * dg);
            to.add("d", i, skipped);
        }
    }
}
