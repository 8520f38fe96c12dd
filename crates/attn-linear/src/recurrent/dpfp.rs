//! Fast weights with the delta rule on deterministic parameter-free projections of queries and keys.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, UNIT_SCALE};
use super::pull;
use crate::matrix_state::{Chunk, Erase, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, copy};
use attn_core::registry::OptionSpec;
use attn_core::view::Rows;
use attn_core::{AttnError, Result};

/// With `y = [relu x, relu -x]`, the features are `y_i y_(i+j)` for the shifts `j = 1 .. nu` (cyclic), divided by their sum
/// + 1e-6: `2 nu head_dim` of them. On these,
///
/// ```text
/// S_t = S_(t-1) + beta_t phi(k_t) (v_t - S_(t-1)^T phi(k_t))^T          o_t = scale S_t^T phi(q_t)
/// ```
///
/// Extra input: `beta [batch, heads, tokens]`.
///
/// Source: Schlag, Irie, Schmidhuber 2021 (Linear Transformers Are Secretly Fast Weight Programmers), equations 24 and 37.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FwpDpfp {
    /// Multiplies the output.
    pub scale: f32,
    /// Shifts.
    pub nu: usize,
    /// The write strength where none is given.
    pub beta: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl FwpDpfp {
    fn features(&self, rows: Rows<'_, f32>, out: &mut [f32]) {
        let both = 2 * rows.width();
        for (x, out) in rows.iter().zip(out.chunks_exact_mut(self.nu * both)) {
            let part = |i: usize| {
                let i = i % both;
                if i < x.len() { x[i].max(0.0) } else { (-x[i - x.len()]).max(0.0) }
            };
            for (shift, out) in out.chunks_exact_mut(both).enumerate() {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = part(i) * part(i + both - shift - 1));
            }
            let sum: f32 = out.iter().sum();
            out.iter_mut().for_each(|out| *out /= sum + 1e-6);
        }
    }
}

impl FwpDpfp {
    /// From the gradients of `features` to those of the rows.
    fn pull_features(&self, rows: Rows<'_, f32>, features: &[f32], d_features: &[f32], d_rows: &mut [f32]) {
        let (own, both) = (rows.width(), 2 * rows.width());
        let all = features.chunks_exact(self.nu * both).zip(d_features.chunks_exact(self.nu * both));
        for ((x, (f, d_f)), d_x) in rows.iter().zip(all).zip(d_rows.chunks_exact_mut(own)) {
            let sides: Vec<f32> =
                x.iter().map(|x| x.max(0.0)).chain(x.iter().map(|x| (-x).max(0.0))).collect();
            let partner = |i: usize, shift: usize| (i + both - shift - 1) % both;
            let product = |at: usize| sides[at % both] * sides[partner(at % both, at / both)];
            let sum: f32 = (0..self.nu * both).map(product).sum::<f32>() + 1e-6;
            let along: f32 = f.iter().zip(d_f).map(|(f, d)| f * d).sum();
            let mut d_sides = vec![0.0; both];
            for (at, d_f) in d_f.iter().enumerate() {
                let (i, j) = (at % both, partner(at % both, at / both));
                let d = (d_f - along) / sum;
                d_sides[i] += d * sides[j];
                d_sides[j] += d * sides[i];
            }
            for (c, (d_x, x)) in d_x.iter_mut().zip(x).enumerate() {
                *d_x = if *x > 0.0 {
                    d_sides[c]
                } else if *x < 0.0 {
                    -d_sides[c + own]
                } else {
                    0.0
                };
            }
        }
    }
}

impl StateVariant for FwpDpfp {
    const NAME: &'static str = "fwp-dpfp";
    const EXTRAS: &'static [Extra] = &[Extra::scalar("beta")];
    const SUMMARY: &'static str = "Fast weights: the delta rule on DPFP features (Schlag et al. 2021)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        OptionSpec { name: "nu", default: "1", help: "shifts of the feature map; 2 nu head_dim features" },
        BETA,
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let nu = options.get_or("nu", 1)?;
        if nu == 0 {
            return Err(AttnError::value("option `nu`", 0, "at least 1"));
        }
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            nu,
            beta: front::finite(options, "beta", 0.5)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, 2 * self.nu * sizes.head_dim, sizes.head_dim_v);
        let (erase, chunk_len) = (Erase::Tied, self.chunk_len);
        Ok(Plan::new(Options { erase, scale: self.scale, chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.features(x.q, &mut chunk.q);
        self.features(x.k, &mut chunk.k);
        copy(x.v, &mut chunk.v);
        let width = 2 * self.nu * x.k.width();
        front::delta(chunk, width, x.v.width(), |w| x.number("beta", w, self.beta));
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let width = 2 * self.nu * x.k.width();
        let (mut d_k, mut betas) = (grads.k.clone(), vec![0.0; x.len()]);
        let values = (0..x.len()).map(|w| x.v.row(w));
        let beta = |w: usize| x.number("beta", w, self.beta);
        pull::delta(chunk, grads, width, values, beta, [&mut d_k, to.v], |w, d| betas[w] = d);
        betas.into_iter().enumerate().for_each(|(w, d)| to.add("beta", w, d));
        self.pull_features(x.q, &chunk.q, &grads.q, to.q);
        self.pull_features(x.k, &chunk.k, &d_k, to.k);
    }
}
