//! The table of promises.

use super::subject::{Outcome, Subject};
use super::{agreement, edges, interface, invariance, streaming, visibility};
use attn_core::{Causality, Target};

/// Something a variant promises.
pub(super) struct Promise {
    /// What reports call it.
    pub(super) name: &'static str,
    /// Whether this configuration makes it.
    pub(super) applies: fn(&Subject<'_>) -> bool,
    /// Whether it is kept.
    pub(super) run: fn(&Subject<'_>) -> Outcome,
}

const fn promise(
    name: &'static str,
    applies: fn(&Subject<'_>) -> bool,
    run: fn(&Subject<'_>) -> Outcome,
) -> Promise {
    Promise { name, applies, run }
}

fn always(_: &Subject<'_>) -> bool {
    true
}

fn is_softmax(v: &Subject<'_>) -> bool {
    v.attention.as_softmax().is_some()
}

fn is_strict(v: &Subject<'_>) -> bool {
    v.profile.causality == Causality::Strict
}

fn has_exact_softmax_rows(v: &Subject<'_>) -> bool {
    matches!(v.profile.target, Target::Softmax | Target::SoftmaxOverChosen)
}

/// Every promise, cheap ones first.
pub(super) const PROMISES: [Promise; 26] = [
    promise("names", always, interface::names),
    promise("options", always, interface::options),
    promise("cost", always, interface::cost),
    promise("runner", always, interface::runner),
    promise("definition", always, agreement::definition),
    promise("softmax", |v| v.is_plain_softmax(), agreement::softmax),
    promise("log-sum-exp", is_softmax, agreement::log_sum_exp),
    promise("score-shift", |v| is_softmax(v) && v.is_plain_softmax(), agreement::score_shift),
    promise("half-storage", always, agreement::half_storage),
    promise("instruction-sets", always, agreement::instruction_sets),
    promise("extreme-scores", always, agreement::extreme_scores),
    promise("causal-option", |v| v.options.get("causal") == Ok(Some(true)), visibility::causal_option),
    promise("strict-causality", is_strict, visibility::strict_causality),
    promise("masked-causality", |v| v.profile.causality == Causality::Masked, visibility::masked_causality),
    promise("convexity", |v| v.profile.convex, visibility::convexity),
    promise("key-order", |v| v.profile.key_order_free, visibility::key_order),
    promise("batch-independence", always, visibility::batch_independence),
    promise("head-independence", always, visibility::head_independence),
    promise("nan-rows", has_exact_softmax_rows, visibility::nan_rows),
    promise("streaming", |v| v.attention.as_streaming().is_some(), streaming::streaming),
    promise("threads", always, invariance::threads),
    promise("strided", always, invariance::strided),
    promise("every-row-written", always, invariance::every_row_written),
    promise("empty-input", always, edges::empty_input),
    promise("refusals", always, edges::refusals),
    promise("argument-errors", always, edges::argument_errors),
];
