//! Rotary position embedding, and its gradient (the opposite rotation).
//!
//! Pair `i` of a head at position `p` turns by `p · theta^(−2i/head_dim)`. A pair is `(i, i + head_dim/2)` in the
//! half-split convention of Hugging Face and of [`ByteLm`](super::ByteLm), `(2i, 2i + 1)` in llama2.c.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::rows::{f32_rows, no_input};

/// Which two numbers of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pairing {
    HalfSplit,
    Interleaved,
}

/// The sines and cosines of `n` consecutive positions.
#[derive(Clone)]
pub(crate) struct Rotary {
    pairing: Pairing,
    head_dim: usize,
    n: usize,
    // [n, head_dim / 2] of (cos, sin)
    turns: Arc<Vec<(f32, f32)>>,
}

impl Rotary {
    /// Positions `first..first + n`; angles are taken in f64, so that position 10⁶ is as exact as position 1.
    pub(crate) fn new(pairing: Pairing, head_dim: usize, theta: f64, first: usize, n: usize) -> Self {
        let half = head_dim / 2;
        let frequencies =
            (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect::<Vec<_>>();
        let mut turns = Vec::with_capacity(n * half);
        for position in first..first + n {
            let angles = frequencies.iter().map(|f| position as f64 * f);
            turns.extend(angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)));
        }
        Self { pairing, head_dim, n, turns: Arc::new(turns) }
    }

    /// Turns every head of `x [batch · n, heads · head_dim]`.
    pub(crate) fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op1(Turn { rotary: self.clone(), direction: 1.0 })
    }
}

struct Turn {
    rotary: Rotary,
    direction: f32,
}

impl CustomOp1 for Turn {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = f32_rows(x, layout)?;
        let Rotary { pairing, head_dim, n, ref turns } = self.rotary;
        let half = head_dim / 2;
        let (rows, width) = layout.shape().dims2()?;
        if n == 0 || !rows.is_multiple_of(n) || !width.is_multiple_of(head_dim) {
            return Err(no_input("rotary", layout));
        }
        let mut out = vec![0.0; x.len()];
        for (row, (x, out)) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let turns = &turns[row % n * half..][..half];
            for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                for (i, &(cos, sin)) in turns.iter().enumerate() {
                    let sin = sin * self.direction;
                    let (a, b) = match pairing {
                        Pairing::HalfSplit => (i, i + half),
                        Pairing::Interleaved => (2 * i, 2 * i + 1),
                    };
                    out[a] = x[a] * cos - x[b] * sin;
                    out[b] = x[a] * sin + x[b] * cos;
                }
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let back = Turn { rotary: self.rotary.clone(), direction: -self.direction };
        grad.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}
