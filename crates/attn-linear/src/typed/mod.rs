//! Inputs of the variants as types: the names of the field, in one order everywhere.
//!
//! A call's inputs are a struct: queries, keys and values first (or what a variant calls them), then what fades
//! (`log_decay`, `slope`, `dt`, ...), then how strongly is written (`beta`, gates), then the rest. [`InputsOf`] says which variants
//! take which of them, so that an input that a variant does not know does not compile. The tensors are [`Numbers`]
//! ([`LinearAttention::typed`](crate::LinearAttention::typed)) or candle tensors (`LinearAttention::on_tensors`).
//!
//! ```
//! use attn_core::{View, ViewMut};
//! use attn_linear::typed::GatedDelta;
//! use attn_linear::{LinearAttention, recurrent::GatedDeltaNet};
//!
//! let (heads, n, d) = (2, 5, 8);
//! let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
//! let (g, beta) = (vec![-0.1; heads * n], vec![0.7; heads * n]);
//! let rows = |name| View::contiguous(name, &x[..], [1, heads, n, d]).map(Into::into);
//! let gates = |name, data| View::contiguous(name, data, [1, heads, n, 1]).map(Into::into);
//!
//! let attention = LinearAttention::<GatedDeltaNet>::configured([("qk_norm", "true")])?;
//! let inputs = attention.typed(GatedDelta {
//!     q: rows("q")?,
//!     k: rows("k")?,
//!     v: rows("v")?,
//!     log_decay: gates("log_decay", &g[..])?,
//!     beta: gates("beta", &beta[..])?,
//! })?;
//! let (mut out, mut memory) = (vec![0.0; x.len()], attention.memory(&inputs)?);
//! let view = ViewMut::contiguous("out", &mut out, [1, heads, n, d])?;
//! attention.forward_inputs(&inputs, view.into(), Some(&mut memory))?;
//! # Ok::<(), attn_core::AttnError>(())
//! ```

mod numbers;

use crate::matrix_state::StateVariant;
use crate::recurrent::{
    DeltaNet, DeltaProduct, FwpDpfp, GatedDeltaNet, GatedDeltaProduct, GatedOja, Gla, Gsa, Kda, Lightning,
    Mamba2, Rwkv5, Rwkv6, Rwkv7, SimpleGla,
};
use crate::retnet::RetNet;
pub use numbers::Numbers;

/// The tensors of a call and the names that the engine knows them by.
pub trait Fields {
    /// A tensor.
    type Tensor;

    /// All that are given.
    fn fields(self) -> Vec<(&'static str, Self::Tensor)>;
}

/// Inputs that the variant `V` takes.
pub trait InputsOf<V: StateVariant>: Fields {}

/// Queries, keys and values; everything else is a constant of the configuration. Every variant takes them.
#[derive(Debug, Clone, Copy)]
pub struct Plain<T> {
    /// Queries `[batch, heads, n, head_dim]`.
    pub q: T,
    /// Keys `[batch, heads, n, head_dim]`.
    pub k: T,
    /// Values `[batch, heads, n, head_dim_v]`.
    pub v: T,
}

impl<T> Fields for Plain<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        vec![("q", self.q), ("k", self.k), ("v", self.v)]
    }
}

impl<V: StateVariant, T> InputsOf<V> for Plain<T> {}

/// A memory that fades: GLA, simple GLA, RetNet.
#[derive(Debug, Clone, Copy)]
pub struct Decayed<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// Natural logs, at most 0: `[batch, heads, n, head_dim]`, simple GLA `[batch, heads, n, 1]`, RetNet one a head.
    pub log_decay: T,
}

impl<T> Fields for Decayed<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        vec![("q", self.q), ("k", self.k), ("v", self.v), ("log_decay", self.log_decay)]
    }
}

impl<T> InputsOf<Gla> for Decayed<T> {}
impl<T> InputsOf<SimpleGla> for Decayed<T> {}
impl<T> InputsOf<RetNet> for Decayed<T> {}

/// Lightning attention: a slope for every head, whose decay is `e^-slope`.
#[derive(Debug, Clone, Copy)]
pub struct Sloped<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// One a head.
    pub slope: T,
}

impl<T> Fields for Sloped<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        vec![("q", self.q), ("k", self.k), ("v", self.v), ("slope", self.slope)]
    }
}

impl<T> InputsOf<Lightning> for Sloped<T> {}

/// The delta rule: DeltaNet, DeltaProduct, fast weights with DPFP features.
#[derive(Debug, Clone, Copy)]
pub struct Delta<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`]; several a token for DeltaProduct.
    pub k: T,
    /// As in [`Plain`]; several a token for DeltaProduct.
    pub v: T,
    /// Write strengths `[batch, heads, n, 1]`, one for each key.
    pub beta: T,
}

impl<T> Fields for Delta<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        vec![("q", self.q), ("k", self.k), ("v", self.v), ("beta", self.beta)]
    }
}

impl<T> InputsOf<DeltaNet> for Delta<T> {}
impl<T> InputsOf<DeltaProduct> for Delta<T> {}
impl<T> InputsOf<FwpDpfp> for Delta<T> {}

/// The delta rule over a memory that fades: Gated DeltaNet, KDA, gated DeltaProduct, gated Oja.
#[derive(Debug, Clone, Copy)]
pub struct GatedDelta<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// Natural logs, at most 0: `[batch, heads, n, 1]`, KDA `[batch, heads, n, head_dim]`, gated Oja `[.., head_dim_v]`.
    pub log_decay: T,
    /// Write strengths `[batch, heads, n, 1]`.
    pub beta: T,
}

impl<T> Fields for GatedDelta<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let Self { q, k, v, log_decay, beta } = self;
        vec![("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)]
    }
}

impl<T> InputsOf<GatedDeltaNet> for GatedDelta<T> {}
impl<T> InputsOf<Kda> for GatedDelta<T> {}
impl<T> InputsOf<GatedDeltaProduct> for GatedDelta<T> {}
impl<T> InputsOf<GatedOja> for GatedDelta<T> {}

/// Gated DeltaNet and KDA before their gate: `log_decay = -e^a_log softplus(gate_raw + dt_bias)`.
#[derive(Debug, Clone, Copy)]
pub struct RawGatedDelta<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// Shaped as the log decay.
    pub gate_raw: T,
    /// One a head.
    pub a_log: T,
    /// One a head, for KDA one a head and channel.
    pub dt_bias: T,
    /// Write strengths `[batch, heads, n, 1]`.
    pub beta: T,
}

impl<T> Fields for RawGatedDelta<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let Self { q, k, v, gate_raw, a_log, dt_bias, beta } = self;
        let gates = [("gate_raw", gate_raw), ("a_log", a_log), ("dt_bias", dt_bias), ("beta", beta)];
        [("q", q), ("k", k), ("v", v)].into_iter().chain(gates).collect()
    }
}

impl<T> InputsOf<GatedDeltaNet> for RawGatedDelta<T> {}
impl<T> InputsOf<Kda> for RawGatedDelta<T> {}

/// Mamba-2, in its own letters: `C` reads, `B` is the key, `x` is written.
#[derive(Debug, Clone, Copy)]
pub struct StateSpace<T> {
    /// `C [batch, heads, n, state]`.
    pub c: T,
    /// `B [batch, heads, n, state]`.
    pub b: T,
    /// `x [batch, heads, n, width]`.
    pub x: T,
    /// Step sizes `[batch, heads, n, 1]`.
    pub dt: T,
    /// `A`, below 0, one a head.
    pub a: T,
    /// The skip `D`, one a head.
    pub d: Option<T>,
    /// Added to `dt`, one a head.
    pub dt_bias: Option<T>,
}

impl<T> Fields for StateSpace<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let all = vec![("q", self.c), ("k", self.b), ("v", self.x), ("dt", self.dt), ("a", self.a)];
        let more = [("d", self.d), ("dt_bias", self.dt_bias)];
        all.into_iter().chain(more.into_iter().filter_map(|(name, x)| Some((name, x?)))).collect()
    }
}

impl<T> InputsOf<Mamba2> for StateSpace<T> {}

/// RWKV-5 and RWKV-6.
#[derive(Debug, Clone, Copy)]
pub struct Receptance<T> {
    /// Receptance, the query, as in [`Plain`].
    pub r: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// `[batch, heads, n, head_dim]`; RWKV-5 one a head and channel.
    pub log_decay: T,
    /// The bonus `u` of a token's own write, one a head and channel.
    pub bonus: T,
}

impl<T> Fields for Receptance<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let Self { r, k, v, log_decay, bonus } = self;
        vec![("q", r), ("k", k), ("v", v), ("log_decay", log_decay), ("bonus", bonus)]
    }
}

impl<T> InputsOf<Rwkv5> for Receptance<T> {}
impl<T> InputsOf<Rwkv6> for Receptance<T> {}

/// RWKV-7.
#[derive(Debug, Clone, Copy)]
pub struct Goose<T> {
    /// Receptance, the query, as in [`Plain`].
    pub r: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// `[batch, heads, n, head_dim]`.
    pub log_decay: T,
    /// In-context learning rates `[batch, heads, n, head_dim]`.
    pub alpha: T,
    /// Multiplies the removed key, one a head and channel.
    pub k_k: T,
    /// Multiplies the written key, one a head and channel.
    pub k_a: T,
}

impl<T> Fields for Goose<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let Self { r, k, v, log_decay, alpha, k_k, k_a } = self;
        let more = [("log_decay", log_decay), ("alpha", alpha), ("k_k", k_k), ("k_a", k_a)];
        [("q", r), ("k", k), ("v", v)].into_iter().chain(more).collect()
    }
}

impl<T> InputsOf<Rwkv7> for Goose<T> {}

/// Gated slot attention.
#[derive(Debug, Clone, Copy)]
pub struct Slotted<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// Natural logs, at most 0, `[batch, heads, n, slots]`.
    pub log_decay: T,
    /// How much a token writes to each slot, `[batch, heads, n, slots]`.
    pub slots: T,
}

impl<T> Fields for Slotted<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        let Self { q, k, v, log_decay, slots } = self;
        vec![("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("slots", slots)]
    }
}

impl<T> InputsOf<Gsa> for Slotted<T> {}

/// Any further inputs behind q, k and v by the engine's names for them, which the variant's documentation lists: for the
/// variants that the types above do not serve. A name that the variant does not know is an error when it is called.
#[derive(Debug, Clone)]
pub struct More<T> {
    /// As in [`Plain`].
    pub q: T,
    /// As in [`Plain`].
    pub k: T,
    /// As in [`Plain`].
    pub v: T,
    /// Names and tensors.
    pub more: Vec<(&'static str, T)>,
}

impl<T> Fields for More<T> {
    type Tensor = T;

    fn fields(self) -> Vec<(&'static str, T)> {
        [("q", self.q), ("k", self.k), ("v", self.v)].into_iter().chain(self.more).collect()
    }
}

impl<V: StateVariant, T> InputsOf<V> for More<T> {}
