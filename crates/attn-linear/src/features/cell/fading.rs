//! Gates of a piece: what is left of the past, and how strongly a token writes.
//!
//! With gates `r_t` in `[0, 1]`, `S_t = r_t S_(t-1) + (1 - r_t) phi(k_t) v_t^T`: key `j` enters the weights of query `i` with
//!
//! ```text
//! w_ij = (1 - r_j) r_(j+1) .. r_i      j <= i
//! ```
//!
//! and the state before the piece with `r_1 .. r_i`. All are products of gates as they are: a gate of 0 forgets everything, and no
//! logarithm is taken. Backwards every weight that crosses token `t` has the factor `r_t`, so that, with `M` the weights times their
//! gradients, `dr_t = (sum of the M that cross t) / r_t - (sum of the M of key t) / (1 - r_t)`: sums without cancellation.

use crate::scan::cell::{Panel, PanelMut};

/// Factors smaller than this are taken for it where they are divided by.
const LEAST: f32 = 1e-30;

/// Gates of some tokens, what is left of the past at each, and of each until the end.
pub(super) struct Fading<'a> {
    gates: &'a mut [f32],
    /// `r_1 .. r_t`.
    pub(super) past: &'a mut [f32],
    /// `(1 - r_t) r_(t+1) .. r_len`.
    pub(super) end: &'a mut [f32],
}

impl<'a> Fading<'a> {
    /// Floats of scratch.
    pub(super) fn scratch(len: usize) -> usize {
        3 * len
    }

    #[inline(always)]
    pub(super) fn new(len: usize, gate: impl Fn(usize) -> f32, scratch: &'a mut [f32]) -> Self {
        let (gates, rest) = scratch.split_at_mut(len);
        let (past, end) = rest.split_at_mut(len);
        let end = &mut end[..len];
        let mut left = 1.0;
        for t in 0..len {
            // Below, products of the gate are divided by it again.
            let r = gate(t);
            gates[t] = if r < LEAST { LEAST } else { r };
            left *= gates[t];
            past[t] = left;
        }
        left = 1.0;
        for t in (0..len).rev() {
            end[t] = own(gates[t]) * left;
            left *= gates[t];
        }
        Self { gates, past, end }
    }

    /// What is left of the past at the end.
    #[inline(always)]
    pub(super) fn all(&self) -> f32 {
        self.past.last().copied().unwrap_or(1.0)
    }

    /// `w_ij` into the rows of `out`, 0 above the diagonal.
    #[inline(always)]
    pub(super) fn weights(&self, out: &mut PanelMut<'_>) {
        let stride = out.stride;
        out.row(0).fill(0.0);
        for (i, r) in self.gates.iter().enumerate() {
            if i > 0 {
                let (before, row) = out.data[(i - 1) * stride..].split_at_mut(stride);
                row[..stride].iter_mut().zip(before).for_each(|(w, b)| *w = r * *b);
            }
            out.row(i)[i] = own(*r);
        }
    }

    /// Gradients by the gates into the first column of `out`: `within [len, len]` are the weights of pairs times their gradients,
    /// `reads` those of the state before the piece in each read, `writes` those of each key in the state after it, `stays` that of
    /// the state before in the one after.
    #[inline(always)]
    pub(super) fn back(
        &self,
        within: Panel<'_>,
        reads: &[f32],
        writes: &[f32],
        stays: f32,
        mut out: PanelMut<'_>,
    ) {
        let len = self.gates.len();
        (0..len).for_each(|t| out.row(t)[0] = stays);
        let mut written = 0.0;
        for (t, by) in writes.iter().enumerate() {
            out.row(t)[0] += written;
            written += by;
        }
        let mut read = 0.0;
        for t in (0..len).rev() {
            read += reads[t];
            out.row(t)[0] += read;
        }
        for i in 0..len {
            let mut earlier = 0.0;
            for t in 0..=i {
                out.row(t)[0] += earlier;
                earlier += within.row(i)[t];
            }
        }
        for (t, by) in writes.iter().enumerate() {
            let key: f32 = (t..len).map(|i| within.row(i)[t]).sum::<f32>() + by;
            let by = out.row(t)[0] / self.gates[t] - key / own(self.gates[t]);
            out.row(t)[0] = by;
        }
    }
}

/// `1 - r`.
#[inline(always)]
fn own(gate: f32) -> f32 {
    let own = 1.0 - gate;
    if own < LEAST { LEAST } else { own }
}
