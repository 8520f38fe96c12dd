//! GateLoop: key channels that fade and turn.

use super::front::{self, CAUSAL, FINE_CHUNK, LOG_DECAY, UNIT_SCALE};
use crate::matrix_state::{Chunk, Decay, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width};
use attn_core::Result;
use attn_core::registry::OptionSpec;
use std::f32::consts::TAU;

/// With complex decays `e^(g + i theta)` of the key channels, the real part of
///
/// ```text
/// S_t = diag(e^(g_t + i theta_t)) S_(t-1) + k_t v_t^T          o_t = scale Re q_t^T S_t
/// ```
///
/// The engine sees twice the key channels: with the phase `P_t = theta_1 + .. + theta_t`, queries
/// `[q cos P, q sin P]`, keys `[k cos P, k sin P]` and decays `[g, g]`. The phase, kept in `(-2 pi, 2 pi)`, is part of the
/// memory; its matrix is the state turned back by it.
///
/// Extra inputs: `log_decay`, `theta [batch, heads, tokens, head_dim]`.
///
/// Source: Katsch 2023 (GateLoop: Fully Data-Controlled Linear Recurrence).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateLoop {
    /// Multiplies the output.
    pub scale: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// The angle a token turns, where none is given.
    pub theta: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for GateLoop {
    const NAME: &'static str = "gateloop";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("log_decay", Width::Key), Extra::rows("theta", Width::Key)];
    const SUMMARY: &'static str = "GateLoop: key channels fade and turn, a complex gate (Katsch 2023)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        LOG_DECAY,
        OptionSpec { name: "theta", default: "0.1", help: "angle a token turns, where no tensor gives it" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            log_decay: front::log_decay(options, -0.05)?,
            theta: front::finite(options, "theta", 0.1)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, 2 * sizes.head_dim, sizes.head_dim_v);
        let plan =
            Plan::new(Options { decay: Decay::Key, scale: self.scale, chunk_len: self.chunk_len, ..o });
        Ok(plan.carrying("phase0", "phaseT", sizes.head_dim, 0.0))
    }

    fn fill(&self, x: &Tokens<'_>, phase: &mut [f32], chunk: &mut Chunk) {
        let width = x.k.width();
        crate::matrix_state::copy(x.v, &mut chunk.v);
        let (theta, g) = (x.extra("theta"), x.extra("log_decay"));
        for i in 0..x.len() {
            let wide = i * 2 * width..(i + 1) * 2 * width;
            let (q, k) = (&mut chunk.q[wide.clone()], &mut chunk.k[wide.clone()]);
            let decays = &mut chunk.log_decay[wide];
            for c in 0..width {
                phase[c] = (phase[c] + theta.map_or(self.theta, |rows| rows.row(i)[c])) % TAU;
                let (sin, cos) = phase[c].sin_cos();
                (q[c], q[c + width]) = (x.q.row(i)[c] * cos, x.q.row(i)[c] * sin);
                (k[c], k[c + width]) = (x.k.row(i)[c] * cos, x.k.row(i)[c] * sin);
                decays[c] = g.map_or(self.log_decay, |rows| rows.row(i)[c]);
                decays[c + width] = decays[c];
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let width = x.k.width();
        to.v.copy_from_slice(&grads.v);
        let theta = x.extra("theta");
        let mut phases = Vec::with_capacity(x.len() * width);
        let mut phase = to.carry.to_vec();
        for i in 0..x.len() {
            for (c, phase) in phase.iter_mut().enumerate() {
                *phase = (*phase + theta.map_or(self.theta, |rows| rows.row(i)[c])) % TAU;
            }
            phases.extend_from_slice(&phase);
        }
        for i in (0..x.len()).rev() {
            for c in 0..width {
                let (own, even) = (i * width + c, i * 2 * width + c);
                let odd = even + width;
                let (sin, cos) = phases[own].sin_cos();
                let along = |d: &[f32]| (cos * d[even] + sin * d[odd], cos * d[odd] - sin * d[even]);
                let ((dq, q_turn), (dk, k_turn)) = (along(&grads.q), along(&grads.k));
                (to.q[own], to.k[own]) = (dq, dk);
                to.d_carry[c] += x.q.row(i)[c] * q_turn + x.k.row(i)[c] * k_turn;
                let turned = to.d_carry[c];
                to.add("theta", own, turned);
                to.add("log_decay", own, grads.log_decay[even] + grads.log_decay[odd]);
            }
        }
    }
}
