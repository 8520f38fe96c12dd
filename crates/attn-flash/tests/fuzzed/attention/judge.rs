//! What a call must give: the definition in f64, one sequence a batch entry, and how near f32 can come to it.
//!
//! With `S` the largest score that can occur, a score's rounding error is at most about `e = u ((d + 16) |q||k| scale + 16 S)`
//! with `u = 2^-24`, and a weight's relative error twice that; so `|out - truth| <= (2 e + (64 + n / 4) u) max|v|` plus the
//! rounding of the storage type.
//!
//! Where the CPU multiplies pairs of bf16, weights are rounded to `w = 2^-8` (and a little for their coarser exponential) and
//! normalised by their own sum: `sum_j p_j e_j (v_j - out)` is at most `2 w max|v|` more. Denormal products are zero there.

use super::call::{Call, Parts};
use super::tensor::Tensor;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Align, And, Mask, Pair};
use attn_core::score::{ScoreMod, SoftCap, Then};
use attn_core::simd::Isa;
use attn_core::tile::Bf16Dot;
use attn_core::{DType, Element};
use attn_flash::Flash;
use half::f16;

/// Largest scores whose rounding errors leave something to compare.
const LARGEST_SCORE: f64 = 300.0;
/// With infinities around, no weight may vanish in f32 that does not in f64: no score beyond this.
const SMALL_SCORE: f64 = 30.0;

/// The definition's answer, if it can be compared.
pub struct Truth {
    reference: Option<Reference>,
    /// Absolute errors of outputs and log-sum-exps.
    out_error: f64,
    lse_error: f64,
    largest_value: f64,
}

impl Truth {
    pub fn of(call: &Call, parts: &Parts<'_>) -> Self {
        let unfair = Self { reference: None, out_error: 0.0, lse_error: 0.0, largest_value: 0.0 };
        let shape = call.sequences.seen;
        if shape.rows() == 0 {
            return unfair;
        }
        let padded = call.sequences.padded();
        let x = padded.qkv().expect("the padded copy of what fits");
        let scale = parts.flash.softmax_scale.map_or(1.0 / (shape.head_dim as f64).sqrt(), f64::from);
        let [q, k] = padded.lengths();
        let product = call.norm_bound().unwrap_or(q * k) * scale.abs();
        let additions = call.additions();
        let largest = product + additions;
        let v = padded.largest_value();
        let finite = padded.all_finite() && call.additions_finite() && call.gammas_finite();
        let fair = largest <= if finite { LARGEST_SCORE } else { SMALL_SCORE }
            && q.max(k) < 1e6
            && v < 1e6
            && (scale == 0.0 || (1e-6..1e6).contains(&scale.abs()))
            // An infinity times a weight or a norm of exactly 0 depends on the order of operations.
            && (call.gammas_finite() && (finite || parts.qk_norm.is_none()));
        if !fair {
            return unfair;
        }
        let u = 2f64.powi(-24);
        let score_error = u * ((shape.head_dim + 16) as f64 * product + 16.0 * largest);
        let dropout =
            parts.dropout.map_or(1.0, |dropout| 1.0 / (1.0 - f64::from(dropout.probability())).max(u));
        let weight_error = 2.0 * score_error + (64.0 + shape.n_kv as f64 / 4.0) * u;
        Self {
            reference: Some(definition(call, parts, &x)),
            out_error: weight_error * v * dropout,
            lse_error: 2.0 * score_error + 64.0 * u,
            largest_value: v,
        }
    }

    /// Whether numbers are compared.
    pub fn is_fair(&self) -> bool {
        self.reference.is_some()
    }

    pub fn judge(&self, isa: Isa, call: &Call, out: &Tensor, lse: Option<&[f32]>) {
        let Some(Reference { out: want_out, lse: want_lse }) = &self.reference else { return };
        let shape = call.sequences.seen;
        let dtype = out.dtype();
        let [_, _, n_q, width] = out.layout().shape;
        let native = isa == Isa::Avx512 && dtype == DType::Bf16 && Bf16Dot::detect().is_some();
        let weights = if native { 1.05 * DType::Bf16.roundoff() } else { 0.0 };
        let tiny = match dtype {
            DType::F16 => 2f64.powi(-25),
            DType::Bf16 => 2f64.powi(-100),
            DType::F32 => 2f64.powi(-126),
        };
        let out_error = self.out_error + 2.0 * weights * self.largest_value;
        let out_bound = |want: f64| out_error + 2.0 * dtype.roundoff() * want.abs() + tiny;
        let lse_bound = |want: f64| self.lse_error + weights + 4.0 * DType::F32.roundoff() * want.abs();
        for s in 0..shape.batch {
            let (batch, rows, _) = call.sequences.ranges(s);
            for head in 0..shape.n_heads_q {
                for (i, row) in rows.clone().enumerate() {
                    let at = (s * shape.n_heads_q + head) * shape.n_q + i;
                    let place = format!("{isa}, sequence {s}, head {head}, row {i}");
                    let got = out.row(batch, head, row);
                    for (c, (got, want)) in got.iter().zip(&want_out[at * width..][..width]).enumerate() {
                        check(
                            &format!("out: {place}, column {c}"),
                            *got,
                            stored(*want, dtype),
                            out_bound(*want),
                        );
                    }
                    if let (Some(lse), Some(want)) = (lse, want_lse) {
                        let got = lse[(batch * shape.n_heads_q + head) * n_q + row];
                        check(&format!("lse: {place}"), got, want[at], lse_bound(want[at]));
                    }
                }
            }
        }
    }
}

/// What overflows in the storage type is an infinity there.
fn stored(want: f64, dtype: DType) -> f64 {
    if dtype == DType::F16 && want.abs() > 65000.0 { f64::from(f16::store(want as f32).load()) } else { want }
}

#[track_caller]
fn check(what: &str, got: f32, want: f64, bound: f64) {
    let got = f64::from(got);
    let agrees =
        got == want || got.is_nan() && want.is_nan() || want.is_finite() && (got - want).abs() <= bound;
    assert!(agrees, "{what}: got {got:e}, want {want:e}, at most {bound:e} apart");
}

fn definition(call: &Call, parts: &Parts<'_>, x: &attn_core::Qkv<'_>) -> Reference {
    let band = WrittenBand::of(call, &parts.flash);
    let [a, b] = parts.masks.each_ref().map(|mask| mask.as_deref());
    let mask = And(band, And(a, b));
    let [c, d] = parts.score_mods.each_ref().map(|score_mod| score_mod.as_deref());
    let cap =
        parts.flash.softcap.filter(|cap| *cap != 0.0).map(|cap| SoftCap::new(cap).expect("was accepted"));
    let score_mod = Then(Then(cap, Then(c, d)), KeyBias(call));
    let sinks: Option<Vec<f64>> =
        call.sinks.as_ref().map(|sinks| sinks.iter().map(|x| f64::from(*x)).collect());
    let exact = Exact {
        softmax_scale: parts.flash.softmax_scale.map(f64::from),
        mask: &mask,
        score_mod: &score_mod,
        key_bias: None,
        sinks: sinks.as_deref(),
        dropout: parts.dropout,
        qk_norm: parts.qk_norm,
    };
    exact.all(x).expect("the definition of what was accepted")
}

/// Causal rows and windows in numbers that cannot overflow, and the end of each sequence.
struct WrittenBand<'a> {
    call: &'a Call,
    offsets: Vec<i128>,
    lens: Vec<usize>,
    left: Option<i128>,
    right: Option<i128>,
}

impl<'a> WrittenBand<'a> {
    fn of(call: &'a Call, flash: &Flash) -> Self {
        let wide = |width: usize| width as i128;
        let (mut offsets, mut lens) = (Vec::new(), Vec::new());
        for s in 0..call.sequences.seen.batch {
            let (_, rows, keys) = call.sequences.ranges(s);
            lens.push(keys.len());
            offsets.push(match flash.align {
                Align::BottomRight => keys.len() as i128 - rows.len() as i128,
                Align::TopLeft => 0,
                Align::Offset(offset) => offset as i128,
            });
        }
        let right = if flash.causal { Some(0) } else { flash.window_right };
        Self { call, offsets, lens, left: flash.window_left.map(wide), right: right.map(wide) }
    }
}

impl Mask for WrittenBand<'_> {
    fn sees(&self, p: Pair) -> bool {
        debug_assert!(p.batch < self.call.sequences.seen.batch);
        let (position, j) = (p.i as i128 + self.offsets[p.batch], p.j as i128);
        p.j < self.lens[p.batch]
            && self.left.is_none_or(|left| position - left <= j)
            && self.right.is_none_or(|right| j <= position + right)
    }
}

/// The key bias in both of its shapes.
struct KeyBias<'a>(&'a Call);

impl KeyBias<'_> {
    fn of(&self, p: Pair) -> f32 {
        let Some(bias) = &self.0.key_bias else { return 0.0 };
        let (sequences, shape) = (&self.0.sequences, self.0.sequences.seen);
        let (batch, _, keys) = sequences.ranges(p.batch);
        let all = sequences.n_keys();
        let head = if bias.len() == all { 0 } else { batch * shape.n_heads_kv + shape.kv_head(p.head) };
        bias[head * all + keys.start + p.j]
    }
}

impl ScoreMod for KeyBias<'_> {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.of(at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.of(at))
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}
