//! `env.json`: on what, with what and by which command line the results were made.

use super::plan::Budget;
use crate::machine::Machine;
use crate::{LabError, Result};
use attn_core::limits::Limits;
use serde::Serialize;
use std::path::Path;

/// A difference of the machine's peak before and after that is worth a word.
pub const MAX_DRIFT: f64 = 0.05;

/// The circumstances of a sweep.
#[derive(Debug, Clone, Serialize)]
pub struct Environment {
    /// The machine and the program.
    pub machine: Machine,
    /// Its limits on the sweep's threads, before the first point.
    pub limits: Limits,
    /// The multiply-add peak again, behind the last point.
    pub fma_gflops_after: Option<f64>,
    /// The command line.
    pub command: Vec<String>,
    /// Source of q, k and v.
    pub source: String,
    /// Seed.
    pub seed: u64,
    /// Seconds allowed for all points.
    pub budget_seconds: f64,
    /// Seconds allowed for one point.
    pub point_budget_seconds: f64,
    /// Seconds the sweep took; `None` while it runs.
    pub took_seconds: Option<f64>,
    /// Seconds since 1970 at its start.
    pub started_unix: u64,
    /// Variants that could not take part, with the reason.
    pub left_out: Vec<String>,
}

impl Environment {
    /// At the start of a sweep.
    pub fn new(machine: Machine, limits: Limits, source: String, seed: u64, budget: &Budget) -> Self {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            machine,
            limits,
            fma_gflops_after: None,
            command: std::env::args().collect(),
            source,
            seed,
            budget_seconds: budget.total.as_secs_f64(),
            point_budget_seconds: budget.point.as_secs_f64(),
            took_seconds: None,
            started_unix: since_1970.map_or(0, |time| time.as_secs()),
            left_out: Vec::new(),
        }
    }

    /// How much the machine's peak differed before and after, if it is more than [`MAX_DRIFT`].
    pub fn drift(&self) -> Option<f64> {
        let (before, after) = (self.limits.fma_gflops, self.fma_gflops_after?);
        let drift = (after - before).abs() / before.max(after);
        (drift > MAX_DRIFT).then_some(drift)
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`LabError::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| LabError::format(path, e))?;
        std::fs::write(path, text).map_err(|e| LabError::io("write", path, e))
    }
}
