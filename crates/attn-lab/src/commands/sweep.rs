//! `attn sweep`: measures, then writes the report and prints the tables.

use crate::report::{page, terminal};
use crate::sweep::case::Outcome;
use crate::sweep::{Sweep, run};
use crate::{LabError, Result, output};
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
