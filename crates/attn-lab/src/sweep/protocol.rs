//! What the sweep and the processes of its points say to each other: one JSON line a message, over standard input and
//! output.

use attn_core::registry::Options;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The work of one process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// safetensors file with q, k and v.
    pub input: PathBuf,
    /// The variant's registry name.
    pub variant: String,
    /// Its options.
    pub options: Options,
    /// Threads.
    pub threads: usize,
    /// Output rows to give back: (batch, head, row).
    pub rows: Vec<(usize, usize, usize)>,
}

/// What the sweep asks of a process that has its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// Run once, count memory, give the sampled rows.
    Warm,
    /// Run once more.
    Run,
    /// Say how much memory was resident at most, and end.
    Stop,
}

/// What a process answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// The inputs are loaded.
    Ready,
    /// To [`Ask::Warm`].
    Warm {
        /// Time of the call.
        seconds: f64,
        /// Bytes allocated beyond inputs and output.
        extra_bytes: Option<u64>,
        /// The output rows, as the bits of f32 numbers: JSON knows no NaN.
        rows: Vec<Vec<u32>>,
    },
    /// To [`Ask::Run`].
    Run {
        /// Time of the call.
        seconds: f64,
    },
    /// To [`Ask::Stop`].
    Stop {
        /// Most resident memory, bytes.
        peak_rss_bytes: Option<u64>,
    },
    /// Nothing more can be done.
    Failed {
        /// Why.
        reason: String,
    },
}
