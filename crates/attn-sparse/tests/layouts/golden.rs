//! Masks, outputs and gradients of other people's code; see `testdata/README.md`.

use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};
use attn_core::registry::{NamedTensors, Options, find};
use attn_sparse::*;
use attn_testkit::compare::assert_close;
use attn_testkit::golden::{GoldenCase, load_dir};

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

fn size(case: &GoldenCase, name: &str) -> usize {
    case.options[name].as_u64().unwrap() as usize
}

fn flag(case: &GoldenCase, name: &str) -> bool {
    case.options.get(name).and_then(|value| value.as_bool()).unwrap_or(false)
}

fn sizes(case: &GoldenCase, name: &str) -> Vec<usize> {
    let value = &case.options[name];
    let number = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
    value.as_array().map_or_else(|| vec![number(value)], |all| all.iter().map(number).collect())
}

fn commas(sizes: &[usize]) -> String {
    sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn shape(case: &GoldenCase) -> AttnShape {
    case.inputs.qkv().unwrap().shape()
}

/// The pattern's mask must be the stored one.
fn check_mask(case: &GoldenCase, mask: &dyn Mask) {
    let (given, s) = (case.given.require("mask").unwrap(), shape(case));
    let (wanted, axes) = (given.data.to_f64(), &given.shape);
    for head in (0..s.batch).flat_map(|batch| (0..s.n_heads_q).map(move |head| Head { batch, head })) {
        let (batch, list) = (head.batch.min(axes[0] - 1), head.head.min(axes[1] - 1));
        for (i, j) in (0..s.n_q).flat_map(|i| (0..s.n_kv).map(move |j| (i, j))) {
            let wanted = wanted[((batch * axes[1] + list) * s.n_q + i) * s.n_kv + j] == 1.0;
            assert_eq!(mask.sees(head.pair(i, j)), wanted, "{}: {head:?}, {i}, {j}", case.case);
        }
    }
}

/// Outputs, log-sum-exps and gradients through the registry.
fn check_run(case: &GoldenCase, name: &str, options: Options, given: &[&str]) {
    let entries = registry();
    let mut inputs: NamedTensors = case.inputs.clone();
    for name in given {
        inputs.0.insert(name.to_string(), case.given.require(name).unwrap().clone());
    }
    if let Some(w) = &case.w {
        inputs.0.insert("grad_o".into(), w.clone());
    }
    let got = find(&entries, name).unwrap().run(&options, &inputs).unwrap();
    case.assert_outputs(&got);
    for (name, want) in &case.grads.0 {
        let name = format!("grad.{name}");
        let got = got.require(&name).unwrap();
        assert_eq!(got.shape, want.shape, "{}: {name}", case.case);
        let tol = case.tolerance_for(&name).unwrap();
        assert_close(&format!("{}: {name}", case.case), &got.data.to_f64(), &want.data.to_f64(), tol);
    }
}

#[test]
fn bigbird() {
    for case in cases("bigbird", 2) {
        let (block, random) = (size(&case, "block"), size(&case, "num_random_blocks"));
        let pattern = BigBird {
            block,
            num_random_blocks: random,
            num_window_blocks: size(&case, "num_window_blocks"),
            num_global_blocks: 1,
            seed: 0,
            causal: false,
        };
        let options = Options::new().with("block", block).with("num_random_blocks", random);
        check_run(&case, "bigbird", options, &["block_mask"]);
        let local = BigBird { num_random_blocks: 0, ..pattern };
        check_blocks(&case, &local, random, true);
        check_counts(&case, &pattern);
    }
}

/// The layout without random blocks is part of the stored one, which has at most (or exactly) `random` blocks more in each
/// row that does not see everything.
fn check_blocks<L: BlockLayout>(case: &GoldenCase, layout: &L, random: usize, exactly: bool) {
    let given = case.given.require("block_mask").unwrap();
    let (wanted, m) = (given.data.to_f64(), given.shape[3]);
    for (list, row) in (0..given.shape[1]).flat_map(|list| (0..m).map(move |row| (list, row))) {
        let wanted: Vec<usize> = (0..m).filter(|col| wanted[(list * m + row) * m + col] == 1.0).collect();
        let mut derived = layout.row(list, row, m);
        derived.retain(|col| *col < m && (!layout.causal() || *col <= row));
        derived.sort_unstable();
        derived.dedup();
        let at = format!("{}: list {list}, row {row}: {derived:?} of {wanted:?}", case.case);
        assert!(derived.iter().all(|col| wanted.contains(col)), "{at}");
        let more = wanted.len() - derived.len();
        let expected = if derived.len() == m { 0 } else { random };
        assert!(more <= expected && (!exactly || more == expected), "{at}");
    }
}

/// As many pairs in each row of blocks as the stored mask has.
fn check_counts(case: &GoldenCase, pattern: &BigBird) {
    let pairs: f64 = case.given.require("mask").unwrap().data.to_f64().iter().sum();
    assert_eq!(Pattern::pairs(pattern, &shape(case)) as f64, pairs, "{}", case.case);
}

#[test]
fn longformer() {
    for case in cases("longformer", 4) {
        let flags = case.inputs.require("global_tokens").unwrap();
        let positions = |entry: &[f64]| (0..entry.len()).filter(|p| entry[*p] == 1.0).collect();
        let globals = flags.data.to_f64().chunks(flags.shape[1]).map(positions).collect();
        let window = size(&case, "window_one_sided");
        let pattern = Longformer { window, globals: GlobalTokens::per_batch(globals), causal: false };
        check_mask(&case, &pattern.mask(&shape(&case)).unwrap());
        check_run(&case, "longformer", Options::new().with("window", window), &[]);
        if case.grads.0.is_empty() {
            continue;
        }
        // The same from the option instead of the tensor.
        let indices = commas(&sizes(&case, "global_indices"));
        let mut same = case.clone();
        same.inputs.0.remove("global_tokens");
        check_run(
            &same,
            "longformer",
            Options::new().with("window", window).with("global_tokens", indices),
            &[],
        );
    }
}

#[test]
fn sparse_transformer_strided() {
    for case in cases("sparse-transformer-strided", 4) {
        let (stride, merged) = (size(&case, "stride"), flag(&case, "merged"));
        check_mask(&case, &StridedAttention { stride: Some(stride), merged }.mask(&shape(&case)).unwrap());
        let options = Options::new().with("stride", stride).with("merged", merged);
        check_run(&case, "sparse-transformer-strided", options, &[]);
    }
}

fn check_neighborhood<const D: usize>(case: &GoldenCase, name: &str) {
    let [kernels, dilations, strides] = ["kernel_size", "dilation", "stride"].map(|name| sizes(case, name));
    let axis = |a: usize| AxisWindow {
        kernel_size: kernels[a],
        dilation: dilations[a],
        stride: strides[a],
        causal: flag(case, "causal"),
    };
    let grid =
        case.options.contains_key("grid").then(|| <[usize; D]>::try_from(sizes(case, "grid")).unwrap());
    let pattern = Neighborhood { axes: std::array::from_fn(axis), grid };
    check_mask(case, &pattern.mask(&shape(case)).unwrap());
    let options = Options::new().with("kernel_size", commas(&kernels)).with("dilation", commas(&dilations));
    let mut options = options.with("stride", commas(&strides)).with("causal", flag(case, "causal"));
    if let Some(grid) = grid {
        options = options.with("grid", commas(&grid));
    }
    check_run(case, name, options, &[]);
}

#[test]
fn neighborhoods() {
    cases("neighborhood-1d", 3).iter().for_each(|case| check_neighborhood::<1>(case, "neighborhood-1d"));
    cases("neighborhood-2d", 2).iter().for_each(|case| check_neighborhood::<2>(case, "neighborhood-2d"));
}

/// Options that ours share with the file, by name.
fn same(case: &GoldenCase, names: &[&str]) -> Options {
    let text = |value: &serde_json::Value| match value.as_array() {
        Some(all) => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        None => value.to_string(),
    };
    let given = names.iter().filter_map(|name| case.options.get(*name).map(|value| (*name, text(value))));
    given.fold(Options::new(), |options, (name, value)| options.with(name, value))
}

/// The neighbouring blocks of a case.
fn local(case: &GoldenCase, causal: bool) -> LocalLayout {
    let num_sliding_window_blocks = size(case, "num_sliding_window_blocks");
    LocalLayout { block: size(case, "block"), num_sliding_window_blocks, causal }
}

#[test]
fn derived_block_layouts() {
    let names = [
        "block",
        "causal",
        "different_layout_per_head",
        "horizontal_global_attention",
        "num_different_global_patterns",
        "num_global_blocks",
        "num_local_blocks",
        "num_sliding_window_blocks",
        "global_block_indices",
    ];
    for case in cases("block-layout-fixed", 2) {
        let layout = FixedLayout {
            block: size(&case, "block"),
            num_local_blocks: size(&case, "num_local_blocks"),
            num_global_blocks: size(&case, "num_global_blocks"),
            num_different_global_patterns: case
                .options
                .get("num_different_global_patterns")
                .map_or(1, |value| value.as_u64().unwrap() as usize),
            horizontal_global_attention: flag(&case, "horizontal_global_attention"),
            different_layout_per_head: flag(&case, "different_layout_per_head"),
            causal: flag(&case, "causal"),
        };
        check_mask(&case, &layout.mask(&shape(&case)).unwrap());
        check_run(&case, "block-layout-fixed", same(&case, &names), &[]);
        check_run(&case, "block-layout-fixed", same(&case, &names), &["block_mask"]);
    }
    for case in cases("block-layout-bslongformer", 1) {
        let globals = GlobalBlocks { starts: sizes(&case, "global_block_indices"), ends: Vec::new() };
        let layout = LongformerLayout { local: local(&case, flag(&case, "causal")), globals };
        check_mask(&case, &layout.mask(&shape(&case)).unwrap());
        check_run(&case, "block-layout-bslongformer", same(&case, &names), &[]);
    }
    for case in cases("block-layout-localslidingwindow", 1) {
        let layout = local(&case, flag(&case, "causal"));
        check_mask(&case, &layout.mask(&shape(&case)).unwrap());
        check_run(&case, "block-layout-localslidingwindow", same(&case, &names), &[]);
    }
}

#[test]
fn random_block_layouts() {
    for case in cases("block-layout-bigbird", 1) {
        let layout = BigBirdLayout {
            local: local(&case, true),
            num_random_blocks: 0,
            num_global_blocks: size(&case, "num_global_blocks"),
            different_layout_per_head: true,
            seed: 0,
        };
        check_blocks(&case, &layout, size(&case, "num_random_blocks"), false);
        let options = same(&case, &["block", "causal", "different_layout_per_head", "num_random_blocks"]);
        check_run(&case, "block-layout-bigbird", options, &["block_mask"]);
    }
    for case in cases("block-layout-variable", 1) {
        let layout = VariableLayout {
            block: size(&case, "block"),
            num_random_blocks: 0,
            local_window_blocks: sizes(&case, "local_window_blocks"),
            globals: GlobalBlocks { starts: sizes(&case, "global_block_indices"), ends: Vec::new() },
            horizontal_global_attention: false,
            different_layout_per_head: false,
            causal: true,
            seed: 0,
        };
        check_blocks(&case, &layout, size(&case, "num_random_blocks"), false);
        let names = ["block", "causal", "global_block_indices", "local_window_blocks", "num_random_blocks"];
        check_run(&case, "block-layout-variable", same(&case, &names), &["block_mask"]);
    }
}
