//! The common ground of the `attn` workspace.
//!
//! - **The contract**: [`Attention`] with its companions [`SoftmaxAttention`], [`Streaming`] and [`Differentiable`]; what a variant
//!   promises ([`Profile`]) and costs ([`Cost`]); variants by name ([`registry`]).
//! - **The problem**: sizes ([`AttnShape`]), strided views ([`View`], [`Qkv`], [`OutMut`]), who sees whom ([`mask`]),
//!   what happens to scores ([`score`]), to weights ([`dropout`]) and to queries and keys before ([`qk_norm`]).
//! - **The truth**: [`exact`], the textbook formula in f64; [`accuracy`], how far something is from it.
//! - **The tools of engines**: [`simd`] (one dispatch a call), [`tile`] (the only kernels with SIMD in them),
//!   [`merge`] (partial softmax results), [`parallel`], [`LargeVec`] (huge pages).
//! - **The machine**: [`limits`], measured on demand.
//! - **candle**: `attn_core::candle`, methods on tensors (feature `candle`, on by default).

pub mod accuracy;
mod attention;
#[cfg(feature = "candle")]
pub mod candle;
mod cost;
pub mod dropout;
mod element;
mod error;
pub mod exact;
mod large_vec;
pub mod limits;
pub mod mask;
pub mod merge;
pub mod parallel;
mod problem;
mod profile;
pub mod qk_norm;
pub mod registry;
pub mod score;
mod shape;
pub mod simd;
pub mod tile;
pub mod view;

pub use attention::{
    Attention, Differentiable, QkvGrads, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming,
    check_like, check_lse,
};
pub use cost::{Cost, band_pairs, softmax_flops};
pub use element::{DType, Element};
pub use error::{AttnError, Result};
pub use large_vec::LargeVec;
pub use problem::{OutMut, OutRows, Qkv, TensorView, TypedOp, TypedQkv};
pub use profile::{Causality, Family, Growth, Profile, Target};
pub use shape::{AttnShape, softmax_scale_or_default};
pub use view::{View, ViewMut};
