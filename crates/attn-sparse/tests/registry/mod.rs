//! What every registered variant must keep, at sizes where its choice matters.

mod gradients;
mod properties;
#[path = "../../examples/mask_pictures/small_options.rs"]
mod small_options;

use attn_core::registry::{Entry, Options};
use attn_core::{Attention, AttnShape, ViewMut};
use attn_testkit::inputs::Problem;

/// Tokens of all problems.
const N: usize = 64;

/// Every variant with its small options.
fn variants() -> Vec<(Entry, Options)> {
    let entries = attn_sparse::registry();
    let with = |entry: Entry| {
        let small = small_options::small_options(entry.name);
        let small = small.unwrap_or_else(|| panic!("{} has no small options", entry.name));
        (entry, Options::parse(small.split_whitespace()).expect("key=value"))
    };
    entries.into_iter().map(with).collect()
}

fn build(entry: &Entry, options: &Options) -> Box<dyn Attention> {
    entry.build(options).unwrap_or_else(|error| panic!("{}: {error}", entry.name))
}

fn forward(attention: &dyn Attention, problem: &Problem) -> Vec<f32> {
    let mut out = vec![f32::NAN; problem.shape.out().iter().product()];
    let view = ViewMut::contiguous("out", &mut out, problem.shape.out()).expect("it fits");
    let done = attention.forward(problem.qkv().expect("it fits"), view.into());
    done.unwrap_or_else(|error| panic!("{}: {error}", attention.name()));
    out
}

/// How much of each value reaches each output, `[heads, n_q, n_kv]`: the outputs where value `j` is the `j`-th unit vector.
/// A key that is not attended has exactly 0.
fn weights(attention: &dyn Attention, problem: &Problem) -> Vec<f32> {
    let shape = AttnShape { head_dim_v: problem.shape.n_kv, ..problem.shape };
    let unit = |at: usize| f32::from(u8::from(at / shape.n_kv % shape.n_kv == at % shape.n_kv));
    let v = (0..shape.v().iter().product()).map(unit).collect();
    forward(attention, &Problem { shape, q: problem.q.clone(), k: problem.k.clone(), v })
}

#[test]
fn every_choice_matters_at_these_sizes() {
    let problem = Problem::normal(AttnShape::square(2, N, 4), 1);
    for (entry, options) in variants() {
        let weights = weights(&*build(&entry, &options), &problem);
        let differs = |sees: &dyn Fn(usize, usize) -> bool| {
            let wrong = |(at, weight): &(usize, &f32)| sees(at / N % N, at % N) != (**weight > 0.0);
            weights.iter().enumerate().filter(wrong).count() > N
        };
        // Entries and mixtures bring something of every token.
        let all = matches!(entry.name, "compressed-heavy" | "nsa" | "sinkhorn");
        assert!(all || differs(&|_, _| true), "{} {options:?} attends all pairs", entry.name);
        assert!(all || differs(&|i, j| j <= i), "{} {options:?} attends all causal pairs", entry.name);
    }
}
