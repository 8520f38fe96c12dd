//! The conformance suite passes a correct variant and catches variants broken on purpose.

mod fault;
mod textbook;

use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, run_qkv};
use attn_core::{Attention, Family, Result};
use attn_testkit::conformance::{Report, check, report};
use fault::Fault;
use std::cell::Cell;
use std::collections::BTreeSet;
use textbook::Textbook;

thread_local! {
    /// The fault of the variants built on this thread: a registry constructor is a plain function.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

const ENTRY: Entry = Entry {
    name: "textbook",
    family: Family::Exact,
    summary: "Exact softmax attention in plain loops",
    options: &[OptionSpec { name: "causal", default: "false", help: "no key after the query" }],
    constructor: build,
    runner: run,
};

fn build(options: &Options) -> Result<Box<dyn Attention>> {
    let fault = FAULT.get();
    let causal = match fault {
        Fault::SwallowsOptions => options.get_or("causal", false).unwrap_or(false),
        Fault::DefaultsDiffer => options.get_or("causal", true)?,
        _ => options.get_or("causal", false)?,
    };
    Ok(Box::new(Textbook { causal, fault }))
}

fn run(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let mut read = tensors.clone();
    if FAULT.get() == Fault::IgnoresTensors {
        read.0.retain(|name, _| ["q", "k", "v"].contains(&name.as_str()));
    }
    run_qkv(entry, options, &read)
}

fn configurations() -> [Options; 2] {
    [Options::new(), Options::new().with("causal", true)]
}

/// One configuration, to be quick: causal makes every promise but one about the order of keys.
fn report_with(fault: Fault) -> Report {
    let [full, causal] = configurations();
    let needs_full = matches!(fault, Fault::ScoresKnowPositions | Fault::DefaultsDiffer);
    FAULT.set(fault);
    let report = report(&ENTRY, &[if needs_full { full } else { causal }]);
    FAULT.set(Fault::None);
    report
}

/// Each fault with the promises that must catch it.
const FAULTS: [(Fault, &[&str]); 36] = [
    (Fault::WrongScale, &["definition"]),
    (Fault::LastTileDropped, &["definition"]),
    (Fault::LastRowNotWritten, &["every-row-written", "definition"]),
    (Fault::AddsToOutput, &["every-row-written"]),
    (Fault::IgnoresStrides, &["strided"]),
    (Fault::SharesBatchEntry, &["batch-independence"]),
    (Fault::NoRunningMaximum, &["extreme-scores"]),
    (Fault::HalfIsCoarse, &["half-storage"]),
    (Fault::PortableIsWrong, &["instruction-sets"]),
    (Fault::DependsOnThreads, &["threads"]),
    (Fault::NanLeaksToNeighbour, &["nan-rows"]),
    (Fault::NanSwallowed, &["nan-rows"]),
    (Fault::LseInBaseTwo, &["log-sum-exp", "score-shift", "runner"]),
    (Fault::LseSaturates, &["score-shift"]),
    (Fault::WrongDefinition, &["softmax", "definition"]),
    (Fault::CausalOffByOne, &["strict-causality"]),
    (Fault::CausalIgnored, &["strict-causality", "streaming"]),
    (Fault::CausalNotPromised, &["causal-option"]),
    (Fault::NotConvex, &["convexity"]),
    (Fault::ScoresKnowPositions, &["key-order"]),
    (Fault::GroupsTiled, &["head-independence"]),
    (Fault::StreamForgetsAToken, &["streaming"]),
    (Fault::StreamMiscounts, &["streaming"]),
    (Fault::StreamTakesAnything, &["streaming"]),
    (Fault::PanicsOnEmpty, &["empty-input"]),
    (Fault::NothingSeenIsNan, &["empty-input"]),
    (Fault::RefusesGroups, &["definition"]),
    (Fault::MoreThanPromised, &["refusals"]),
    (Fault::VagueErrors, &["argument-errors"]),
    (Fault::WritesBeforeChecking, &["argument-errors"]),
    (Fault::OtherName, &["names"]),
    (Fault::PromisesNothing, &["names"]),
    (Fault::CostGrowsOtherwise, &["cost"]),
    (Fault::SwallowsOptions, &["options"]),
    (Fault::DefaultsDiffer, &["options"]),
    (Fault::IgnoresTensors, &["runner"]),
];

#[test]
fn a_correct_variant_passes() {
    check(&ENTRY);
}

#[test]
fn every_fault_is_caught_by_its_promise() {
    let check = |faults: &[(Fault, &[&str])]| {
        for (fault, promises) in faults {
            let report = report_with(*fault);
            for promise in *promises {
                let caught = report.broken().any(|f| f.promise == *promise);
                assert!(caught, "{fault:?} keeps `{promise}`:\n{report}");
            }
        }
    };
    std::thread::scope(|scope| {
        for faults in FAULTS.chunks(FAULTS.len().div_ceil(4)) {
            scope.spawn(move || check(faults));
        }
    });
}

#[test]
fn every_promise_is_broken_by_some_fault() {
    let made: BTreeSet<_> = report(&ENTRY, &configurations()).findings.iter().map(|f| f.promise).collect();
    let broken: BTreeSet<_> =
        FAULTS.iter().flat_map(|(_, promises)| promises.iter().copied()).chain(["builds"]).collect();
    assert_eq!(made, broken);
}

#[test]
fn faults_that_touch_little_break_little() {
    let only = |fault, promise| {
        let report = report_with(fault);
        assert!(report.broken().all(|f| f.promise == promise) && !report.is_clean(), "{report}");
    };
    only(Fault::StreamForgetsAToken, "streaming");
    only(Fault::IgnoresStrides, "strided");
    only(Fault::CostGrowsOtherwise, "cost");
    only(Fault::NotConvex, "convexity");
}

#[test]
fn what_cannot_be_built_is_reported() {
    let report = report(&ENTRY, &[Options::new().with("causal", "perhaps"), Options::new().with("speed", 9)]);
    let reasons: Vec<_> = report.broken().map(|f| (f.promise, f.outcome.clone().unwrap_err())).collect();
    assert_eq!(reasons.len(), 2, "{report}");
    assert!(reasons[0].0 == "builds" && reasons[0].1.contains("perhaps"), "{reasons:?}");
    assert!(reasons[1].1.contains("speed"), "{reasons:?}");
    assert!(!attn_testkit::conformance::report(&ENTRY, &[]).is_clean(), "nothing tried is nothing kept");
}

#[test]
fn a_failure_names_promise_options_shape_and_element() {
    let text = report_with(Fault::WrongScale).to_string();
    for word in
        ["textbook (causal=true) breaks `definition`", "n_q 2, n_kv 2", "got ", "want ", "first at [0, "]
    {
        assert!(text.contains(word), "no `{word}` in:\n{text}");
    }
    FAULT.set(Fault::PanicsOnEmpty);
    let panic = std::panic::catch_unwind(|| check(&ENTRY)).unwrap_err();
    FAULT.set(Fault::None);
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(message.contains("breaks `empty-input`: it panicked: an empty input"), "{message}");
}
