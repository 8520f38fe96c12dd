//! Linear attention with positive features and a normaliser: an average of values with weights `phi(q) . phi(k)`.

use crate::CHUNK_LEN;
use crate::feature_map::{EluPlusOne, FeatureMap};
use crate::matrix_state::{Chunk, Extra, Given, Options, Plan, Pull, Reads, Sizes, StateVariant, Tokens};
use crate::recurrent::{front, pull};
use attn_core::registry::OptionSpec;
use attn_core::simd::{Simd, SimdOp};
use attn_core::{AttnError, Result};

/// Linear attention with `phi(x) = elu(x) + 1`:
///
/// ```text
/// S_t = S_(t-1) + phi(k_t) v_t^T      z_t = z_(t-1) + phi(k_t)
/// o_t = scale S_t^T phi(q_t) / (scale phi(q_t) . z_t + eps)
/// ```
///
/// and the same with the sums over all keys without `causal`.
///
/// Source: Katharopoulos, Vyas, Pappas, Fleuret 2020 (Transformers are RNNs).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearElu {
    /// Multiplies the weights; cancels in the quotient but for `eps`.
    pub scale: f32,
    /// Added to the sum of weights.
    pub eps: f32,
    /// A query sees no key after its own position; the last query stands at the last key.
    pub causal: bool,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Default for LinearElu {
    fn default() -> Self {
        Self { scale: 1.0, eps: 1e-10, causal: false, chunk_len: CHUNK_LEN }
    }
}

impl LinearElu {
    fn check(&self) -> Result<()> {
        if self.eps.is_finite() && self.eps >= 0.0 {
            return Ok(());
        }
        Err(AttnError::value("eps", self.eps, "a finite number, at least 0"))
    }
}

impl StateVariant for LinearElu {
    const NAME: &'static str = "linear-elu";
    const EXTRAS: &'static [Extra] = &[];
    const SUMMARY: &'static str =
        "Linear attention with elu + 1 features and a normaliser (Katharopoulos et al. 2020)";
    const OPTIONS: &'static [OptionSpec] = &[
        OptionSpec::CAUSAL,
        OptionSpec { name: "scale", default: "1", help: "multiplies the weights" },
        OptionSpec { name: "eps", default: "1e-10", help: "added to the sum of weights" },
        front::CHUNK,
    ];
    const GIVEN: Given = Given { q: false, k: false, v: true };
    const CROSS: bool = true;
    const FINISHES: bool = true;
    const DIFFERENTIABLE: bool = true;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let elu = Self {
            scale: front::finite(options, "scale", 1.0)?,
            eps: options.get_or("eps", 1e-10)?,
            causal: options.get_or("causal", false)?,
            chunk_len: front::chunk_len(options, CHUNK_LEN)?,
        };
        elu.check().map(|()| elu)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.check()?;
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let plan = Plan::new(Options { norm: true, scale: self.scale, chunk_len: self.chunk_len, ..o });
        Ok(Plan { causal: self.causal, ..plan.with_norm("initial_normaliser", "zT") })
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        EluPlusOne.apply(x.isa, x.q, &mut chunk.q);
        EluPlusOne.apply(x.isa, x.k, &mut chunk.k);
    }

    fn finish(&self, x: &Tokens<'_>, _: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        x.isa.run(Divide { reads, eps: self.eps, width: x.v.width(), out });
    }

    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        _: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        [d_rows, d_norms]: [&mut [f32]; 2],
        _: &mut Pull<'_>,
    ) {
        let width = x.v.width();
        let rows = d_rows.chunks_exact_mut(width).zip(d_out.chunks_exact(width));
        let rows = rows.zip(reads.rows.chunks_exact(width)).zip(reads.norms.iter().zip(d_norms));
        for (((d_row, d_out), row), (norm, d_norm)) in rows {
            let factor = factor(reads.scale, *norm, self.eps);
            d_row.iter_mut().zip(d_out).for_each(|(d_row, d)| *d_row = factor * d);
            let along: f32 = row.iter().zip(&*d_row).map(|(read, d)| read * d).sum();
            *d_norm = -factor * along;
        }
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        for (x, features, d) in [(x.q, &chunk.q, &mut *to.q), (x.k, &chunk.k, &mut *to.k)] {
            let width = x.width();
            for ((x, features), d) in
                x.iter().zip(features.chunks_exact(width)).zip(d.chunks_exact_mut(width))
            {
                // The slope of `e^x` is itself.
                d.iter_mut()
                    .zip(x)
                    .zip(features)
                    .for_each(|((d, x), f)| *d *= if *x > 0.0 { 1.0 } else { *f });
            }
        }
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn is_convex(&self) -> bool {
        true
    }
}

/// What a read is multiplied by: `scale / (scale norm + eps)`, 0 where that divides by 0.
fn factor(scale: f32, norm: f32, eps: f32) -> f32 {
    let divisor = scale * norm + eps;
    if divisor == 0.0 { 0.0 } else { scale / divisor }
}

/// Divides what was read by the sum of its weights.
struct Divide<'a> {
    reads: Reads<'a>,
    eps: f32,
    width: usize,
    out: &'a mut [f32],
}

impl SimdOp for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { reads, eps, width, out } = self;
        let rows = out.chunks_exact_mut(width).zip(reads.rows.chunks_exact(width)).zip(reads.norms);
        for ((out, read), norm) in rows {
            let factor = factor(reads.scale, *norm, eps);
            out.iter_mut().zip(read).for_each(|(o, x)| *o = factor * x);
        }
    }
}
