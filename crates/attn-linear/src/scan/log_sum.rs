//! The triple of a running softmax: numerator, denominator and what both are scaled by.
//!
//! With `N_t = sum_(s <= t) e^((t-s) w + k_s) v_s` and `D_t` the same with `v = 1`, kept as `N = n e^m`, `D = d e^m`:
//!
//! ```text
//! o_t = (N_(t-1) + e^(u + k_t) v_t) / (D_(t-1) + e^(u + k_t))        the read, before the write, with a bonus u
//! N_t = e^w N_(t-1) + e^(k_t) v_t      D_t = e^w D_(t-1) + e^(k_t)
//! m_t = max(m_(t-1) + w, k_t)
//! ```
//!
//! With `u = w = 0` the read equals one after the write. Backwards, with `Z_t` the denominator of `o_t` and `(A, B)` the
//! gradients by `(N_t, D_t)` through everything later, kept as `A = a e^p`, `B = b e^p`:
//!
//! ```text
//! dv_t = e^(u+k) do/Z + e^k A      dk_t = e^(u+k) (do/Z) (v - o) + e^k (A v + B)      du += e^(u+k) (do/Z) (v - o)
//! dw  += e^w (A N_(t-1) + B D_(t-1))
//! A   <- e^w A + do/Z              B   <- e^w B - o do/Z
//! ```
//!
//! Sums that keep their scale for a long time are not multiplied by an `e^0` that is off by a rounding: `n <- n - (1 - e^x) n`.
//! `A` and `B` are at most of the order of `e^-m`: every exponent formed is at most 0 or a sum that cancels to that.

use super::cell::{Panel, PanelMut};
use super::math::{exp, kept, loss};
use attn_core::simd::{Simd, SimdBase, SimdFloat};

/// What the maximum is before the first token: so low that its exponential is 0 beside any key.
pub(crate) const NO_MAX: f32 = -1e38;

/// Numerator, denominator and maximum of all channels.
pub(crate) struct Triple<'a> {
    pub(crate) num: &'a mut [f32],
    pub(crate) den: &'a mut [f32],
    pub(crate) max: &'a mut [f32],
}

#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32], c: usize) -> S::f32s {
    S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN])
}

/// `o_t` of all `len` tokens; `state` moves to the end. `decay` (`w <= 0`) and `bonus` (`u`) are one a channel.
#[inline(always)]
pub(crate) fn log_sum<S: Simd>(
    simd: S,
    len: usize,
    (k, v): (Panel<'_>, Panel<'_>),
    (decay, bonus): (&[f32], &[f32]),
    state: Triple<'_>,
    mut out: PanelMut<'_>,
) {
    for c in (0..k.stride).step_by(S::f32s::LEN) {
        let (w, u) = (load(simd, decay, c), load(simd, bonus, c));
        let mut now = Channel::<S> {
            num: load(simd, state.num, c),
            den: load(simd, state.den, c),
            max: load(simd, state.max, c),
        };
        for t in 0..len {
            let (k, v) = (load(simd, k.row(t), c), load(simd, v.row(t), c));
            let (num, den, _) = now.read(simd, k + u, v);
            (num / den).store_slice(&mut out.row(t)[c..c + S::f32s::LEN]);
            now.write(simd, w, k, v);
        }
        now.num.store_slice(&mut state.num[c..c + S::f32s::LEN]);
        now.den.store_slice(&mut state.den[c..c + S::f32s::LEN]);
        now.max.store_slice(&mut state.max[c..c + S::f32s::LEN]);
    }
}

#[derive(Clone, Copy)]
struct Channel<S: Simd> {
    num: S::f32s,
    den: S::f32s,
    max: S::f32s,
}

impl<S: Simd> Channel<S> {
    /// `(numerator, denominator)` of the read in units of `e^max`, and that `max`.
    #[inline(always)]
    fn read(&self, simd: S, key: S::f32s, v: S::f32s) -> (S::f32s, S::f32s, S::f32s) {
        let max = self.max.max(key);
        let (lost, now) = (loss(simd, self.max - max), kept(simd, key - max));
        ((-lost).mul_add(self.num, now * v) + self.num, (-lost).mul_add(self.den, now) + self.den, max)
    }

    #[inline(always)]
    fn write(&mut self, simd: S, w: S::f32s, k: S::f32s, v: S::f32s) {
        let faded = self.max + w;
        let max = faded.max(k);
        let (lost, now) = (loss(simd, faded - max), kept(simd, k - max));
        self.num = (-lost).mul_add(self.num, now * v) + self.num;
        self.den = (-lost).mul_add(self.den, now) + self.den;
        self.max = max;
    }
}

/// What the backward pass of [`log_sum`] reads.
#[derive(Clone, Copy)]
pub(crate) struct LogSumBack<'a> {
    pub(crate) len: usize,
    pub(crate) k: Panel<'a>,
    pub(crate) v: Panel<'a>,
    pub(crate) decay: &'a [f32],
    pub(crate) bonus: &'a [f32],
    /// Numerator, denominator and maximum before the first token.
    pub(crate) before: [&'a [f32]; 3],
    /// Gradients by the outputs.
    pub(crate) grad: Panel<'a>,
}

/// Gradients by `(k, v)`, row by row, and added to those by `(w, u)`. `grad` holds `(a, b, p)`, see the module, and moves from
/// after the last token to before the first. `states` is scratch for three panels.
#[inline(always)]
pub(crate) fn log_sum_back<S: Simd>(
    simd: S,
    given: LogSumBack<'_>,
    grad: Triple<'_>,
    [mut nums, mut dens, mut maxs]: [PanelMut<'_>; 3],
    (mut dk, mut dv): (PanelMut<'_>, PanelMut<'_>),
    (dw, du): (&mut [f32], &mut [f32]),
) {
    let LogSumBack { len, k, v, decay, bonus, before, grad: dout } = given;
    let range = |c: usize| c..c + S::f32s::LEN;
    for c in (0..k.stride).step_by(S::f32s::LEN) {
        let (w, u) = (load(simd, decay, c), load(simd, bonus, c));
        let mut now = Channel::<S> {
            num: load(simd, before[0], c),
            den: load(simd, before[1], c),
            max: load(simd, before[2], c),
        };
        for t in 0..len {
            now.num.store_slice(&mut nums.row(t)[range(c)]);
            now.den.store_slice(&mut dens.row(t)[range(c)]);
            now.max.store_slice(&mut maxs.row(t)[range(c)]);
            now.write(simd, w, load(simd, k.row(t), c), load(simd, v.row(t), c));
        }
        let mut a = load(simd, grad.num, c);
        let mut b = load(simd, grad.den, c);
        let mut p = load(simd, grad.max, c);
        let (mut by_w, mut by_u) = (load(simd, dw, c), load(simd, du, c));
        for t in (0..len).rev() {
            let (k, v) = (load(simd, k.row(t), c), load(simd, v.row(t), c));
            let past = Channel::<S> {
                num: load(simd, nums.row(t), c),
                den: load(simd, dens.row(t), c),
                max: load(simd, maxs.row(t), c),
            };
            let (num, z, m) = past.read(simd, k + u, v);
            let o = num / z;
            // do / Z in units of e^-m.
            let by_read = load(simd, dout.row(t), c) / z;
            let own = exp(simd, u + k - m) * by_read;
            let own_key = own * (v - o);
            let written = exp(simd, k + p);
            let by_key = a.mul_add(v, b) * written;
            (own_key + by_key).store_slice(&mut dk.row(t)[range(c)]);
            written.mul_add(a, own).store_slice(&mut dv.row(t)[range(c)]);
            by_u += own_key;
            let stays = a.mul_add(past.num, b * past.den);
            by_w = exp(simd, w + p + past.max).mul_add(stays, by_w);
            let faded = p + w;
            let next = faded.max(-m);
            let (lost, read) = (loss(simd, faded - next), kept(simd, -m - next));
            a = (-lost).mul_add(a, read * by_read) + a;
            b = (-lost).mul_add(b, -(read * by_read * o)) + b;
            p = next;
        }
        a.store_slice(&mut grad.num[range(c)]);
        b.store_slice(&mut grad.den[range(c)]);
        p.store_slice(&mut grad.max[range(c)]);
        by_w.store_slice(&mut dw[range(c)]);
        by_u.store_slice(&mut du[range(c)]);
    }
}
