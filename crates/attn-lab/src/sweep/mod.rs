//! `attn sweep`: attention variants on real q, k and v at growing lengths.
//!
//! [`run`] goes over the lengths; for each, [`plan`] decides what may run, [`source`] makes the inputs, [`sample`]
//! computes the truth on some rows, and [`rounds`] measures the variants side by side, each in a process of its own
//! ([`worker`], [`child`]). Rows go to a [`journal`] as they come; at the end [`summary`] and [`crate::report`] say what
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

use crate::report::{page, terminal};
use crate::{LabError, Result, output};
use case::Outcome;
use std::path::Path;
use std::process::ExitCode;

/// Exit code of a sweep in which a point failed.
const POINT_FAILED: u8 = 1;

impl Sweep {
    /// Sweeps, writes the report and prints the tables.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(&self) -> Result<ExitCode> {
        let program =
            std::env::current_exe().map_err(|e| LabError::io("find", Path::new("this program"), e))?;
        let finished = run(self, &program)?;
        let report = self.out.join("report.html");
        std::fs::write(&report, page::html(&finished)).map_err(|e| LabError::io("write", &report, e))?;
        output::print(&terminal::text(&finished))?;
        output::print(&format!("report: {}", report.display()))?;
        let failed = finished.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed { .. }));
        Ok(if failed { ExitCode::from(POINT_FAILED) } else { ExitCode::SUCCESS })
    }
}
