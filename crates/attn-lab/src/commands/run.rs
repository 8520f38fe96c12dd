//! `attn run`: one variant on tensors from a file.

use crate::{Result, output, registry, tensors};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs one variant on tensors from a file.
#[derive(Debug, Args)]
pub struct Run {
    /// The variant's name, from `attn list`
    #[arg(long)]
    pub variant: String,
    /// An option of the variant, as key=value; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Named tensors: .safetensors, .npz, .npy or a folder of .npy; q, k and v are (batch, heads, length, width)
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Where the results go, as .safetensors: o, and what else the variant gives
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Accept NaN in the inputs
    #[arg(long)]
    pub allow_nan: bool,
}

impl Run {
    /// Loads, runs, writes.
    ///
    /// # Errors
    /// An unknown variant, option or tensor; a missing or misshapen tensor; NaN; files that cannot be read or written.
    pub fn run(&self) -> Result<ExitCode> {
        let entry = registry::get(&self.variant)?;
        let options = registry::options(&self.set)?;
        // Options are cheap to check: before a large file is read.
        entry.build(&options)?;
        let inputs = tensors::load(&self.input)?;
        if !self.allow_nan {
            tensors::refuse_nan(&inputs)?;
        }
        let results = entry.run(&options, &inputs)?;
        tensors::save(&self.output, &results)?;
        let written: Vec<String> =
            results.0.iter().map(|(name, tensor)| format!("{name} {:?}", tensor.shape)).collect();
        output::print(&format!("{}: {}", self.output.display(), written.join(", ")))?;
        Ok(ExitCode::SUCCESS)
    }
}
