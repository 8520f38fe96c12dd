//! Retention: linear attention whose state fades at a constant rate, another one in each head.

use crate::CHUNK_LEN;
use crate::engine::{Decay, Normaliser, Spec};
use crate::variant::Variant;
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
        let (first, last) = ((1.0f64 / 32.0).ln(), (1.0f64 / 512.0).ln());
        let step = if n_heads > 1 { (last - first) / (n_heads - 1) as f64 } else { 0.0 };
        let fading = |h: usize| match self {
            Self::Fla => (-5.0 - h as f64).exp2(),
            Self::Torchscale => (first + h as f64 * step).exp(),
        };
        (0..n_heads).map(|h| (-fading(h)).ln_1p() as f32).collect()
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

impl Variant for RetNet {
    const NAME: &'static str = "retnet";

    fn spec(&self, n_heads_q: usize, head_dim: usize) -> Result<Spec> {
        let log_decay = self.log_decay.clone().unwrap_or_else(|| self.gammas.log_decay(n_heads_q));
        Ok(Spec {
            name: Self::NAME,
            causal: true,
            scale: softmax_scale_or_default(self.scale, head_dim)?,
            features: None,
            decay: Decay::PerHead(log_decay),
            normaliser: Normaliser::None,
            chunk_len: self.chunk_len,
        })
    }

    fn is_causal(&self) -> bool {
        true
    }
}
