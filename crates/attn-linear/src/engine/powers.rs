//! Powers of a constant decay `gamma = e^g <= 1`.
//!
//! A state fades by `S + (gamma^p - 1) S`: where `gamma` is near 1, rounding `gamma^p` itself to f32 would change how long
//! the state remembers.

use attn_core::tile::MAX_LANES;

/// Powers of a head's decay.
pub(super) struct Powers {
    /// `up[p] = gamma^p` for `p = 0..=chunk_len`.
    up: Vec<f32>,
    /// The same, highest power first, and zeros after `gamma^0`, so that vectors may run over its end.
    down: Vec<f32>,
    log_decay: f64,
}

impl Powers {
    pub(super) fn new(chunk_len: usize) -> Self {
        let mut powers =
            Self { up: vec![1.0; chunk_len + 1], down: vec![0.0; chunk_len + 1 + MAX_LANES], log_decay: 0.0 };
        powers.set(0.0);
        powers
    }

    /// Floats of [`Powers::new`].
    pub(super) fn floats(chunk_len: usize) -> usize {
        2 * (chunk_len + 1) + MAX_LANES
    }

    pub(super) fn chunk_len(&self) -> usize {
        self.up.len() - 1
    }

    /// The powers of `e^log_decay`, in f64 so that high powers are exact too.
    pub(super) fn set(&mut self, log_decay: f32) -> &Self {
        self.log_decay = f64::from(log_decay);
        for (p, up) in self.up.iter_mut().enumerate().skip(1) {
            *up = (p as f64 * self.log_decay).exp() as f32;
        }
        self.down.iter_mut().zip(self.up.iter().rev()).for_each(|(down, up)| *down = *up);
        self
    }

    /// `gamma^0, gamma^1, ..`.
    #[inline(always)]
    pub(super) fn rising(&self) -> &[f32] {
        &self.up
    }

    /// `gamma^p - 1` for `p > 0`.
    pub(super) fn loss(&self, p: usize) -> f32 {
        (p as f64 * self.log_decay).exp_m1() as f32
    }

    /// `gamma^p, gamma^(p-1), .., gamma^0`, then zeros.
    #[inline(always)]
    pub(super) fn falling(&self, p: usize) -> &[f32] {
        &self.down[self.chunk_len() - p..]
    }
}
