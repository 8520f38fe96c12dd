//! The conformance suite: holds a variant to everything that its [`Profile`](attn_core::Profile) promises.
//!
//! A test of one line checks a registry entry, yours or ours:
//!
//! ```
//! use attn_core::exact::Reference;
//! use attn_core::registry::{Entry, run_qkv};
//! use attn_core::*;
//!
//! /// Each query takes the values of its key, unmixed: the smallest causal variant.
//! struct Diagonal;
//!
//! impl Attention for Diagonal {
//!     fn name(&self) -> &'static str {
//!         "diagonal"
//!     }
//!     fn profile(&self) -> Profile {
//!         Profile {
//!             family: Family::Classic,
//!             target: Target::Own,
//!             causality: Causality::Strict,
//!             convex: true,
//!             key_order_free: false,
//!             cross_lengths: false,
//!             grouped_heads: true,
//!             dtypes: &DType::ALL,
//!             max_error: 1e-7,
//!             time: Growth::Linear,
//!             memory: Growth::Constant,
//!         }
//!     }
//!     fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
//!         let copies = shape.rows() * shape.head_dim_v;
//!         Cost::of(shape, dtype, copies as u64, 0)
//!     }
//!     fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
//!         let shape = x.shape();
//!         if shape.n_q != shape.n_kv {
//!             return Err(AttnError::shape("k", "n_kv", shape.n_kv, shape.n_q));
//!         }
//!         x.with_out(out, Copy)
//!     }
//!     fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
//!         let (s, v) = (x.shape(), x.v());
//!         let heads = (0..s.batch).flat_map(|b| (0..s.n_heads_q).map(move |h| (b, s.kv_head(h))));
//!         Ok(Reference { out: heads.flat_map(|(b, h)| v.head_f64(b, h)).collect(), lse: None })
//!     }
//! }
//!
//! struct Copy;
//!
//! impl TypedOp for Copy {
//!     type Output = ();
//!     fn run<E: Element>(self, x: TypedQkv<'_, E>, out: ViewMut<'_, E>) -> Result<()> {
//!         for mut block in out.into_blocks(1) {
//!             let values = x.v.head(block.batch, x.shape.kv_head(block.head));
//!             block.out.row_mut(0).copy_from_slice(values.row(block.rows.start));
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let my_entry = Entry {
//!     name: "diagonal",
//!     family: Family::Classic,
//!     summary: "Returns the values",
//!     options: &[],
//!     constructor: |_| Ok(Box::new(Diagonal)),
//!     runner: run_qkv,
//! };
//!
//! attn_testkit::conformance::check(&my_entry);
//! ```
//!
//! | Promise | Made by | Says |
//! | --- | --- | --- |
//! | `names`, `options`, `runner`, `cost` | all | the registry entry is what it says; FLOPs and memory grow as stated |
//! | `definition` | all | forward agrees with the definition within `max_error`, lengths 1 to 257, odd widths, groups |
//! | `softmax` | `Target::Softmax` with no option but `causal` and `scale` | the definition is exact softmax attention |
//! | `log-sum-exp`, `score-shift` | `as_softmax` | the log-sum-exp is right; a shift of all scores moves it alone |
//! | `half-storage` | all | bf16 and f16, where listed, agree with the definition of the rounded inputs |
//! | `instruction-sets` | all | so does every instruction set of this CPU |
//! | `extreme-scores` | all | huge scores and values give finite outputs that agree |
//! | `causal-option` | `causal=true` | the profile says `Strict` |
//! | `masked-causality` | `Causality::Masked` | later values change no earlier output, not by one bit |
//! | `strict-causality` | `Causality::Strict` | later inputs change no earlier output, not by one bit |
//! | `convexity` | `convex` | outputs lie between the values seen |
//! | `key-order` | `key_order_free` | shuffled keys change nothing but rounding |
//! | `batch-independence`, `head-independence` | all | entries and groups of heads do not reach one another |
//! | `nan-rows` | exact softmax rows | a NaN reaches the rows that see it and no other |
//! | `streaming` | `as_streaming` | any pieces give what the whole gives |
//! | `threads`, `strided`, `every-row-written` | all | the same bits whatever the threads, the storage order, the buffer |
//! | `empty-input` | all | length 0 and batch 0 are valid; no keys give zeros |
//! | `refusals`, `argument-errors` | all | what is not promised is an error; errors name the argument and both numbers |
//!
//! How much error is allowed stands in [`crate::tolerance`]. A panic inside a variant is a broken promise, not the end of
//! the suite.

mod agreement;
mod edges;
mod interface;
mod invariance;
mod promises;
mod report;
mod streaming;
mod subject;
mod visibility;

pub use report::{Finding, Report};

use attn_core::AttnError;
use attn_core::registry::{Entry, Options};
use promises::PROMISES;
use std::panic::{AssertUnwindSafe, catch_unwind};
use subject::{Outcome, Subject};

/// Checks the defaults and, where the entry has an option `causal`, both its values.
///
/// A value of `causal` that the variant refuses as [`AttnError::Unsupported`] is left out.
///
/// # Panics
/// If any promise is broken, with one line for each.
#[track_caller]
pub fn check(entry: &Entry) {
    check_with(entry, &configurations(entry));
}

/// [`check`] for chosen configurations: small windows, blocks or chunks, say, whose edges the defaults never reach.
///
/// # Panics
/// If any promise is broken, with one line for each, or if there is no configuration.
#[track_caller]
pub fn check_with(entry: &Entry, configs: &[Options]) {
    let report = report(entry, configs);
    assert!(report.is_clean(), "{report}");
}

/// Tries every promise that each configuration makes.
pub fn report(entry: &Entry, configs: &[Options]) -> Report {
    Report { variant: entry.name, findings: configs.iter().flat_map(|c| findings(entry, c)).collect() }
}

/// The defaults and, where the entry has an option `causal`, both its values unless the variant refuses one.
fn configurations(entry: &Entry) -> Vec<Options> {
    let mut configs = vec![Options::new()];
    if entry.options.iter().any(|o| o.name == "causal") {
        let causal = [true, false].map(|causal| Options::new().with("causal", causal));
        let refused = |o: &Options| matches!(entry.build(o), Err(AttnError::Unsupported { .. }));
        configs.extend(causal.into_iter().filter(|options| !refused(options)));
    }
    configs
}

fn findings(entry: &Entry, options: &Options) -> Vec<Finding> {
    let pairs: Vec<String> = options.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let configuration = if pairs.is_empty() { "defaults".to_string() } else { pairs.join(" ") };
    let finding = |promise, outcome| Finding { promise, configuration: configuration.clone(), outcome };
    let built = guarded(|| Subject::build(entry, options).map_err(|e| e.to_string()));
    let subject = match built {
        Ok(subject) => subject,
        Err(reason) => return vec![finding("builds", Err(reason))],
    };
    let applying = PROMISES.iter().filter(|p| (p.applies)(&subject));
    let tried = applying.map(|p| finding(p.name, guarded(|| (p.run)(&subject))));
    std::iter::once(finding("builds", Outcome::Ok(()))).chain(tried).collect()
}

/// Runs `work`; a panic is a reason like any other.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // What a panic leaves half-done is never looked at again but through the variant's own `&self`.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
        Err(format!("it panicked: {}", text.unwrap_or_else(|| "without a message".into())))
    })
}
