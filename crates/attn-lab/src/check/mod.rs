//! Golden files through the registries: what other people's code computed, compared with what ours gives.
//!
//! [`mapping`] goes from the files' names and options to ours; [`attn_testkit::golden`] runs the plan and compares; this
//! module says `pass`, `fail` or `unsupported`.

pub mod mapping;

use crate::{Result, registry};
use attn_core::AttnError;
pub use attn_testkit::golden::{Failure, Unchecked, Verdict};
use attn_testkit::golden::{GoldenCase, judge};
use serde::Serialize;
use std::path::PathBuf;

/// How a file fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything that was checked agrees.
    Pass,
    /// Something does not.
    Fail,
    /// No variant of ours computes this.
    Unsupported,
}

/// One file's line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    /// The file.
    pub file: PathBuf,
    /// Its family, in the file's words.
    pub family: String,
    /// Its variant, in the file's words.
    pub variant: String,
    /// Its case.
    pub case: String,
    /// The verdict.
    pub status: Status,
    /// Our variant, where there is one.
    pub ours: Option<String>,
    /// Why it failed or is unsupported.
    pub reason: Option<String>,
    /// Tensors that were compared and agree.
    pub checked: Vec<String>,
    /// What a reader of the verdict should know: where the file asks for more than f32 has, or departs from its own words.
    pub notes: Vec<String>,
    /// Tensors of the file that were not compared.
    pub unchecked: Vec<Unchecked>,
    /// The largest disagreement.
    pub failure: Option<Failure>,
}

impl Checked {
    fn new(case: &GoldenCase) -> Self {
        Self {
            file: case.path.clone(),
            family: case.family.to_string(),
            variant: case.variant.clone(),
            case: case.case.clone(),
            status: Status::Unsupported,
            ours: None,
            reason: None,
            checked: Vec::new(),
            notes: Vec::new(),
            unchecked: Vec::new(),
            failure: None,
        }
    }

    fn judged(self, verdict: Verdict) -> Self {
        let Verdict { checked, notes, unchecked, failure } = verdict;
        let (status, reason) = match &failure {
            Some(failure) => (Status::Fail, Some(failure.to_string())),
            None if checked.is_empty() => {
                let why = unchecked.first().map_or("it holds no output", |u| u.because.as_str());
                (Status::Unsupported, Some(why.to_string()))
            }
            None => (Status::Pass, None),
        };
        Self { status, reason, checked, notes, unchecked, failure, ..self }
    }

    fn ended(self, status: Status, reason: impl ToString) -> Self {
        Self { status, reason: Some(reason.to_string()), ..self }
    }
}

/// Runs one case and compares everything that it holds and we compute.
///
/// # Errors
/// Never for a case that our variants refuse: that is a verdict. [`crate::LabError`] for a broken registry.
pub fn check(case: &GoldenCase) -> Result<Checked> {
    let line = Checked::new(case);
    let plan = match mapping::plan(case) {
        Ok(plan) => plan,
        Err(why) => return Ok(line.ended(Status::Unsupported, why)),
    };
    let Some(entry) = registry::all().into_iter().find(|entry| entry.name == plan.ours) else {
        let why = format!("no variant `{}` in this build", plan.ours);
        return Ok(line.ended(Status::Unsupported, why));
    };
    let line = Checked { ours: Some(entry.name.to_string()), ..line };
    Ok(match plan.run(&entry, case) {
        Ok(outcome) => line.judged(judge(&entry, &plan, case, &outcome)),
        Err(e @ AttnError::Unsupported { .. }) => line.ended(Status::Unsupported, e),
        Err(e) => line.ended(Status::Fail, format!("refused: {e}")),
    })
}
