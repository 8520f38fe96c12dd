//! Everything a call takes, drawn from bytes.

use super::bytes::Bytes;
use super::gradients::Gradients;
use super::masks::{MaskCase, align, window};
use super::numbers::{all_finite, largest, numbers};
use super::score_mods::ScoreCase;
use super::sequences::Sequences;
use super::tensor::{Layout, Tensor};
use attn_core::dropout::Dropout;
use attn_core::mask::Mask;
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::score::ScoreMod;
use attn_core::{DType, Result};
use attn_flash::{Flash, HalfProducts, TileSizes};

#[derive(Debug, Clone)]
enum DropoutCase {
    Random { p: f32, seed: u64 },
    Given { p: f32, keep: Vec<bool>, shape: Vec<usize> },
}

#[derive(Debug, Clone)]
struct NormCase {
    kind: NormKind,
    gamma_q: Option<Vec<f32>>,
    gamma_k: Option<Vec<f32>>,
}

/// One call: what it reads, how it is configured, where it writes.
#[derive(Debug, Clone)]
pub struct Call {
    pub flash: Flash,
    pub sequences: Sequences,
    masks: Vec<MaskCase>,
    score_mods: Vec<ScoreCase>,
    pub key_bias: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    dropout: Option<DropoutCase>,
    qk_norm: Option<NormCase>,
    tiles: Option<(usize, usize)>,
    pub out: Tensor,
    pub lse: Option<Vec<f32>>,
    pub gradients: Gradients,
}

/// The parts of a call that had to be built, which may fail.
pub struct Parts<'a> {
    pub masks: [Option<Box<dyn Mask + 'a>>; 2],
    pub score_mods: [Option<Box<dyn ScoreMod + 'a>>; 2],
    pub dropout: Option<Dropout<'a>>,
    pub qk_norm: Option<QkNorm<'a>>,
    pub flash: Flash,
}

impl Call {
    pub fn draw(bytes: &mut Bytes<'_>) -> Self {
        let sequences = Sequences::draw(bytes);
        let seen = sequences.seen;
        let flash = Flash {
            softmax_scale: match bytes.within(0..=11) {
                9 => Some(bytes.pick(&[0.0, -0.5, 1.0])),
                10 => Some(bytes.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY])),
                11 => Some(bytes.pick(&[1e30, 1e-30, f32::MAX, -1e20, 1e-45])),
                6..=8 => Some(bytes.within(1..=40) as f32 / 32.0),
                _ => None,
            },
            causal: bytes.one_in(3),
            align: align(bytes),
            window_left: window(bytes),
            window_right: window(bytes),
            softcap: match bytes.within(0..=11) {
                9 => Some(0.0),
                10 => Some(bytes.pick(&[20.0, 1.0, 1e-3, 1e30])),
                11 => Some(bytes.pick(&[-1.0, f32::NAN, f32::INFINITY])),
                _ => None,
            },
            tiles: None,
            half_products: HalfProducts::Auto,
        };
        let tiles = bytes.one_in(3).then(|| {
            let block_q = bytes.pick(&[32, 64, 96, 4096, usize::MAX & !31]);
            let block_kv = bytes.pick(&[1, 3, 16, 40, 64, 200, usize::MAX]);
            if bytes.one_in(16) { (bytes.within(0..=31), bytes.within(0..=1)) } else { (block_q, block_kv) }
        });
        let n_masks = bytes.within(0..=3).saturating_sub(1);
        let masks = (0..n_masks).map(|_| MaskCase::draw(bytes, &seen, 1)).collect();
        let n_score_mods = bytes.within(0..=4).saturating_sub(2);
        let score_mods = (0..n_score_mods).map(|_| ScoreCase::draw(bytes, &seen)).collect();
        let key_bias = bytes.one_in(6).then(|| {
            let all = sequences.n_keys();
            let len = if bytes.one_in(2) { sequences.n_entries() * seen.n_heads_kv * all } else { all };
            let len = bytes.about(len);
            let mut bias = numbers(bytes, len);
            if len > 0 && bytes.one_in(2) {
                // Padding, as others express it.
                let at = bytes.within(0..=len - 1);
                bias[at..].fill(f32::NEG_INFINITY);
            }
            bias
        });
        let sinks = bytes.one_in(6).then(|| {
            let len = bytes.about(seen.n_heads_q);
            numbers(bytes, len)
        });
        let dropout = bytes.one_in(6).then(|| {
            let p = bytes.pick(&[0.0, 0.1, 0.5, 1.0, 0.999_999_94, 0.9, f32::NAN, -0.1, 1.5]);
            if bytes.one_in(2) {
                return DropoutCase::Random { p, seed: bytes.word() };
            }
            let mut axes = vec![seen.batch, seen.n_heads_q, seen.n_q, seen.n_kv];
            super::masks::broadcast(bytes, &mut axes);
            let len = axes.iter().product();
            let (len, seed) = (bytes.about(len), bytes.word());
            let keep = (0..len as u64).map(|x| (x ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 0);
            DropoutCase::Given { p, keep: keep.collect(), shape: axes }
        });
        let qk_norm = bytes.one_in(6).then(|| {
            let eps = bytes.pick(&[1e-6, 1e-12, 1.0, 0.5, 0.0, -1.0, f32::NAN, f32::INFINITY]);
            let kind = if bytes.one_in(2) { NormKind::Rms { eps } } else { NormKind::L2 { eps } };
            let mut gamma = || {
                bytes.one_in(2).then(|| {
                    let len = bytes.about(seen.head_dim);
                    numbers(bytes, len)
                })
            };
            NormCase { kind, gamma_q: gamma(), gamma_k: gamma() }
        });
        let mut out_shape = sequences.out_shape();
        if bytes.one_in(24) {
            let axis = bytes.within(0..=3);
            out_shape[axis] = bytes.about(out_shape[axis].min(4096));
        }
        let dtype = if bytes.one_in(32) { bytes.pick(&DType::ALL) } else { sequences.q.dtype() };
        let repeats = bytes.one_in(24);
        let layout = Layout::of(bytes, out_shape, repeats);
        let rows = out_shape[..3].iter().fold(1usize, |rows, n| rows.saturating_mul(*n));
        let lse = bytes.one_in(2).then(|| vec![super::tensor::LSE_CANARY; bytes.about(rows.min(1 << 16))]);
        let lens = [&sinks, &key_bias].map(|numbers: &Option<Vec<f32>>| numbers.as_ref().map(Vec::len));
        let gradients = Gradients::draw(bytes, &sequences, lens[0], lens[1]);
        Self {
            flash,
            masks,
            score_mods,
            key_bias,
            sinks,
            dropout,
            qk_norm,
            tiles,
            out: Tensor::untouched(dtype, layout),
            lse,
            gradients,
            sequences,
        }
    }

    pub fn build(&self) -> Result<Parts<'_>> {
        let seen = &self.sequences.seen;
        let mask = |at: usize| self.masks.get(at).map(|mask| mask.build(seen)).transpose();
        let score_mod = |at: usize| self.score_mods.get(at).map(|score| score.build(seen)).transpose();
        let dropout = match &self.dropout {
            None => None,
            Some(DropoutCase::Random { p, seed }) => Some(Dropout::new(*p, *seed)?),
            Some(DropoutCase::Given { p, keep, shape }) => Some(Dropout::keep_mask(*p, keep, shape, seen)?),
        };
        let qk_norm = self.qk_norm.as_ref().map(|norm| QkNorm {
            kind: norm.kind,
            gamma_q: norm.gamma_q.as_deref(),
            gamma_k: norm.gamma_k.as_deref(),
        });
        let tiles = self.tiles.map(|(block_q, block_kv)| TileSizes::new(block_q, block_kv)).transpose()?;
        Ok(Parts {
            masks: [mask(0)?, mask(1)?],
            score_mods: [score_mod(0)?, score_mod(1)?],
            dropout,
            qk_norm,
            flash: Flash { tiles, ..self.flash },
        })
    }

    /// Everything but the tensors is finite.
    pub fn additions_finite(&self) -> bool {
        let finite = |numbers: &Option<Vec<f32>>| numbers.as_ref().is_none_or(|numbers| all_finite(numbers));
        self.score_mods.iter().all(ScoreCase::all_finite) && finite(&self.key_bias) && finite(&self.sinks)
    }

    /// The most that score mods, key bias and sinks can be in absolute value, where finite.
    pub fn additions(&self) -> f64 {
        let seen = &self.sequences.seen;
        let most = |numbers: &Option<Vec<f32>>| numbers.as_deref().map_or(0.0, largest);
        let score_mods: f64 = self.score_mods.iter().map(|score| score.reach(seen.n_q.max(seen.n_kv))).sum();
        let cap = self.flash.softcap.map_or(0.0, |cap| f64::from(cap.abs()));
        score_mods + cap + most(&self.key_bias) + most(&self.sinks)
    }

    /// The longest that normalised queries times normalised keys can be, if there is a norm.
    pub fn norm_bound(&self) -> Option<f64> {
        self.qk_norm.as_ref().map(|norm| {
            let d = self.sequences.seen.head_dim as f64;
            let length = match norm.kind {
                NormKind::Rms { .. } => d.sqrt(),
                NormKind::L2 { .. } => 1.0,
            };
            let most = |gamma: &Option<Vec<f32>>| gamma.as_deref().map_or(1.0, largest) * length;
            most(&norm.gamma_q) * most(&norm.gamma_k)
        })
    }

    pub fn gammas_finite(&self) -> bool {
        let finite = |gamma: &Option<Vec<f32>>| gamma.as_ref().is_none_or(|gamma| all_finite(gamma));
        self.qk_norm.as_ref().is_none_or(|norm| finite(&norm.gamma_q) && finite(&norm.gamma_k))
    }
}
