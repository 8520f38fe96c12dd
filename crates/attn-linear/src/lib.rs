//! Linear and recurrent attention on few engines.
//!
//! - [`Linear`], [`LinearElu`]: kernelised attention, plain and normalised.
//! - [`RetNet`]: a state that fades at a constant rate a head.
//! - [`Variant`], [`LinearAttention`]: what a variant decides, and what it becomes with that.
//! - [`engine`]: the matrix-state recurrence they are options of: chunked, recurrent, and by definition.
//! - [`recurrent`]: gated and delta-rule variants, from GLA, Mamba-2 and RWKV to KDA and MesaNet, on the [`matrix_state`]
//!   engine: [`matrix_state::StateVariant`] says what one decides, [`matrix_state::StateAttention`] runs it.
//! - [`elementwise`]: gated recurrences a channel, on the [`scan`] engine: HGRN, minGRU, RG-LRU, Mamba-1, Longhorn, RWKV-4,
//!   AFT-simple.
//! - [`features`]: kernelised attention: Performer, RFA, cosFormer, Based, ReBased, Hedgehog, efficient attention, ReLU.
//! - [`channel`]: cross-covariance attention.
//! - [`segments`]: memories written once a segment: TTT-linear, the memory of Infini-attention.
//! - [`low_rank`]: softmax attention through few summaries: Linformer, Nystromformer, agent attention.
//! - [`feature_map`]: what queries and keys become first.
//!
//! Time is linear in the length; what is remembered of the past has a fixed size.

pub mod channel;
pub mod elementwise;
pub mod engine;
pub mod feature_map;
pub mod features;
mod kernelised;
mod linear;
mod linear_elu;
pub mod low_rank;
pub mod matrix_state;
mod named;
pub mod recurrent;
mod registry;
mod retnet;
pub mod scan;
pub mod segments;
mod variant;

pub use elementwise::{
    aft_simple::AftSimple, hgrn::Hgrn, longhorn::Longhorn, mamba1::Mamba1, min_gru::MinGru, rg_lru::RgLru,
    rwkv4::Rwkv4,
};
pub use features::FeatureAttention;
pub use linear::Linear;
pub use linear_elu::LinearElu;
pub use registry::registry;
pub use retnet::{Gammas, RetNet};
pub use scan::ScanAttention;
pub use variant::{LinearAttention, Variant};

/// Tokens the chunked form handles at once, unless told otherwise.
pub const CHUNK_LEN: usize = 64;
