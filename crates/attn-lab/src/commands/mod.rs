//! One file a subcommand.

pub mod bench;
pub mod capture;
pub mod check;
pub mod limits;
pub mod list;
pub mod run;
pub mod sweep;
