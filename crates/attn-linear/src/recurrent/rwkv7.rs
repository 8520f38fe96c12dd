//! RWKV-7: what is taken out of the state and what is written go along different directions.

use super::front::{self, CAUSAL, FINE_CHUNK, LOG_DECAY, UNIT_SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, EraseAt, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width, copy_or,
};
use attn_core::Result;
use attn_core::registry::OptionSpec;
use attn_core::view::Rows;

/// With `kk = k o k_k` divided by its length and the in-context rate `alpha`:
///
/// ```text
/// S_t = diag(e^w_t) S_(t-1) + (kk o alpha) (-kk^T S_(t-1)) + (k o (1 + (alpha - 1) o k_a)) v_t^T      o_t = scale q_t^T S_t
/// ```
///
/// The erase reads the state before it fades. Extra inputs: `log_decay`, `alpha [batch, heads, tokens, head_dim]`,
/// `k_k`, `k_a [heads, head_dim]`. Group norm, the own-token bonus and the gate after it are the layer's.
///
/// Source: Peng et al. 2025 (RWKV-7 "Goose"), equations 3 to 8 and 17.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rwkv7 {
    /// Multiplies the output.
    pub scale: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// `alpha` where none is given.
    pub alpha: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Rwkv7 {
    const NAME: &'static str = "rwkv7";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("log_decay", Width::Key),
        Extra::rows("alpha", Width::Key),
        Extra::head("k_k", Width::Key),
        Extra::head("k_a", Width::Key),
    ];
    const SUMMARY: &'static str =
        "RWKV-7: a generalised delta rule with a decay for every key channel (Peng et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        LOG_DECAY,
        OptionSpec { name: "alpha", default: "0.5", help: "in-context rate, where no tensor gives it" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            log_decay: front::log_decay(options, -0.05)?,
            alpha: front::finite(options, "alpha", 0.5)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let (decay, erase, erase_at) = (Decay::Key, Erase::Untied, EraseAt::Before);
        Ok(Plan::new(Options { decay, erase, erase_at, scale: self.scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        let width = x.k.width();
        front::copy_qkv(x, chunk);
        front::copy_decays(x, self.log_decay, chunk);
        copy_or(x.extra("alpha"), self.alpha, &mut chunk.b);
        let (k_k, k_a) = (x.extra("k_k"), x.extra("k_a"));
        let rows = chunk.k.chunks_exact_mut(width).zip(chunk.a.chunks_exact_mut(width));
        for (i, ((k, a), b)) in rows.zip(chunk.b.chunks_exact_mut(width)).enumerate() {
            for (c, (a, k)) in a.iter_mut().zip(&*k).enumerate() {
                *a = -k * k_k.map_or(1.0, |rows| rows.row(i)[c]);
            }
            let length = a.iter().map(|a| a * a).sum::<f32>().sqrt().max(1e-12);
            a.iter_mut().for_each(|a| *a /= length);
            for (c, ((k, a), b)) in k.iter_mut().zip(&*a).zip(b).enumerate() {
                *k *= 1.0 + (*b - 1.0) * k_a.map_or(1.0, |rows| rows.row(i)[c]);
                *b *= -a;
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let width = x.k.width();
        pull::qkv(grads, to);
        pull::decays(grads, to);
        let (alphas, k_k, k_a) = (x.extra("alpha"), x.extra("k_k"), x.extra("k_a"));
        for i in 0..x.len() {
            let own = i * width..(i + 1) * width;
            let (k, minus_kk) = (x.k.row(i), &chunk.a[own.clone()]);
            let (da, db, dk) = (&grads.a[own.clone()], &grads.b[own.clone()], &grads.k[own.clone()]);
            let by =
                |rows: Option<Rows<'_, f32>>, c: usize, default| rows.map_or(default, |rows| rows.row(i)[c]);
            // a = -kk, b = kk o alpha.
            let d_kk: Vec<f32> = (0..width).map(|c| by(alphas, c, self.alpha) * db[c] - da[c]).collect();
            let along: f32 = minus_kk.iter().zip(&d_kk).map(|(a, d)| -a * d).sum();
            let turned = (0..width).map(|c| (k[c] * by(k_k, c, 1.0)).powi(2)).sum::<f32>();
            let length = turned.sqrt().max(1e-12);
            for (c, at) in own.enumerate() {
                let (alpha, k_k, k_a) = (by(alphas, c, self.alpha), by(k_k, c, 1.0), by(k_a, c, 1.0));
                let dz = (d_kk[c] + minus_kk[c] * along) / length;
                to.k[at] = dk[c] * (1.0 + (alpha - 1.0) * k_a) + k_k * dz;
                to.add("k_k", at, k[c] * dz);
                to.add("k_a", at, k[c] * (alpha - 1.0) * dk[c]);
                to.add("alpha", at, k[c] * k_a * dk[c] - minus_kk[c] * db[c]);
            }
        }
    }
}
