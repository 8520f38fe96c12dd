//! The program `attn`: which attention variant would do, at which length, at which error.
//!
//! The binary is a thin shell around this library, so that tests and other programs can use its parts: the variants of
//! all crates ([`registry`]), named tensors from files ([`tensors`]), how time and memory are measured ([`measure`],
//! [`memory`], [`pool`]), the machine ([`machine`]), and one file a subcommand ([`commands`]).

pub mod bench;
pub mod check;
pub mod cli;
pub mod commands;
mod error;
pub mod gauss;
pub mod lm;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod output;
pub mod pool;
pub mod registry;
pub mod report;
pub mod sweep;
pub mod tensors;

pub use error::{LabError, Result};
