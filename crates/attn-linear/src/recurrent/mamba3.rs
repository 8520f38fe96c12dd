//! Mamba-3 with a single input and output: the trapezoidal rule, on keys and queries that turn.

use super::front::{self, CAUSAL, CHUNK, UNIT_SCALE, sigmoid};
use crate::CHUNK_LEN;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Plan, Pull, Reads, Sizes, StateVariant, Tokens, Width,
};
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

impl Mamba3 {
    /// Moves the angles on by token `i`.
    fn move_angles(&self, x: &Tokens<'_>, i: usize, angles: &mut [f32]) {
        let Some(theta) = x.extra("theta") else { return };
        let dt = x.number("dt", i, self.dt);
        for (angle, theta) in angles.iter_mut().zip(theta.row(i)) {
            *angle += PI * theta.tanh() * dt;
            *angle = if angle.abs() > TURNS { *angle % TAU } else { *angle };
        }
    }

    /// The angles of all tokens, after the carried ones.
    fn angles(&self, x: &Tokens<'_>, carry: &[f32]) -> Vec<f32> {
        let mut angles = carry[x.k.width() + x.v.width()..].to_vec();
        let mut all = Vec::with_capacity(x.len() * angles.len());
        for i in 0..x.len() {
            self.move_angles(x, i, &mut angles);
            all.extend_from_slice(&angles);
        }
        all
    }

    /// The carried key and those of all tokens, turned.
    fn turned_keys(&self, x: &Tokens<'_>, carry: &[f32]) -> Vec<f32> {
        let key_dim = x.k.width();
        let mut angles = carry[key_dim + x.v.width()..].to_vec();
        let mut all = carry[..key_dim].to_vec();
        all.resize((x.len() + 1) * key_dim, 0.0);
        for (i, out) in all.chunks_exact_mut(key_dim).skip(1).enumerate() {
            self.move_angles(x, i, &mut angles);
            turn(x.k.row(i), x.extra("k_bias").map(|rows| rows.row(i)), &angles, out);
        }
        all
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
            self.move_angles(x, i, angles);
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

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        let pairs = x.extra("theta").map_or(0, |theta| theta.width());
        let (keys, values) = (2 * key_dim, 2 * value_dim);
        let (turned, angles) = (self.turned_keys(x, to.carry), self.angles(x, to.carry));
        // Of the key, value and angle that the next token takes over.
        let mut d_k: Vec<f32> = to.d_carry[..key_dim].to_vec();
        let mut d_v: Vec<f32> = to.d_carry[key_dim..][..value_dim].to_vec();
        let mut d_angles: Vec<f32> = to.d_carry[key_dim + value_dim..].to_vec();
        for i in (0..x.len()).rev() {
            let (dt, a) = (x.number("dt", i, self.dt), x.number("a", i, self.a));
            let lambda = sigmoid(x.number("trap", i, self.trap));
            let fade = (a * dt).exp();
            let (before, own) = grads.k[i * keys..][..keys].split_at(key_dim);
            let k_before = &turned[i * key_dim..][..key_dim];
            let k_own = &turned[(i + 1) * key_dim..][..key_dim];
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
            let (d_earlier, d_later) = (dot(before, k_before), dot(own, k_own));
            // Of the own key and value, turned; then those of the token before.
            d_k.iter_mut().zip(own).for_each(|(d, own)| *d += dt * lambda * own);
            let (v_before, v_own) = grads.v[i * values..][..values].split_at(value_dim);
            let d = x.number("d", i, 0.0);
            let d_out = &d_out[i * value_dim..][..value_dim];
            let d_value = to.v[i * value_dim..][..value_dim].iter_mut().zip(&d_v).zip(v_own).zip(d_out);
            d_value.for_each(|(((to, later), own), d_out)| *to = later + own + d * d_out);
            d_v.copy_from_slice(v_before);
            to.add("d", i, dot(d_out, x.v.row(i)));

            let (q, k) = (&chunk.q[i * key_dim..][..key_dim], k_own);
            let d_q = &grads.q[i * key_dim..][..key_dim];
            for (c, d_angle) in d_angles.iter_mut().enumerate() {
                let (x, y) = (2 * c, 2 * c + 1);
                *d_angle += q[x] * d_q[y] - q[y] * d_q[x] + k[x] * d_k[y] - k[y] * d_k[x];
            }
            let back: Vec<f32> = angles[i * pairs..][..pairs].iter().map(|angle| -angle).collect();
            let (mut q_back, mut k_back) = (vec![0.0; key_dim], vec![0.0; key_dim]);
            turn(d_q, None, &back, &mut q_back);
            turn(&d_k, None, &back, &mut k_back);
            to.q[i * key_dim..][..key_dim].copy_from_slice(&q_back);
            to.k[i * key_dim..][..key_dim].copy_from_slice(&k_back);
            for (name, d) in [("q_bias", &q_back), ("k_bias", &k_back)] {
                if let Some(rows) = to.extra(name) {
                    rows[i * key_dim..][..key_dim].copy_from_slice(d);
                }
            }
            d_k.iter_mut().zip(before).for_each(|(out, d)| *out = dt * (1.0 - lambda) * fade * d);

            let d_g = grads.log_decay[2 * i] + dt * (1.0 - lambda) * fade * d_earlier;
            let mut d_dt = (1.0 - lambda) * fade * d_earlier + lambda * d_later + a * d_g;
            if let Some(theta) = x.extra("theta") {
                for (c, (theta, d_angle)) in theta.row(i).iter().zip(&d_angles).enumerate() {
                    let speed = theta.tanh();
                    to.add("theta", i * pairs + c, PI * (1.0 - speed * speed) * dt * d_angle);
                    d_dt += PI * speed * d_angle;
                }
            }
            to.add("dt", i, d_dt);
            to.add("a", i, dt * d_g);
            to.add("trap", i, lambda * (1.0 - lambda) * dt * (d_later - fade * d_earlier));
        }
        to.d_carry[..key_dim].copy_from_slice(&d_k);
        to.d_carry[key_dim..][..value_dim].copy_from_slice(&d_v);
        to.d_carry[key_dim + value_dim..].copy_from_slice(&d_angles);
    }
}
