//! The command line: which subcommands there are, and how errors leave the program.

use crate::{Result, commands, output, sweep};
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Exit code for bad usage and bad input.
pub const BAD_USAGE: u8 = 2;

/// Attention variants on your machine: how fast, how much memory, how far from exact.
#[derive(Debug, Parser)]
#[command(name = "attn", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists the variants and their options
    List(commands::list::List),
    /// Runs one variant on tensors from a file
    Run(commands::run::Run),
    /// Compares golden files with what our variants compute
    Check(commands::check::Check),
    /// Measures what this machine can do at best
    Limits(commands::limits::LimitsCommand),
    /// Measures one case of one variant
    Bench(commands::bench::Bench),
    /// Writes q, k and v of one layer of a language model
    Capture(commands::capture::Capture),
    /// Compares variants on real q, k and v at growing lengths
    Sweep(sweep::Sweep),
    /// Serves one point of a sweep
    #[command(hide = true)]
    SweepPoint,
}

impl Command {
    /// Does it.
    ///
    /// # Errors
    /// Bad usage, bad input: one line each.
    pub fn run(self) -> Result<ExitCode> {
        match self {
            Self::List(list) => list.run(),
            Self::Run(run) => run.run(),
            Self::Check(check) => check.run(),
            Self::Limits(limits) => limits.run(),
            Self::Bench(bench) => bench.run(),
            Self::Capture(capture) => capture.run(),
            Self::Sweep(sweep) => sweep.run(),
            Self::SweepPoint => sweep::child::serve(),
        }
    }
}

/// The whole program: parses the arguments, runs the subcommand, prints an error in one line.
pub fn main() -> ExitCode {
    let outcome = match Cli::try_parse() {
        Ok(cli) => cli.command.run(),
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            output::print(e.to_string().trim_end()).map(|()| ExitCode::SUCCESS)
        }
        Err(e) => {
            output::note(&usage_error(&e));
            return ExitCode::from(BAD_USAGE);
        }
    };
    outcome.unwrap_or_else(|e| {
        output::note(&e.to_string());
        ExitCode::from(BAD_USAGE)
    })
}

/// What clap complains about without its usage block, in one line.
fn usage_error(e: &clap::Error) -> String {
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no subcommand given; `attn --help` lists them".into();
    }
    let text = e.to_string();
    let complaint: Vec<&str> =
        text.lines().take_while(|line| !line.starts_with("Usage:")).map(str::trim).collect();
    let complaint = complaint.join(" ").trim().trim_start_matches("error: ").to_string();
    format!("{complaint} (see `attn --help` or `attn SUBCOMMAND --help`)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line_that_names_the_argument() {
        let e = Cli::try_parse_from(["attn", "run", "--input", "x"]).unwrap_err();
        let line = usage_error(&e);
        assert!(!line.contains('\n') && line.contains("--variant") && line.contains("--output"), "{line}");
    }
}
