//! `attn check`: golden files through the registries.

use crate::check::{Checked, Status, Unchecked, check};
use crate::{LabError, Result, output};
use attn_testkit::golden::{GoldenCase, files};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Compares golden files with what our variants compute.
#[derive(Debug, Args)]
pub struct Check {
    /// Golden files, or folders of them
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    /// One JSON object instead of a line a file
    #[arg(long)]
    pub json: bool,
}

/// The JSON object.
#[derive(Debug, serde::Serialize)]
struct Summary {
    passed: usize,
    failed: usize,
    unsupported: usize,
    files: Vec<Checked>,
}

impl Check {
    /// Checks and prints; exit code 1 if a file failed.
    ///
    /// # Errors
    /// A path that does not exist or is no golden file, before anything has run.
    pub fn run(&self) -> Result<ExitCode> {
        let mut cases = Vec::new();
        for path in &self.paths {
            let files = files(path).map_err(|e| LabError::Argument(e.to_string()))?;
            if files.is_empty() {
                return Err(LabError::format(path, "the folder holds no .safetensors file"));
            }
            for file in files {
                cases.push(GoldenCase::load(&file).map_err(|e| LabError::Argument(e.to_string()))?);
            }
        }
        let mut all = Summary { passed: 0, failed: 0, unsupported: 0, files: Vec::new() };
        for case in &cases {
            let checked = check(case)?;
            match checked.status {
                Status::Pass => all.passed += 1,
                Status::Fail => all.failed += 1,
                Status::Unsupported => all.unsupported += 1,
            }
            if !self.json {
                output::print(&line(&checked))?;
            }
            all.files.push(checked);
        }
        if self.json {
            output::print_json(&all)?;
        } else {
            let Summary { passed, failed, unsupported, .. } = all;
            output::print(&format!("{passed} passed, {failed} failed, {unsupported} unsupported"))?;
        }
        Ok(if all.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn line(checked: &Checked) -> String {
    let file = checked.file.display();
    let reason = checked.reason.as_deref().unwrap_or_default();
    match checked.status {
        Status::Unsupported => format!("unsupported  {file} ({reason})"),
        Status::Fail => format!("fail         {file}: {reason}"),
        Status::Pass => {
            let done = checked.checked.join(", ");
            let left = not_checked(&checked.unchecked);
            let notes: String = checked.notes.iter().map(|note| format!("; {note}")).collect();
            format!("pass         {file} ({done}{left}{notes})")
        }
    }
}

/// `; not checked: grad.k, grad.q: flash has no backward`, one reason after the other.
fn not_checked(unchecked: &[Unchecked]) -> String {
    let same_reason = |a: &Unchecked, b: &Unchecked| a.because == b.because;
    let groups = unchecked.chunk_by(same_reason).map(|group| {
        let tensors: Vec<&str> = group.iter().map(|u| u.tensor.as_str()).collect();
        format!("; not checked: {}: {}", tensors.join(", "), group[0].because)
    });
    groups.collect()
}
