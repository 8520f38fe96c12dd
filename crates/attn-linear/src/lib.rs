//! Linear and recurrent attention on few engines.
//!
//! - [`Linear`], [`LinearElu`]: kernelised attention, plain and normalised.
//! - [`RetNet`]: a state that fades at a constant rate a head.
//! - [`recurrent`]: gated and delta-rule variants, from GLA, Mamba-2 and RWKV to KDA and MesaNet.
//! - [`matrix_state`]: the engine of all of these: chunked, recurrent, and by definition. [`Variant`] says what a variant
//!   decides, [`LinearAttention`] runs it.
//! - [`elementwise`]: gated recurrences a channel, on the [`scan`] engine: HGRN, minGRU, RG-LRU, Mamba-1, Longhorn, RWKV-4,
//!   AFT-simple; AFT-full and AFT-local.
//! - [`features`]: kernelised attention: Performer, RFA, cosFormer, Based, ReBased, Hedgehog, efficient attention, ReLU.
//! - [`channel`]: cross-covariance attention.
//! - [`segments`]: memories written once a segment: TTT-linear, the memory of Infini-attention.
//! - [`low_rank`]: softmax attention through few summaries: Linformer, Nystromformer, agent attention.
//! - [`typed`]: inputs as types, with the names of the field; on candle tensors with gradients through `on_tensors`.
//! - [`feature_map`]: what queries and keys become first.
//!
//! Time is linear in the length; what is remembered of the past has a fixed size.

#[cfg(feature = "candle")]
mod candle;
pub mod channel;
pub mod elementwise;
pub mod feature_map;
pub mod features;
mod linear;
mod linear_elu;
pub mod low_rank;
pub mod matrix_state;
mod named;
mod packed;
mod recomputed;
pub mod recurrent;
mod registry;
mod retnet;
pub mod scan;
pub mod segments;
pub mod typed;

#[cfg(feature = "candle")]
pub use candle::{LinearTensors, TensorState, on_tensors};
pub use elementwise::{
    aft_full::AftFull, aft_simple::AftSimple, hgrn::Hgrn, longhorn::Longhorn, mamba1::Mamba1,
    min_gru::MinGru, rg_lru::RgLru, rwkv4::Rwkv4,
};
pub use features::FeatureAttention;
pub use linear::Linear;
pub use linear_elu::LinearElu;
pub use matrix_state::{StateAttention as LinearAttention, StateVariant as Variant};
pub use registry::registry;
pub use retnet::{Gammas, RetNet};
pub use scan::ScanAttention;

/// Tokens the chunked form handles at once, unless told otherwise.
pub const CHUNK_LEN: usize = 32;
