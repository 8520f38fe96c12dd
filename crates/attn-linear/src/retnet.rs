//! Retention: linear attention whose state fades at a constant rate, another one in each head.

use crate::CHUNK_LEN;
use crate::matrix_state::{
    Chunk, Decay, Extra, Given, Inputs, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width,
};
use crate::recurrent::{front, pull};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result, softmax_scale_or_default};

/// The heads' decays when none are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gammas {
    /// `gamma_h = 1 - 2^(-5-h)`, the paper's, as in flash-linear-attention.
    #[default]
    Fla,
    /// `gamma_h = 1 - e^x_h`, with `x` evenly spaced from `ln 1/32` to `ln 1/512` over the heads, as in torchscale.
    Torchscale,
}

impl Gammas {
    /// `ln gamma_h` for every head.
    pub fn log_decay(self, n_heads: usize) -> Vec<f32> {
        (0..n_heads).map(|head| self.of_head(head, n_heads)).collect()
    }

    /// `ln gamma_h` for one of the heads.
    pub fn of_head(self, head: usize, n_heads: usize) -> f32 {
        let (first, last) = ((1.0f64 / 32.0).ln(), (1.0f64 / 512.0).ln());
        let step = if n_heads > 1 { (last - first) / (n_heads - 1) as f64 } else { 0.0 };
        let fading = match self {
            Self::Fla => (-5.0 - head as f64).exp2(),
            Self::Torchscale => (first + head as f64 * step).exp(),
        };
        (-fading).ln_1p() as f32
    }
}

impl std::str::FromStr for Gammas {
    type Err = AttnError;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "fla" => Ok(Self::Fla),
            "torchscale" => Ok(Self::Torchscale),
            _ => Err(AttnError::value("gammas", s, "fla or torchscale")),
        }
    }
}

/// Retention, the token mixer of RetNet:
///
/// ```text
/// S_t = gamma_h S_(t-1) + k_t v_t^T      o_t = scale S_t^T q_t  =  scale sum_(j<=t) gamma_h^(t-j) (q_t . k_j) v_j
/// ```
///
/// Causal only. The rotation of queries and keys before it, and the group norm and gate after it, are the layer's.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; one decay a query head.
///
/// Source: Sun et al. 2023 (Retentive Network), equations 3 to 7.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::{LinearAttention, RetNet};
///
/// let (heads, n, d) = (2, 5, 4);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// LinearAttention::new(RetNet::default()).forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// let own: f32 = x[..d].iter().map(|x| x * x / 2.0).sum();
/// assert!((out[1] - own * x[1]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RetNet {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// The decays, where `log_decay` gives none.
    pub gammas: Gammas,
    /// `ln gamma` of each query head, at most 0.
    pub log_decay: Option<Vec<f32>>,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Default for RetNet {
    fn default() -> Self {
        Self { scale: None, gammas: Gammas::Fla, log_decay: None, chunk_len: CHUNK_LEN }
    }
}

impl RetNet {
    fn log_decay(&self, x: &Tokens<'_>) -> f32 {
        match (x.extra("log_decay"), &self.log_decay) {
            (Some(given), _) if !given.is_empty() => given.row(0)[0],
            (_, Some(log_decay)) => log_decay[x.head],
            _ => self.gammas.of_head(x.head, x.heads),
        }
    }
}

fn check(log_decay: &[f32]) -> Result<()> {
    match log_decay.iter().find(|g| g.is_nan() || **g > 0.0) {
        Some(g) => Err(AttnError::value("log_decay", g, "at most 0 (a natural log)")),
        None => Ok(()),
    }
}

impl StateVariant for RetNet {
    const NAME: &'static str = "retnet";
    const EXTRAS: &'static [Extra] = &[Extra::head("log_decay", Width::One)];
    const SUMMARY: &'static str =
        "Retention: a state that fades at a constant rate a head, no group norm (Sun et al. 2023)";
    const OPTIONS: &'static [OptionSpec] = &[
        OptionSpec { name: "causal", default: "true", help: "always true: retention has no other form" },
        front::SCALE,
        OptionSpec {
            name: "gammas",
            default: "fla",
            help: "decays: fla = 1 - 2^(-5-h), torchscale = 1 - 1/32 .. 1 - 1/512",
        },
        front::CHUNK,
    ];
    const GIVEN: Given = Given::QKV;
    const CROSS: bool = true;
    const DIFFERENTIABLE: bool = true;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let gammas: String = options.get_or("gammas", "fla".into())?;
        let chunk_len = front::chunk_len(options, CHUNK_LEN)?;
        Ok(Self { scale: front::scale(options)?, gammas: gammas.parse()?, log_decay: None, chunk_len })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        if let Some(log_decay) = &self.log_decay {
            check(log_decay)?;
            if log_decay.len() != sizes.heads {
                return Err(AttnError::shape("log_decay", "n_heads_q", log_decay.len(), sizes.heads));
            }
        }
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Scalar, scale, chunk_len: self.chunk_len, ..o }))
    }

    fn check_inputs(&self, x: &Inputs<'_>) -> Result<()> {
        let Some(given) = x.extra("log_decay") else { return Ok(()) };
        let [batch, heads, _, _] = given.shape();
        let mut all = (0..batch).flat_map(|batch| (0..heads).map(move |head| given.head(batch, head)));
        all.try_for_each(|rows| rows.iter().try_for_each(check))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        chunk.log_decay.fill(self.log_decay(x));
    }

    fn pull(&self, _: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        // One number for all tokens: the first one's gradient is that of the chunk.
        to.add("log_decay", 0, grads.log_decay.iter().sum());
    }
}
