//! `attn sweep`: attention variants on real q, k and v at growing lengths.
//!
//! [`run`] goes over the lengths; for each, [`plan`] decides what may run, [`source`] makes the inputs, [`sample`]
//! computes the truth on some rows, and [`rounds`] measures the variants side by side, each in a process of its own
//! ([`worker`], [`child`]). Rows go to a [`journal`] as they come; at the end [`summary`] says what
//! they mean.

pub mod args;
pub mod case;
pub mod child;
pub mod chosen;
pub mod crossover;
pub mod environment;
pub mod fit;
pub mod gate;
pub mod journal;
pub mod plan;
pub mod protocol;
pub mod range;
pub mod rounds;
mod run;
pub mod sample;
pub mod source;
pub mod spreadsheet;
pub mod summary;
pub mod worker;

pub use args::Sweep;
pub use run::{Finished, run};
