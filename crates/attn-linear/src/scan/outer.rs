//! The scan over a matrix: `rows x channels` numbers, each with a decay of its own.
//!
//! ```text
//! h_t[n, c] = h_(t-1)[n, c] - l_t[n, c] h_(t-1)[n, c] + w_t[n] x_t[c]          y_t[c] = sum_n r_t[n] h_t[n, c]
//! ```
//!
//! where the loss `l` is a function of a number a channel `s_t[c]` and of either a constant `A[n, c]` or the key `w_t[n]`
//! ([`OuterLoss`]). Backwards, with `dh` the gradient by `h_t` through everything later,
//!
//! ```text
//! dh += r dy     dr[n] = sum_c h dy     dx[c] = sum_n dh w      dw[n] = sum_c dh x     dl = -dh h_(t-1)     dh <- dh - l dh
//! ```

use super::cell::Panel;
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::MAX_LANES;

/// How a loss comes about.
pub(crate) trait OuterLoss: Copy {
    /// From the key `w[n]`, the channel's `s` and the constant `a`.
    fn loss<S: Simd>(self, simd: S, key: f32, s: S::f32s, a: S::f32s) -> S::f32s;

    /// Gradients by the key (lane by lane), `s` and `a`, from that by the loss.
    fn back<S: Simd>(self, simd: S, key: f32, s: S::f32s, a: S::f32s, by: S::f32s) -> [S::f32s; 3];
}

/// The tokens of an outer scan.
#[derive(Clone, Copy)]
pub(crate) struct Outer<'a> {
    pub(crate) len: usize,
    /// Rows of the state.
    pub(crate) rows: usize,
    /// `[len, rows]`.
    pub(crate) read: Panel<'a>,
    pub(crate) write: Panel<'a>,
    /// `[len, channels]`.
    pub(crate) s: Panel<'a>,
    pub(crate) x: Panel<'a>,
    /// `[rows, channels]` or empty.
    pub(crate) a: &'a [f32],
}

#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32], c: usize) -> S::f32s {
    S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN])
}

impl Outer<'_> {
    #[inline(always)]
    fn constant<S: Simd>(&self, simd: S, n: usize, c: usize) -> S::f32s {
        if self.a.is_empty() { S::f32s::splat(simd, 0.0) } else { load(simd, self.a, n * self.x.stride + c) }
    }

    /// One token of one vector of channels: the read.
    #[inline(always)]
    fn step<S: Simd, L: OuterLoss>(&self, simd: S, kind: L, t: usize, c: usize, h: &mut [f32]) -> S::f32s {
        let (s, x) = (load(simd, self.s.row(t), c), load(simd, self.x.row(t), c));
        let (read, write) = (&self.read.row(t)[..self.rows], &self.write.row(t)[..self.rows]);
        let mut y = S::f32s::splat(simd, 0.0);
        for (n, (&r, &w)) in read.iter().zip(write).enumerate() {
            let h = &mut h[n * S::f32s::LEN..][..S::f32s::LEN];
            let old = S::f32s::from_slice(simd, h);
            let loss = kind.loss(simd, w, s, self.constant(simd, n, c));
            let new = old + (-loss).mul_add(old, x * w);
            new.store_slice(h);
            y = new.mul_add(S::f32s::splat(simd, r), y);
        }
        y
    }

    /// Floats of scratch of either direction.
    pub(crate) fn scratch(len: usize, rows: usize) -> usize {
        (3 * len + 2) * rows * MAX_LANES
    }

    /// Writes `y [len, channels]`; `state [rows, channels]` moves to the end.
    #[inline(always)]
    pub(crate) fn forward<S: Simd, L: OuterLoss>(
        &self,
        simd: S,
        kind: L,
        state: &mut [f32],
        y: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (stride, lanes) = (self.x.stride, S::f32s::LEN);
        for c in (0..stride).step_by(lanes) {
            // The column in one piece, so that it stays in the nearest cache.
            let column = &mut scratch[..self.rows * lanes];
            for (n, h) in column.chunks_exact_mut(lanes).enumerate() {
                h.copy_from_slice(&state[n * stride + c..][..lanes]);
            }
            for t in 0..self.len {
                self.step(simd, kind, t, c, column).store_slice(&mut y[t * stride + c..][..lanes]);
            }
            for (n, h) in column.chunks_exact(lanes).enumerate() {
                state[n * stride + c..][..lanes].copy_from_slice(h);
            }
        }
    }

    /// Gradients, given `dy` and `before`, the state before the first token; `dh` moves from after the last token to before the
    /// first. `dread`, `dwrite` `[len, rows]` and `ds`, `dx` `[len, channels]` are written, `da` is added to.
    #[inline(always)]
    pub(crate) fn backward<S: Simd, L: OuterLoss>(
        &self,
        simd: S,
        kind: L,
        (before, dy, dh): (&[f32], Panel<'_>, &mut [f32]),
        grads: OuterGrads<'_>,
        scratch: &mut [f32],
    ) {
        let OuterGrads { read: dread, write: dwrite, s: ds, x: dx, a: da } = grads;
        let (stride, lanes, rows) = (self.x.stride, S::f32s::LEN, self.rows);
        // States after each token (and before the first), gradients by reads and writes lane by lane.
        let (states, sums) = scratch.split_at_mut((self.len + 1) * rows * lanes);
        let (read_lanes, sums) = sums.split_at_mut(self.len * rows * lanes);
        let write_lanes = &mut sums[..self.len * rows * lanes];
        read_lanes.fill(0.0);
        write_lanes.fill(0.0);
        for c in (0..stride).step_by(lanes) {
            for n in 0..rows {
                states[n * lanes..][..lanes].copy_from_slice(&before[n * stride + c..][..lanes]);
            }
            for t in 0..self.len {
                let (past, now) = states[t * rows * lanes..].split_at_mut(rows * lanes);
                now[..rows * lanes].copy_from_slice(past);
                let _ = self.step(simd, kind, t, c, &mut now[..rows * lanes]);
            }
            for t in (0..self.len).rev() {
                let (past, now) = states[t * rows * lanes..].split_at(rows * lanes);
                let (s, x) = (load(simd, self.s.row(t), c), load(simd, self.x.row(t), c));
                let dy = load(simd, dy.row(t), c);
                let mut by_s = S::f32s::splat(simd, 0.0);
                let mut by_x = by_s;
                for n in 0..rows {
                    let (r, w) = (self.read.row(t)[n], self.write.row(t)[n]);
                    let at = n * stride + c..n * stride + c + lanes;
                    let lane = (t * rows + n) * lanes..(t * rows + n + 1) * lanes;
                    let grad = dy.mul_add(S::f32s::splat(simd, r), load(simd, dh, at.start));
                    let read = load(simd, now, n * lanes).mul_add(dy, load(simd, read_lanes, lane.start));
                    read.store_slice(&mut read_lanes[lane.clone()]);
                    by_x = grad.mul_add(S::f32s::splat(simd, w), by_x);
                    let a = self.constant(simd, n, c);
                    let by_loss = -(grad * load(simd, past, n * lanes));
                    let [by_key, by_gate, by_a] = kind.back(simd, w, s, a, by_loss);
                    by_s += by_gate;
                    let write = grad.mul_add(x, by_key) + load(simd, write_lanes, lane.start);
                    write.store_slice(&mut write_lanes[lane]);
                    if !da.is_empty() {
                        (load(simd, da, at.start) + by_a).store_slice(&mut da[at.clone()]);
                    }
                    let loss = kind.loss(simd, w, s, a);
                    (-loss).mul_add(grad, grad).store_slice(&mut dh[at]);
                }
                by_s.store_slice(&mut ds[t * stride + c..][..lanes]);
                by_x.store_slice(&mut dx[t * stride + c..][..lanes]);
            }
        }
        for (to, from) in [(dread, &*read_lanes), (dwrite, &*write_lanes)] {
            for (to, from) in to.chunks_exact_mut(self.read.stride).zip(from.chunks_exact(rows * lanes)) {
                to.iter_mut().zip(from.chunks_exact(lanes)).for_each(|(to, from)| *to = from.iter().sum());
            }
        }
    }
}

/// Where the gradients of an outer scan go.
pub(crate) struct OuterGrads<'a> {
    /// `[len, rows]`.
    pub(crate) read: &'a mut [f32],
    pub(crate) write: &'a mut [f32],
    /// `[len, channels]`.
    pub(crate) s: &'a mut [f32],
    pub(crate) x: &'a mut [f32],
    /// `[rows, channels]`, added to; empty if there is no constant.
    pub(crate) a: &'a mut [f32],
}
