//! Mamba-3 with a single input and output: the trapezoidal rule, on keys and queries that turn.

use super::front::{self, CAUSAL, CHUNK, UNIT_SCALE, sigmoid};
use crate::CHUNK_LEN;
use crate::matrix_state::{Chunk, Decay, Extra, Options, Plan, Sizes, StateVariant, Tokens, Width};
use attn_core::Result;
use attn_core::registry::OptionSpec;
use std::f32::consts::{PI, TAU};

/// An angle is turned back by whole turns once it has grown beyond this; up to here it is exact to `2^-16`.
const TURNS: f32 = 40.0 * TAU;

/// With `q = C`, `k = B` (normalised before), `v = x`, `alpha = e^(A dt)`, `lambda = sigmoid(trap)`, and the pairs
/// `(2i, 2i + 1)` of `q + q_bias` and `k + k_bias` turned by the running sum of `pi tanh(theta) dt`:
///
/// ```text
/// S_t = alpha S_(t-1) + alpha dt (1 - lambda) k_(t-1) v_(t-1)^T + dt lambda k_t v_t^T          o_t = scale q_t^T S_t + D v_t
/// ```
///
/// Two writes a token; the last key and value and the angle are part of the memory.
///
/// Extra inputs: `a`, `dt`, `trap [batch, heads, tokens]`, `theta [batch, heads, tokens, pairs]`, `q_bias`, `k_bias
/// [heads, head_dim]`, `d [heads]`.
///
/// Source: Lahoti et al. 2026 (Mamba-3); the form with several inputs and outputs is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mamba3 {
    /// Multiplies the read.
    pub scale: f32,
    /// `A` where none is given.
    pub a: f32,
    /// `dt` where none is given.
    pub dt: f32,
    /// `trap` where none is given.
    pub trap: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

/// `row + bias`, its first pairs turned by `angles`.
fn turn(row: &[f32], bias: Option<&[f32]>, angles: &[f32], out: &mut [f32]) {
    out.copy_from_slice(row);
    if let Some(bias) = bias {
        out.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
    for (pair, angle) in out.chunks_exact_mut(2).zip(angles) {
        let (sin, cos) = angle.sin_cos();
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
    }
}

impl StateVariant for Mamba3 {
    const NAME: &'static str = "mamba3";
    const EXTRAS: &'static [Extra] = &[
        Extra::scalar("a"),
        Extra::scalar("dt"),
        Extra::scalar("trap"),
        Extra::rows("theta", Width::Any),
        Extra::head("q_bias", Width::Key),
        Extra::head("k_bias", Width::Key),
        Extra::head("d", Width::One),
    ];
    const SUMMARY: &'static str = "Mamba-3 (SISO): trapezoidal writes, turning keys (Lahoti et al. 2026)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        OptionSpec { name: "a", default: "-1", help: "A, where no tensor gives it; below 0" },
        OptionSpec { name: "dt", default: "0.05", help: "dt, where no tensor gives it" },
        OptionSpec {
            name: "trap",
            default: "0",
            help: "trapezoid before its sigmoid, where no tensor gives it",
        },
        CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            a: front::finite(options, "a", -1.0)?,
            dt: front::finite(options, "dt", 0.05)?,
            trap: front::finite(options, "trap", 0.0)?,
            chunk_len: front::chunk_len(options, CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let pairs = sizes.width("theta").unwrap_or(0);
        if 2 * pairs > sizes.head_dim {
            let expected = format!("at most half of head_dim {}", sizes.head_dim);
            return Err(attn_core::AttnError::shape("theta", "pairs", pairs, expected));
        }
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let (decay, writes, chunk_len) = (Decay::Scalar, 2, self.chunk_len);
        let plan = Plan::new(Options { decay, writes, scale: self.scale, chunk_len, ..o })
            .carrying("k_before", "kT", sizes.head_dim, 0.0)
            .carrying("v_before", "vT", sizes.head_dim_v, 0.0);
        Ok(if pairs > 0 { plan.carrying("angle0", "angleT", pairs, 0.0) } else { plan })
    }

    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        let (k_before, carry) = carry.split_at_mut(key_dim);
        let (v_before, angles) = carry.split_at_mut(value_dim);
        let bias = |name: &str, i: usize| x.extra(name).map(|rows| rows.row(i));
        for i in 0..x.len() {
            let dt = x.number("dt", i, self.dt);
            let g = x.number("a", i, self.a) * dt;
            let lambda = sigmoid(x.number("trap", i, self.trap));
            if let Some(theta) = x.extra("theta") {
                for (angle, theta) in angles.iter_mut().zip(theta.row(i)) {
                    *angle += PI * theta.tanh() * dt;
                    *angle = if angle.abs() > TURNS { *angle % TAU } else { *angle };
                }
            }
            turn(x.q.row(i), bias("q_bias", i), angles, &mut chunk.q[i * key_dim..][..key_dim]);
            let (before, own) = chunk.k[2 * i * key_dim..][..2 * key_dim].split_at_mut(key_dim);
            turn(x.k.row(i), bias("k_bias", i), angles, own);
            before.iter_mut().zip(&*k_before).for_each(|(out, k)| *out = dt * (1.0 - lambda) * g.exp() * k);
            k_before.copy_from_slice(own);
            own.iter_mut().for_each(|k| *k *= dt * lambda);
            let (before, own) = chunk.v[2 * i * value_dim..][..2 * value_dim].split_at_mut(value_dim);
            before.copy_from_slice(v_before);
            own.copy_from_slice(x.v.row(i));
            v_before.copy_from_slice(own);
            chunk.log_decay[2 * i] = g;
            chunk.log_decay[2 * i + 1] = 0.0;
        }
    }

    fn finish(&self, x: &Tokens<'_>, _: &Chunk, reads: &[f32], out: &mut [f32]) {
        out.copy_from_slice(reads);
        if let Some(d) = x.extra("d") {
            for (i, out) in out.chunks_exact_mut(x.v.width()).enumerate() {
                out.iter_mut().zip(x.v.row(i)).for_each(|(o, v)| *o += d.row(i)[0] * v);
            }
        }
    }
}
