//! One token at a time: the recurrence as it is written.
//!
//! ```text
//! S <- gamma S + k v^T      z <- gamma z + k      N = S^T q      D = q . z
//! ```
//!
//! `gamma S` is computed as `S + (gamma - 1) S`: a slow decay has `gamma` so near 1 that rounding it to f32 would change
//! how long the state remembers.
//!
//! One pass over the state a token, which reads, writes and multiplies it at once; bound by memory traffic, not by
//! arithmetic.

use super::chunked::Scratch;
use super::lanes::{across, dot};
use super::state::HeadState;
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdOp};
use attn_core::view::Rows;

/// Some tokens, one after another.
pub(super) struct Steps<'a> {
    /// `[len, key_dim]`, `[len, key_dim]`, `[len, value_dim]`.
    pub(super) q: Rows<'a, f32>,
    pub(super) k: Rows<'a, f32>,
    pub(super) v: Rows<'a, f32>,
    pub(super) decay: Option<f32>,
    pub(super) state: HeadState<'a>,
    /// Where `N` and `D` go.
    pub(super) scratch: &'a mut Scratch,
}

impl SimdOp for Steps<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, k, v, decay, state, scratch } = self;
        let loss = decay.map_or(0.0, f32::exp_m1);
        let width = v.width();
        let reads = scratch.numerators.chunks_exact_mut(width).zip(&mut scratch.denominators);
        for (t, (numerators, denominator)) in reads.enumerate().take(q.len()) {
            let mut token = Token { q: q.row(t), k: k.row(t), v: v.row(t), loss, s: &mut *state.s };
            let mut j = 0;
            while j + 4 * S::f32s::LEN <= width {
                token.step::<S, 4>(simd, j, numerators);
                j += 4 * S::f32s::LEN;
            }
            while j + S::f32s::LEN <= width {
                token.step::<S, 1>(simd, j, numerators);
                j += S::f32s::LEN;
            }
            (j..width).for_each(|j| numerators[j] = token.step_one(j));
            if !state.z.is_empty() {
                state.z.iter_mut().zip(token.k).for_each(|(z, k)| *z += loss * *z + k);
                *denominator = across(simd, dot(simd, token.q, state.z));
            }
        }
    }
}

/// One token and the state it meets.
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// `gamma - 1`.
    loss: f32,
    /// `[key_dim, value_dim]`.
    s: &'a mut [f32],
}

impl Token<'_> {
    /// Value columns from `j`, `VECTORS` vectors of them.
    #[inline(always)]
    fn step<S: Simd, const VECTORS: usize>(&mut self, simd: S, j: usize, out: &mut [f32]) {
        let columns = VECTORS * S::f32s::LEN;
        let load =
            |row: &[f32], v: usize| S::f32s::from_slice(simd, &row[v * S::f32s::LEN..][..S::f32s::LEN]);
        let loss = S::f32s::splat(simd, self.loss);
        let value: [S::f32s; VECTORS] = std::array::from_fn(|v| load(&self.v[j..j + columns], v));
        let mut read = [S::f32s::splat(simd, 0.0); VECTORS];
        for ((row, k), q) in self.s.chunks_exact_mut(self.v.len()).zip(self.k).zip(self.q) {
            let row = &mut row[j..j + columns];
            let (k, q) = (S::f32s::splat(simd, *k), S::f32s::splat(simd, *q));
            for v in 0..VECTORS {
                let old = load(row, v);
                let new = k.mul_add(value[v], loss.mul_add(old, old));
                new.store_slice(&mut row[v * S::f32s::LEN..][..S::f32s::LEN]);
                read[v] = q.mul_add(new, read[v]);
            }
        }
        for (read, out) in read.iter().zip(out[j..j + columns].chunks_exact_mut(S::f32s::LEN)) {
            read.store_slice(out);
        }
    }

    /// Value column `j`.
    #[inline(always)]
    fn step_one(&mut self, j: usize) -> f32 {
        let mut read = 0.0;
        for ((row, k), q) in self.s.chunks_exact_mut(self.v.len()).zip(self.k).zip(self.q) {
            row[j] += self.loss * row[j] + k * self.v[j];
            read += q * row[j];
        }
        read
    }
}
