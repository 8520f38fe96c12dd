//! The command line of `attn sweep`, and what it becomes.

use super::range::lengths;
use super::source::{FileTensors, Gauss, LmText, Planted, Source, SourceKind};
use crate::{LabError, Result, pool};
use attn_core::DType;
use std::path::PathBuf;
use std::time::Duration;

/// Lengths without `--n`: what two cores do in about three minutes.
const DEFAULT_N: &str = "1k..64k";

/// Compares attention variants on real q, k and v at growing lengths: time, memory, error
///
/// Results go to OUT/results.jsonl as they come; a sweep that was stopped, or is asked for more, repeats nothing. At
/// the end: a table, OUT/results.csv, OUT/env.json and OUT/report.html.
#[derive(Debug, Clone, clap::Args)]
pub struct Sweep {
    /// Lengths: a range that doubles (1k..64k) or a list (1k,4k,16k); default 1k..64k
    #[arg(long, value_name = "LENGTHS")]
    pub n: Option<String>,
    /// Variants, comma-separated, from `attn list`; or a family, `all`, or `usual` (a few of each family): of these, all
    /// that can do the mode
    #[arg(long, default_value = "usual")]
    pub variants: String,
    /// An option of a variant, as variant.key=value; may be repeated
    #[arg(long = "set", value_name = "VARIANT.KEY=VALUE")]
    pub set: Vec<String>,
    /// Where q, k and v come from
    #[arg(long, value_enum)]
    pub source: Option<SourceKind>,
    /// Tensors q, k, v (batch, heads, n, head_dim): .safetensors, .npz or a folder of .npy; implies --source file
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Text for the language model; default: the sources in the cargo registry
    #[arg(long, value_name = "FILE|DIR")]
    pub text: Option<PathBuf>,
    /// Heads, for planted and gauss; default 2
    #[arg(long)]
    pub heads: Option<usize>,
    /// Width of a head, for planted and gauss; default 64
    #[arg(long)]
    pub head_dim: Option<usize>,
    /// A query sees no later key (the default)
    #[arg(long, conflicts_with = "bidirectional")]
    pub causal: bool,
    /// A query sees all keys
    #[arg(long)]
    pub bidirectional: bool,
    /// Storage type: f32, bf16 or f16
    #[arg(long, default_value_t = DType::F32)]
    pub dtype: DType,
    /// Threads; default: all
    #[arg(long)]
    pub threads: Option<usize>,
    /// Seconds for the whole sweep; points that would not be done in time are reported as not run
    #[arg(long, default_value_t = 150.0, value_name = "SECONDS")]
    pub budget: f64,
    /// Seconds for one point; default: a fifth of the budget
    #[arg(long, value_name = "SECONDS")]
    pub point_budget: Option<f64>,
    /// Query rows compared with exact attention
    #[arg(long, default_value_t = 256)]
    pub rows: usize,
    /// Seed of the sampled rows and of random inputs
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder for the results
    #[arg(long, default_value = "attn-sweep", value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with what OUT holds (the default)
    #[arg(long, conflicts_with = "fresh")]
    pub resume: bool,
    /// Throw away what OUT holds
    #[arg(long)]
    pub fresh: bool,
}

/// An opened source.
pub enum Opened {
    /// With the language model, for its gate.
    Lm(LmText),
    /// Any other.
    Other(Box<dyn Source>),
}

impl Opened {
    /// The source.
    pub fn source(&self) -> &dyn Source {
        match self {
            Self::Lm(text) => text,
            Self::Other(source) => &**source,
        }
    }
}

impl Sweep {
    /// Refuses what no sweep can do.
    ///
    /// # Errors
    /// [`LabError::Argument`] naming the option.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(LabError::Argument(what));
        for (name, seconds) in [("--budget", Some(self.budget)), ("--point-budget", self.point_budget)] {
            if let Some(seconds) = seconds.filter(|s| !(*s > 0.0 && *s <= 1e9)) {
                return refuse(format!("{name} is {seconds}, expected seconds above 0"));
            }
        }
        let at_least_one = [
            ("--rows", Some(self.rows)),
            ("--threads", self.threads),
            ("--heads", self.heads),
            ("--head-dim", self.head_dim),
        ];
        for (name, value) in at_least_one {
            if value == Some(0) {
                return refuse(format!("{name} is 0, expected at least 1"));
            }
        }
        let kind = self.kind();
        let only = |name: &str, given: bool, kinds: &[SourceKind]| match given && !kinds.contains(&kind) {
            true => refuse(format!("{name} means nothing with --source {kind}; leave one of them out")),
            false => Ok(()),
        };
        let random = [SourceKind::Planted, SourceKind::Gauss];
        only("--input", self.input.is_some(), &[SourceKind::File])?;
        only("--text", self.text.is_some(), &[SourceKind::Lm])?;
        only("--heads", self.heads.is_some(), &random)?;
        only("--head-dim", self.head_dim.is_some(), &random)
    }

    /// The kind of source: as given, or what `--input` implies, or the language model.
    pub fn kind(&self) -> SourceKind {
        let implied = if self.input.is_some() { SourceKind::File } else { SourceKind::Lm };
        self.source.unwrap_or(implied)
    }

    /// The lengths and the source that serves them.
    ///
    /// # Errors
    /// [`LabError`] for a bad range, a source that cannot be read or that ends before the longest length.
    pub fn open(&self) -> Result<(Vec<usize>, Opened)> {
        let given = self.n.as_deref().map(lengths).transpose()?;
        let (heads, head_dim, seed) = (self.heads.unwrap_or(2), self.head_dim.unwrap_or(64), self.seed);
        let longest = |lengths: &[usize]| lengths.last().copied().unwrap_or(1);
        if self.kind() == SourceKind::File {
            let Some(path) = &self.input else {
                return Err(LabError::Argument(
                    "--source file needs --input FILE with tensors q, k, v".into(),
                ));
            };
            let file = FileTensors::open(path)?;
            let lengths = match given {
                Some(lengths) => lengths,
                // All of a file, in doublings.
                None => lengths(&format!("{}..{}", file.len().clamp(1, 1024), file.len().max(1)))?,
            };
            file.check(longest(&lengths))?;
            return Ok((lengths, Opened::Other(Box::new(file))));
        }
        let lengths = given.map_or_else(|| lengths(DEFAULT_N), Ok)?;
        let opened = match self.kind() {
            SourceKind::Lm => Opened::Lm(LmText::open(self.text.as_deref(), longest(&lengths))?),
            SourceKind::Planted => {
                let planted = Planted { heads, head_dim, seed };
                planted.check(longest(&lengths))?;
                Opened::Other(Box::new(planted))
            }
            SourceKind::Gauss | SourceKind::File => Opened::Other(Box::new(Gauss { heads, head_dim, seed })),
        };
        Ok((lengths, opened))
    }

    /// Threads to measure on.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(pool::all_threads)
    }

    /// The time of the sweep and of a point.
    pub fn budget(&self) -> super::plan::Budget {
        super::plan::Budget {
            total: Duration::from_secs_f64(self.budget),
            point: Duration::from_secs_f64(self.point_budget.unwrap_or(self.budget / 5.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sweep: Sweep,
    }

    fn sweep(args: &[&str]) -> Sweep {
        Line::parse_from([&["attn"] as &[&str], args].concat()).sweep
    }

    #[test]
    fn defaults_are_the_language_model_causal() {
        let sweep = sweep(&[]);
        assert_eq!(
            (sweep.kind(), sweep.bidirectional, sweep.budget().point.as_secs()),
            (SourceKind::Lm, false, 30)
        );
        sweep.check().unwrap();
    }

    #[test]
    fn an_option_of_another_source_is_refused() {
        let complaint = |args: &[&str]| sweep(args).check().unwrap_err().to_string();
        assert!(complaint(&["--heads", "4"]).contains("--heads means nothing with --source lm"));
        assert!(complaint(&["--source", "gauss", "--text", "x"]).contains("--text"));
        assert!(complaint(&["--source", "gauss", "--input", "x"]).contains("--input"));
        assert!(complaint(&["--rows", "0"]).contains("--rows is 0"));
        assert!(complaint(&["--budget=-3"]).contains("--budget"));
        assert_eq!(sweep(&["--input", "x.npz"]).kind(), SourceKind::File);
        let line = sweep(&["--source", "file"]).open().err().unwrap().to_string();
        assert!(line.contains("--input FILE"), "{line}");
    }
}
