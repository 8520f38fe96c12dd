//! The variants of the [scan engine](crate::scan).

pub mod aft_full;
pub mod aft_simple;
mod front;
pub mod hgrn;
mod log_sum_cell;
pub mod longhorn;
pub mod mamba1;
pub mod min_gru;
mod read_mean;
mod registry;
pub mod rg_lru;
mod runners;
pub mod rwkv4;

pub(crate) use front::panels as front_panels;
pub(crate) use registry::entries;
