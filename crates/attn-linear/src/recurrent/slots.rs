//! Slot memories: a fixed number of slots, each a fading average of keys and of values, read by a softmax over slots.
//!
//! With slot weights `s_t [slots]` and decays `g_t [slots]`:
//!
//! ```text
//! K_t = K_(t-1) diag(e^g_t) + k_t s_t^T          p_t = softmax(scale q_t^T K_t)
//! V_t = diag(e^g_t) V_(t-1) + s_t v_t^T          o_t = p_t^T V_t
//! ```
//!
//! Two passes of the engine over the same tokens: the first with decays of its value channels, the second of its key
//! channels. [`Gsa`], [`Abc`] and [`Raven`] differ in where the weights and decays come from. Where no tensor gives the
//! raw weights, they are the key's channels, over and over.
//!
//! Sources: Peng et al. 2022 (ABC); Zhang et al. 2024 (Gated Slot Attention).

use super::front::{self, CAUSAL, FINE_CHUNK, SCALE, UNIT_SCALE, log_sigmoid, sigmoid};
use super::lightnet::{absorb, pull_absorb};
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Part, Plan, Pull, Sizes, StateVariant, Tokens, Width, copy,
};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result, softmax_scale_or_default};

const SLOTS: OptionSpec =
    OptionSpec { name: "slots", default: "16", help: "slots, where no tensor gives them" };

/// What the three have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slots {
    /// Multiplies the first pass's read; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Slots, where no tensor gives them.
    pub slots: usize,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Slots {
    fn read(name: &'static str, options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(name, options)?;
        let slots = options.get_or("slots", 16)?;
        if slots == 0 {
            return Err(AttnError::value("option `slots`", 0, "at least 1"));
        }
        let chunk_len = front::chunk_len(options, front::FINE_CHUNK_LEN)?;
        Ok(Self { scale: front::scale(options)?, slots, chunk_len })
    }

    /// How many slots there are.
    fn count(&self, widths: [Option<usize>; 2]) -> Result<usize> {
        match widths {
            [Some(a), Some(b)] if a != b => {
                Err(AttnError::shape("log_decay", "width", b, format!("{a} (slots)")))
            }
            [Some(slots), _] | [None, Some(slots)] => Ok(slots),
            [None, None] => Ok(self.slots),
        }
    }

    fn plan(&self, name: &'static str, slots: usize, sizes: &Sizes) -> Result<Plan> {
        let (keys, values) = (sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, keys)?;
        let chunk_len = self.chunk_len;
        let stages = vec![
            Options { decay: Decay::Value, scale, chunk_len, ..Options::new(name, keys, slots) },
            Options { decay: Decay::Key, chunk_len, ..Options::new(name, slots, values) },
        ];
        let parts = vec![
            Part::matrix("hk0", "hkT", 0, keys, slots),
            Part::matrix("hv0", "hvT", keys * slots, slots, values),
        ];
        Ok(Plan { stages, keys_per_token: 1, parts, causal: true })
    }
}

/// q and k of the first pass.
fn copy_qk(x: &Tokens<'_>, chunk: &mut Chunk) {
    copy(x.q, &mut chunk.q);
    copy(x.k, &mut chunk.k);
}

/// The raw slot weights of token `i`.
fn raw_slots<'a>(x: &Tokens<'a>, name: &str, i: usize) -> impl Iterator<Item = f32> + use<'a> {
    x.extra(name).map_or_else(|| x.k.row(i), |rows| rows.row(i)).iter().copied().cycle()
}

/// The second pass: the softmax of what the first has read, and the same weights and decays.
fn second_pass(x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
    let slots = reads.len() / x.len().max(1);
    chunk.q.copy_from_slice(reads);
    for p in chunk.q.chunks_exact_mut(slots.max(1)) {
        let max = p.iter().fold(f32::NEG_INFINITY, |max, p| max.max(*p));
        p.iter_mut().for_each(|p| *p = (*p - max).exp());
        let sum: f32 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    }
    chunk.k.copy_from_slice(&first.v);
    chunk.log_decay.copy_from_slice(&first.log_decay);
    copy(x.v, &mut chunk.v);
}

/// [`second_pass`] backwards.
fn pull_second(second: &Chunk, grads: &Chunk, d_reads: &mut [f32], gained: &mut Chunk, to: &mut Pull<'_>) {
    let slots = d_reads.len() / second.len.max(1);
    let rows = d_reads.chunks_exact_mut(slots.max(1)).zip(second.q.chunks_exact(slots.max(1)));
    for ((d, p), d_p) in rows.zip(grads.q.chunks_exact(slots.max(1))) {
        let along: f32 = p.iter().zip(d_p).map(|(p, d)| p * d).sum();
        d.iter_mut().zip(p).zip(d_p).for_each(|((d, p), d_p)| *d = p * (d_p - along));
    }
    gained.v.copy_from_slice(&grads.k);
    gained.log_decay.copy_from_slice(&grads.log_decay);
    to.v.copy_from_slice(&grads.v);
}

/// q and k of the first pass, backwards.
fn pull_qk(grads: &Chunk, to: &mut Pull<'_>) {
    to.q.copy_from_slice(&grads.q);
    to.k.copy_from_slice(&grads.k);
}

/// Adds to the gradients of the raw slot weights of token `i`.
fn pull_raw(to: &mut Pull<'_>, name: &str, i: usize, key_dim: usize, d: impl Iterator<Item = f32>) {
    let tokens = to.k.len() / key_dim;
    for (m, d) in d.enumerate() {
        match to.extra(name) {
            Some(rows) => {
                let slots = rows.len() / tokens;
                rows[i * slots + m] += d;
            }
            None => to.k[i * key_dim + m % key_dim] += d,
        }
    }
}

/// Gated slot attention: decays as given, weights `1 - e^g` unless they are given.
///
/// Extra inputs: `log_decay`, `slots [batch, heads, tokens, slots]`. Without `log_decay`, it is `logsigmoid(raw) / 8`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gsa(pub Slots);

impl StateVariant for Gsa {
    const NAME: &'static str = "gsa";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("slots", Width::Any), Extra::rows("log_decay", Width::Any)];
    const SUMMARY: &'static str = "Gated slot attention: fading slots read by a softmax (Zhang et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, SLOTS, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Slots::read(Self::NAME, options).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let slots = self.0.count(["slots", "log_decay"].map(|name| sizes.width(name)))?;
        self.0.plan(Self::NAME, slots, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        copy_qk(x, chunk);
        let slots = chunk.v.len() / x.len().max(1);
        for (i, g) in chunk.log_decay.chunks_exact_mut(slots.max(1)).enumerate() {
            match x.extra("log_decay") {
                Some(given) => g.copy_from_slice(given.row(i)),
                None => {
                    g.iter_mut().zip(raw_slots(x, "", i)).for_each(|(g, raw)| *g = log_sigmoid(raw) / 8.0)
                }
            }
        }
        match x.extra("slots") {
            Some(given) => copy(given, &mut chunk.v),
            None => chunk.v.iter_mut().zip(&chunk.log_decay).for_each(|(s, g)| *s = -g.exp_m1()),
        }
    }

    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        second_pass(x, first, reads, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    ) {
        pull_second(second, grads, d_reads, gained, to);
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull_qk(grads, to);
        let (key_dim, slots) = (x.k.width(), (chunk.v.len() / x.len().max(1)).max(1));
        let weights_given = x.extra("slots").is_some();
        if let Some(d) = to.extra("slots") {
            d.copy_from_slice(&grads.v);
        }
        let rows = chunk.log_decay.chunks_exact(slots).zip(grads.log_decay.chunks_exact(slots));
        for (i, ((g, d_g), d_s)) in rows.zip(grads.v.chunks_exact(slots)).enumerate() {
            // `s = 1 - e^g` where it is not given.
            let d_g = |m: usize| d_g[m] - if weights_given { 0.0 } else { g[m].exp() * d_s[m] };
            match to.extra("log_decay") {
                Some(rows) => {
                    rows[i * slots..][..slots].iter_mut().enumerate().for_each(|(m, d)| *d = d_g(m))
                }
                None => {
                    let raw = x.k.row(i).iter().cycle();
                    let d = (0..slots).zip(raw).map(|(m, raw)| sigmoid(-raw) / 8.0 * d_g(m));
                    pull_raw(to, "", i, key_dim, d);
                }
            }
        }
    }

    fn max_error(&self) -> f64 {
        2e-5
    }
}

/// Attention with bounded memory: every slot is a softmax average of the past, with the logits `slots` as weights.
///
/// With `z_t = logcumsumexp(slots)_t`, the weights are `e^(slots - z_t)` and the decays `z_(t-1) - z_t`; `z` is part of the
/// memory.
///
/// Extra input: `slots [batch, heads, tokens, slots]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Abc(pub Slots);

impl StateVariant for Abc {
    const NAME: &'static str = "abc";
    const EXTRAS: &'static [Extra] = &[Extra::rows("slots", Width::Any)];
    const SUMMARY: &'static str = "ABC: slots that are softmax averages of the past (Peng et al. 2022)";
    const OPTIONS: &'static [OptionSpec] = Gsa::OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Slots::read(Self::NAME, options).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let slots = self.0.count([sizes.width("slots"), None])?;
        let plan = self.0.plan(Self::NAME, slots, sizes)?;
        Ok(plan.carrying("z0", "zT", slots, f32::NEG_INFINITY))
    }

    fn fill(&self, x: &Tokens<'_>, z: &mut [f32], chunk: &mut Chunk) {
        copy_qk(x, chunk);
        let slots = z.len();
        let rows = chunk.v.chunks_exact_mut(slots).zip(chunk.log_decay.chunks_exact_mut(slots));
        for (i, (s, g)) in rows.enumerate() {
            for (((s, g), z), raw) in s.iter_mut().zip(g).zip(&mut *z).zip(raw_slots(x, "slots", i)) {
                (*g, *s) = absorb(raw, z);
            }
        }
    }

    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        second_pass(x, first, reads, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    ) {
        pull_second(second, grads, d_reads, gained, to);
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull_qk(grads, to);
        let (key_dim, slots) = (x.k.width(), (chunk.v.len() / x.len().max(1)).max(1));
        for i in (0..x.len()).rev() {
            let mut d = vec![0.0; slots];
            for (m, d) in d.iter_mut().enumerate() {
                let at = i * slots + m;
                let (made, by) = ((chunk.log_decay[at], chunk.v[at]), (grads.log_decay[at], grads.v[at]));
                *d = pull_absorb(made, by, &mut to.d_carry[m]);
            }
            pull_raw(to, "slots", i, key_dim, d.into_iter());
        }
    }

    fn max_error(&self) -> f64 {
        2e-5
    }
}

/// Slots chosen token by token: the decays are multiplied by a routing that is 0 but for `top_k` slots, and a slot is
/// written as much as it fades, `1 - e^g`; the others are left alone.
///
/// The routing of a chosen slot is the sigmoid of its logit. Extra inputs: `log_decay`, `router [batch, heads, tokens,
/// slots]`. This is our reading of the slot router of Raven: no vectors of its authors were at hand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Raven {
    /// What it shares with the others.
    pub slots: Slots,
    /// Slots a token may change.
    pub top_k: usize,
}

impl Raven {
    /// Whether slot `m` is among the chosen.
    fn routes(&self, raw: &[f32], m: usize) -> bool {
        let ahead = raw.iter().enumerate().filter(|(n, x)| **x > raw[m] || (**x == raw[m] && *n < m)).count();
        ahead < self.top_k
    }
}

impl StateVariant for Raven {
    const NAME: &'static str = "raven";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("router", Width::Any), Extra::rows("log_decay", Width::Any)];
    const SUMMARY: &'static str = "Raven: gated slots, of which a token changes a few";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        SLOTS,
        OptionSpec { name: "top_k", default: "4", help: "slots a token may change" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let slots = Slots::read(Self::NAME, options)?;
        let top_k = options.get_or("top_k", 4)?;
        if top_k == 0 {
            return Err(AttnError::value("option `top_k`", 0, "at least 1"));
        }
        Ok(Self { slots: Slots { scale: Some(slots.scale.unwrap_or(1.0)), ..slots }, top_k })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let slots = self.slots.count(["router", "log_decay"].map(|name| sizes.width(name)))?;
        self.slots.plan(Self::NAME, slots, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        copy_qk(x, chunk);
        let slots = (chunk.v.len() / x.len().max(1)).max(1);
        let rows = chunk.log_decay.chunks_exact_mut(slots).zip(chunk.v.chunks_exact_mut(slots));
        for (i, (g, s)) in rows.enumerate() {
            // `s` holds the logits until the routing is known.
            s.iter_mut().zip(raw_slots(x, "router", i)).for_each(|(s, raw)| *s = raw);
            for m in 0..slots {
                let given = x.extra("log_decay").map_or(log_sigmoid(s[m]) / 8.0, |rows| rows.row(i)[m]);
                g[m] = if self.routes(s, m) { given * sigmoid(s[m]) } else { 0.0 };
            }
            s.iter_mut().zip(&*g).for_each(|(s, g)| *s = -g.exp_m1());
        }
    }

    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        second_pass(x, first, reads, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    ) {
        pull_second(second, grads, d_reads, gained, to);
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull_qk(grads, to);
        let (key_dim, slots) = (x.k.width(), (chunk.v.len() / x.len().max(1)).max(1));
        for i in 0..x.len() {
            let raw: Vec<f32> = raw_slots(x, "router", i).take(slots).collect();
            let mut d_raw = vec![0.0; slots];
            for (m, d_raw) in d_raw.iter_mut().enumerate().filter(|(m, _)| self.routes(&raw, *m)) {
                let at = i * slots + m;
                let d_g = grads.log_decay[at] - chunk.log_decay[at].exp() * grads.v[at];
                let (open, slope) = (sigmoid(raw[m]), sigmoid(raw[m]) * sigmoid(-raw[m]));
                let given = x.extra("log_decay").map_or(log_sigmoid(raw[m]) / 8.0, |rows| rows.row(i)[m]);
                *d_raw = d_g * given * slope;
                match to.extra("log_decay") {
                    Some(rows) => rows[at] = d_g * open,
                    None => *d_raw += d_g * open * sigmoid(-raw[m]) / 8.0,
                }
            }
            pull_raw(to, "router", i, key_dim, d_raw.into_iter());
        }
    }

    fn max_error(&self) -> f64 {
        2e-5
    }
}
