//! The variants of the matrix-state engine against vectors computed by other people's packages.

use attn_core::View;
use attn_core::registry::{NamedTensors, Options, TensorData, find};
use attn_linear::matrix_state::{Inputs, StateAttention, StateVariant};
use attn_linear::recurrent::*;
use attn_linear::registry;
use attn_testkit::compare::assert_close;
use attn_testkit::golden::{GoldenCase, load_dir};

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|case| case.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// Inputs under our names.
fn renamed(case: &GoldenCase, names: &[(&str, &str)]) -> NamedTensors {
    let ours = |name: &String| {
        names.iter().find(|(theirs, _)| theirs == name).map_or(name.clone(), |(_, o)| o.to_string())
    };
    NamedTensors(case.inputs.0.iter().map(|(name, tensor)| (ours(name), tensor.clone())).collect())
}

/// Runs every case of `variant`, with the file's scale, as ours.
fn check_as(
    variant: &str,
    ours: &str,
    count: usize,
    names: &[(&str, &str)],
    options: impl Fn(&GoldenCase) -> Options,
) {
    for case in cases(variant, count) {
        let tensors = renamed(
            &case,
            &[&[("s0", "initial_state"), ("g", "log_decay"), ("log_w", "log_decay")], names].concat(),
        );
        let options = options(&case).with("scale", &case.options["scale"]);
        let got = find(&registry(), ours).unwrap().run(&options, &tensors).unwrap();
        case.assert_outputs(&got);
    }
}

/// As [`check`], and compares the gradients that the files store.
fn check_gradients<V: StateVariant>(
    variant: &str,
    count: usize,
    names: &[(&str, &str)],
    options: impl Fn(&GoldenCase) -> Options,
) {
    let names = [&[("s0", "initial_state"), ("g", "log_decay"), ("log_w", "log_decay")], names].concat();
    check(variant, count, &names, &options);
    let mut compared = 0;
    for case in cases(variant, count) {
        let Some(w) = &case.w else { continue };
        let tensors = renamed(&case, &names);
        let ours = V::from_options(&options(&case).with("scale", &case.options["scale"])).unwrap();
        let attention = StateAttention::new(ours);
        let x = Inputs::of(&tensors, V::EXTRAS).unwrap();
        let memory = attention.memory_of(&x, &tensors).unwrap();
        let TensorData::F32(w_data) = &w.data else { panic!("f32") };
        let shape: [usize; 4] = w.shape.as_slice().try_into().unwrap();
        let d_out = View::contiguous("w", w_data, shape).unwrap();
        let got = attention.backward_inputs(&x, Some(&memory), d_out.into(), None).unwrap();
        for (theirs, want) in &case.grads.0 {
            let name =
                names.iter().find(|(name, _)| name == theirs).map_or(theirs.as_str(), |(_, ours)| ours);
            let data = match name {
                "initial_state" => &got.memory[..],
                _ => got.inputs.f32(name).unwrap().unwrap_or_else(|| panic!("{variant}: no {name}")).1,
            };
            let what = format!("{variant} {}: gradient of {theirs}", case.case);
            assert_close(
                &what,
                data,
                &want.data.to_f64(),
                case.tolerance_for(&format!("grad.{theirs}")).unwrap(),
            );
            compared += 1;
        }
    }
    assert!(compared > 3, "{variant}: the files store gradients");
}

fn check(variant: &str, count: usize, names: &[(&str, &str)], options: impl Fn(&GoldenCase) -> Options) {
    check_as(variant, variant, count, names, options);
}

fn plain(_: &GoldenCase) -> Options {
    Options::new()
}

fn raw_keys(_: &GoldenCase) -> Options {
    Options::new().with("qk_norm", false)
}

/// What `qk_l2norm` says, and how the file's gate is called here.
fn normed(case: &GoldenCase) -> Options {
    let gate = case.options.get("gate").and_then(|gate| gate.as_str()).unwrap_or_default();
    let options = Options::new().with("qk_norm", case.options.contains_key("qk_l2norm"));
    if gate.starts_with("g = -5") { options.with("gate", "lower-bound") } else { options }
}

const GATES: &[(&str, &str)] = &[("g_raw", "gate_raw"), ("A_log", "a_log")];

#[test]
fn gated_linear_attention_equals_flash_linear_attention() {
    check_gradients::<Gla>("gla", 5, &[], plain);
    check_gradients::<SimpleGla>("simple-gla", 5, &[], plain);
}

#[test]
fn delta_rules_equal_flash_linear_attention_and_transformers() {
    check_gradients::<DeltaNet>("deltanet", 5, &[], raw_keys);
    check_gradients::<GatedDeltaNet>("gated-deltanet", 8, GATES, normed);
    check_gradients::<Kda>("kda", 8, GATES, normed);
}

#[test]
fn mamba2_equals_transformers() {
    let names = [("Bm", "k"), ("Cm", "q"), ("x", "v"), ("A", "a"), ("D", "d")];
    check_gradients::<Mamba2>("mamba2", 5, &names, |case| {
        Options::new().with("softplus", &case.options["dt_softplus"])
    });
}

#[test]
fn rwkv_equals_flash_linear_attention() {
    check_gradients::<Rwkv5>("rwkv5", 1, &[("u", "bonus")], plain);
    check_gradients::<Rwkv6>("rwkv6", 5, &[("u", "bonus")], plain);
    check_gradients::<Rwkv7>("rwkv7", 5, &[("r", "q"), ("a", "alpha")], plain);
}

#[test]
fn lightning_equals_transformers() {
    check_gradients::<Lightning>("lightning", 3, &[], plain);
    // Its slopes are the ones we take where none are given.
    for case in cases("lightning", 3) {
        let slopes = case.inputs.f32("slope").unwrap().unwrap().1;
        let [layer, layers] = ["layer", "layers"].map(|name| case.options[name].as_u64().unwrap() as usize);
        let ours = Lightning { scale: 1.0, layer, layers, chunk_len: 64 };
        for (h, slope) in slopes.iter().enumerate() {
            let got = ours.slope(h, slopes.len());
            assert!((got - slope).abs() <= 1e-6 * slope, "{}: {got} {slope}", case.case);
        }
    }
}

#[test]
fn hgrn2_equals_flash_linear_attention() {
    check_gradients::<Hgrn2>("hgrn2", 3, &[("f", "k")], |case| {
        Options::new().with("lower_bound", &case.options["lower_bound"])
    });
}

#[test]
fn delta_products_equal_flash_linear_attention() {
    let options = |case: &GoldenCase| raw_keys(case).with("householders", &case.options["num_householder"]);
    for case in cases("gated-deltaproduct", 3) {
        let gated = case.options["gate"].as_bool().unwrap();
        let name = if gated { "gated-deltaproduct" } else { "deltaproduct" };
        let options = options(&case).with("scale", &case.options["scale"]);
        let tensors = renamed(&case, &[("s0", "initial_state"), ("g", "log_decay")]);
        case.assert_outputs(&find(&registry(), name).unwrap().run(&options, &tensors).unwrap());
    }
}

#[test]
fn other_delta_rules_equal_flash_linear_attention() {
    check_gradients::<Comba>("comba", 3, &[], raw_keys);
    check_gradients::<Gdn2>("gdn2", 3, &[("b", "erase_gate"), ("wgate", "write_gate")], raw_keys);
    check_gradients::<Dplr>("dplr", 3, &[], raw_keys);
    check_gradients::<Iplr>("iplr", 3, &[], raw_keys);
}

#[test]
fn gates_of_other_kinds_equal_their_packages() {
    check("lightnet", 3, &[], plain);
    check("gateloop", 2, &[], plain);
    check("rodimus", 3, &[("gl", "gate_raw"), ("tl", "temperature_raw")], plain);
}

#[test]
fn mlstm_equals_xlstm() {
    let names = [("f", "forget_gate"), ("i", "input_gate")];
    check("mlstm", 5, &names, |case| Options::new().with("eps", &case.options["eps"]));
}

#[test]
fn slot_memories_equal_flash_linear_attention() {
    check("gsa", 5, &[("s", "slots")], plain);
    check("abc", 2, &[("s", "slots")], plain);
}

#[test]
fn preconditioned_delta_rules_equal_flash_linear_attention() {
    let names = [("a0", "use0"), ("beta_atk", "beta_use"), ("g_atk", "log_decay_use")];
    for (variant, count) in [("precond-gdn", 3), ("precond-kda", 3)] {
        for case in cases(variant, count) {
            let tensors =
                renamed(&case, &[&names[..], &[("s0", "initial_state"), ("g", "log_decay")]].concat());
            let options = Options::new()
                .with("scale", &case.options["scale"])
                .with("qk_norm", &case.options["qk_l2norm_inside"]);
            let mut got = find(&registry(), variant).unwrap().run(&options, &tensors).unwrap();
            let used = got.0.remove("useT").unwrap();
            got.0.insert("aT".into(), used);
            case.assert_outputs(&got);
        }
    }
}

#[test]
fn fast_weights_equal_flash_linear_attention() {
    check("fwp-dpfp", 3, &[], |case| Options::new().with("nu", &case.options["nu"]));
}

#[test]
fn mamba3_equals_its_recurrence() {
    let names = [("A", "a"), ("D", "d"), ("kprev", "k_before"), ("vprev", "v_before")];
    check("mamba3", 3, &names, plain);
}

#[test]
fn ojas_rule_equals_its_recurrence() {
    check("gated-oja", 3, &[("gv", "log_decay")], |_| Options::new().with("v_norm", false));
}

#[test]
fn momentum_equals_flash_linear_attention() {
    check("momentum-delta", 3, &[("g_mu", "log_mu")], raw_keys);
    check("titans-linear", 3, &[("g_mu", "log_mu")], raw_keys);
}

#[test]
fn mesanet_equals_flash_linear_attention() {
    check("mesanet", 3, &[("lamb", "lambda")], raw_keys);
}
