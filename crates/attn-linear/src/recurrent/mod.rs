//! The variants of the matrix-state engine ([`crate::matrix_state`]): each a front end, a row of its table, a back end.

mod comba;
mod delta;
mod delta_product;
mod dpfp;
mod dplr;
pub(crate) mod front;
mod gateloop;
mod gla;
mod hgrn2;
mod lightnet;
mod lightning;
mod mamba2;
mod mamba3;
mod mesa;
mod mlstm;
mod momentum;
mod oja;
mod precond;
pub(crate) mod pull;
mod rodimus;
mod rwkv;
mod rwkv7;
mod simple_gla;
mod slots;

pub use comba::{Comba, Gdn2};
pub use delta::{DeltaNet, DeltaRule, Gate, GatedDeltaNet, Kda};
pub use delta_product::{DeltaProduct, GatedDeltaProduct};
pub use dpfp::FwpDpfp;
pub use dplr::{Dplr, Iplr};
pub use gateloop::GateLoop;
pub use gla::Gla;
pub use hgrn2::Hgrn2;
pub use lightnet::LightNet;
pub use lightning::Lightning;
pub use mamba2::Mamba2;
pub use mamba3::Mamba3;
pub use mesa::MesaNet;
pub use mlstm::MLstm;
pub use momentum::{MomentumDelta, TitansLinear};
pub use oja::GatedOja;
pub use precond::{PrecondGdn, PrecondKda};
pub use rodimus::Rodimus;
pub use rwkv::{Rwkv5, Rwkv6};
pub use rwkv7::Rwkv7;
pub use simple_gla::SimpleGla;
pub use slots::{Abc, Gsa, Raven, Slots};

use crate::matrix_state::{StateAttention, StateVariant};
use attn_core::Family;
use attn_core::registry::Entry;

/// The registry entry of a variant.
fn entry<V: StateVariant>() -> Entry {
    Entry {
        name: V::NAME,
        family: Family::Linear,
        summary: V::SUMMARY,
        options: V::OPTIONS,
        constructor: |options| Ok(Box::new(StateAttention::new(V::from_options(options)?))),
        runner: |_, options, tensors| StateAttention::new(V::from_options(options)?).run(tensors),
    }
}

/// The variants of the engine.
pub(crate) fn entries() -> Vec<Entry> {
    vec![
        entry::<crate::Linear>(),
        entry::<crate::LinearElu>(),
        entry::<crate::RetNet>(),
        entry::<Gla>(),
        entry::<SimpleGla>(),
        entry::<DeltaNet>(),
        entry::<GatedDeltaNet>(),
        entry::<Kda>(),
        entry::<Mamba2>(),
        entry::<Rwkv5>(),
        entry::<Rwkv6>(),
        entry::<Rwkv7>(),
        entry::<Lightning>(),
        entry::<Hgrn2>(),
        entry::<DeltaProduct>(),
        entry::<GatedDeltaProduct>(),
        entry::<Comba>(),
        entry::<Gdn2>(),
        entry::<Dplr>(),
        entry::<Iplr>(),
        entry::<LightNet>(),
        entry::<GateLoop>(),
        entry::<Rodimus>(),
        entry::<MLstm>(),
        entry::<Gsa>(),
        entry::<Abc>(),
        entry::<Raven>(),
        entry::<PrecondGdn>(),
        entry::<PrecondKda>(),
        entry::<FwpDpfp>(),
        entry::<Mamba3>(),
        entry::<GatedOja>(),
        entry::<MomentumDelta>(),
        entry::<TitansLinear>(),
        entry::<MesaNet>(),
    ]
}
