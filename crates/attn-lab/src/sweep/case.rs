//! One point of a sweep and what became of it: a line of `results.jsonl`.

use crate::measure::Seconds;
use attn_core::registry::Options;
use attn_core::simd::Isa;
use attn_core::{AttnShape, DType};
use serde::{Deserialize, Serialize};

/// Everything a result depends on. Two equal cases need to be measured only once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// Where q, k and v come from: `lm`, `file`, `planted` or `gauss`.
    pub source: String,
    /// The same in words: which text, which file.
    pub input: String,
    /// Hash of what the inputs were made from.
    pub input_hash: String,
    /// Length.
    pub n: usize,
    /// Independent problems.
    pub batch: usize,
    /// Query heads.
    pub n_heads_q: usize,
    /// Key/value heads.
    pub n_heads_kv: usize,
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values.
    pub head_dim_v: usize,
    /// The variant's registry name.
    pub variant: String,
    /// Its options, those left at their defaults too.
    pub options: Options,
    /// A query sees no later key.
    pub causal: bool,
    /// Storage type of q, k, v and the output.
    pub dtype: DType,
    /// Threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
    /// Query rows compared with exact attention.
    pub rows: usize,
    /// Seed of the rows and of random inputs.
    pub seed: u64,
    /// Version of the program.
    pub version: String,
    /// `release` or `debug`.
    pub build: String,
    /// The CPU's own name.
    pub cpu: String,
}

impl Case {
    /// What tells this case from all others.
    pub fn key(&self) -> String {
        // A struct of strings and numbers cannot fail to serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Sizes of the problem.
    pub fn shape(&self) -> AttnShape {
        AttnShape {
            batch: self.batch,
            n_heads_q: self.n_heads_q,
            n_heads_kv: self.n_heads_kv,
            n_q: self.n,
            n_kv: self.n,
            head_dim: self.head_dim,
            head_dim_v: self.head_dim_v,
        }
    }
}

/// A case and its outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The case.
    #[serde(flatten)]
    pub case: Case,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Row {
    /// The figures, if the case was measured.
    pub fn measured(&self) -> Option<&Measurement> {
        if let Outcome::Measured(figures) = &self.outcome { Some(figures) } else { None }
    }
}

/// What became of a case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Outcome {
    /// It ran.
    Measured(Measurement),
    /// It was not tried, or stopped before its first timed run.
    NotRun {
        /// `predicted 41 min`: with the figures, as the tables show it.
        reason: String,
        /// Predicted seconds of the whole point, warm-up included.
        predicted_seconds: Option<f64>,
        /// Predicted resident memory, bytes.
        predicted_bytes: Option<u64>,
    },
    /// It ran into an error.
    Failed {
        /// The error.
        reason: String,
    },
}

/// The figures of one case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Quantiles of one forward call's time.
    pub seconds: Seconds,
    /// Timed runs.
    pub runs: usize,
    /// Positions a second: `batch n / median`.
    pub tokens_s: f64,
    /// Floating-point operations of the variant's cost model.
    pub flops: u64,
    /// `flops / median`.
    pub gflops: f64,
    /// The machine's f32 multiply-add peak on these threads, measured in the same session.
    pub peak_gflops: f64,
    /// `gflops / peak_gflops`.
    pub share_of_peak: f64,
    /// Bytes allocated beyond q, k, v and the output, at the moment of most.
    pub extra_bytes: Option<u64>,
    /// Most resident memory of the point's own process: program, q, k, v, output and extra.
    pub peak_rss_bytes: Option<u64>,
    /// Against exact attention.
    pub error: ErrorFigures,
}

/// The error of an output against exact attention on sampled rows; see [`attn_core::accuracy`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ErrorFigures {
    /// Rows compared.
    pub rows: usize,
    /// Relative L2 error.
    pub rel_l2: f64,
    /// Lower end of its 95 % interval.
    pub rel_l2_low: f64,
    /// Upper end of its 95 % interval.
    pub rel_l2_high: f64,
    /// Relative L2 error of the worst row; `None` if its exact output is zero.
    pub worst_row: Option<f64>,
    /// 5th percentile of the rows' cosines.
    pub cosine_p5: f64,
    /// Median of the rows' cosines.
    pub cosine_median: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
}

impl ErrorFigures {
    /// From an accuracy whose figures are finite; `None` if the output holds NaN or infinity.
    pub fn from_finite(a: &attn_core::accuracy::Accuracy) -> Option<Self> {
        let all = [a.rel_l2, a.rel_l2_low, a.rel_l2_high, a.max_abs, a.cosine_p5, a.cosine_median];
        all.iter().all(|x| x.is_finite()).then_some(Self {
            rows: a.rows,
            rel_l2: a.rel_l2,
            rel_l2_low: a.rel_l2_low,
            rel_l2_high: a.rel_l2_high,
            worst_row: Some(a.worst_row).filter(|x| x.is_finite()),
            cosine_p5: a.cosine_p5,
            cosine_median: a.cosine_median,
            max_abs: a.max_abs,
        })
    }
}

#[cfg(test)]
pub(crate) mod examples {
    use super::*;

    /// A measured row with plausible figures.
    pub(crate) fn row(variant: &str, n: usize, seconds: f64, rel_l2: f64) -> Row {
        let case = Case {
            source: "gauss".into(),
            input: "independent normal numbers".into(),
            input_hash: "0123".into(),
            n,
            batch: 1,
            n_heads_q: 2,
            n_heads_kv: 2,
            head_dim: 64,
            head_dim_v: 64,
            variant: variant.into(),
            options: Options::new().with("causal", true),
            causal: true,
            dtype: DType::F32,
            threads: 2,
            isa: Isa::Portable,
            rows: 256,
            seed: 0,
            version: "0.1.0".into(),
            build: "release".into(),
            cpu: "some <CPU> & more".into(),
        };
        let flops = (n * n) as u64;
        let figures = Measurement {
            seconds: Seconds { p20: seconds * 0.9, median: seconds, p80: seconds * 1.2 },
            runs: 5,
            tokens_s: n as f64 / seconds,
            flops,
            gflops: flops as f64 / seconds / 1e9,
            peak_gflops: 100.0,
            share_of_peak: 0.25,
            extra_bytes: Some(1 << 20),
            peak_rss_bytes: Some(1 << 26),
            error: ErrorFigures {
                rows: 256,
                rel_l2,
                rel_l2_low: rel_l2 * 0.8,
                rel_l2_high: rel_l2 * 1.2,
                worst_row: Some(rel_l2 * 3.0),
                cosine_p5: 0.9,
                cosine_median: 0.99,
                max_abs: 0.5,
            },
        };
        Row { case, outcome: Outcome::Measured(figures) }
    }

    /// A row that was not run.
    pub(crate) fn not_run(variant: &str, n: usize) -> Row {
        let outcome = Outcome::NotRun {
            reason: "predicted 41 min".into(),
            predicted_seconds: Some(2460.0),
            predicted_bytes: Some(1 << 28),
        };
        Row { outcome, ..row(variant, n, 1.0, 0.0) }
    }

    #[test]
    fn a_row_survives_json() {
        for row in [row("flash", 1024, 0.5, 1e-7), not_run("naive", 65536)] {
            let line = serde_json::to_string(&row).unwrap();
            assert!(line.contains("\"status\":") && !line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Row>(&line).unwrap(), row);
        }
    }
}
