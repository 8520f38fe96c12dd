use super::super::{Form, GoldenCase};
use super::*;
use attn_core::Family;
use attn_core::registry::{NamedTensor, TensorData};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A case without numbers worth comparing: tensors of zeros.
fn case(variant: &str, options: serde_json::Value, inputs: &[(&str, &[usize])]) -> GoldenCase {
    let zeros = |name: &str, shape: &[usize]| {
        let len = shape.iter().product();
        let data = match name {
            "mask" | "keep" => TensorData::U8(vec![1; len]),
            "document" | "block_table" | "nonpad_kv_seqlen" | "seqlens_k" => TensorData::I32(vec![0; len]),
            _ => TensorData::F32(vec![0.0; len]),
        };
        NamedTensor { shape: shape.to_vec(), data }
    };
    let named = inputs.iter().map(|(name, shape)| (name.to_string(), zeros(name, shape)));
    let qkv = ["q", "k", "v"].map(|name| (name.to_string(), zeros(name, &[2, 3, 4, 8])));
    let qkv = qkv.into_iter().filter(|_| !inputs.iter().any(|(name, _)| ["q", "k_cache"].contains(name)));
    GoldenCase {
        path: PathBuf::new(),
        family: Family::Exact,
        variant: variant.into(),
        case: "test".into(),
        reference: String::new(),
        options: options.as_object().unwrap().clone(),
        metadata: BTreeMap::new(),
        inputs: NamedTensors(qkv.chain(named).collect()),
        outputs: NamedTensors::default(),
        grads: NamedTensors::default(),
        given: NamedTensors::default(),
        aux: NamedTensors::default(),
        w: None,
        tolerance: BTreeMap::new(),
    }
}

fn planned(variant: &str, options: serde_json::Value, inputs: &[(&str, &[usize])]) -> Plan {
    plan(&case(variant, options, inputs)).unwrap()
}

fn refused(variant: &str, options: serde_json::Value, inputs: &[(&str, &[usize])]) -> String {
    plan(&case(variant, options, inputs)).unwrap_err()
}

fn options(plan: &Plan) -> Vec<(&str, &str)> {
    plan.options.0.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

use serde_json::json;

#[test]
fn options_become_ours() {
    let plan = planned(
        "sliding_window",
        json!({"causal": true, "align": "top_left", "window_left": 7, "window_right": -1, "scale": null,
               "softcap": 12.5, "dtype": "f16"}),
        &[],
    );
    let wanted = [("align", "top-left"), ("causal", "true"), ("softcap", "12.5"), ("window_left", "7")];
    assert_eq!(options(&plan), wanted);
    assert_eq!(plan.inputs.get("v").unwrap().data.dtype(), Some(DType::F16));
    let l2 = planned("qk_norm_l2", json!({"norm": "q/max(|q|,1e-7)", "scale": 3.0}), &[]);
    assert_eq!(options(&l2), [("qk_norm", "l2"), ("qk_norm_eps", "1e-7"), ("scale", "3.0")]);
    let stream = planned("kv_cache", json!({"causal": true, "chunks": [3, 1]}), &[("chunks", &[2])]);
    assert_eq!(stream.form, Form::Stream(vec![3, 1]));
}

#[test]
fn nothing_is_ignored() {
    for (variant, options, inputs, said) in [
        ("linear", json!({}), vec![], "`linear`"),
        ("softmax", json!({"temperature": 2}), vec![], "`temperature`"),
        ("softmax", json!({}), vec![("gate", &[4][..])], "`gate`"),
        ("bool_mask", json!({"mask": "bool, 1 = ignore"}), vec![("mask", &[4, 4])], "1 = ignore"),
        ("alibi", json!({"formula": "slope_h*j"}), vec![], "slope_h*j"),
        ("qk_norm_rms", json!({"norm": "layer"}), vec![], "layer"),
        ("half_input", json!({"dtype": "fp8"}), vec![], "fp8"),
        ("relative_bias_t5", json!({"num_buckets": 16}), vec![("table", &[32, 3])], "16"),
        ("score_mod_mask_mod", json!({"definition": "s"}), vec![("bias_of", &[3, 4])], "bias_of[axes]"),
        ("score_mod_mask_mod", json!({"mod": "none"}), vec![], "definition"),
        ("onnx_attention", json!({"transposed": 1}), vec![], "`transposed`"),
        ("onnx_flexattention", json!({"prob_mod": "softplus"}), vec![], "body"),
    ] {
        let why = refused(variant, options, &inputs);
        assert!(why.contains(said), "{variant}: {why}");
    }
}

#[test]
fn words_become_formulas_and_tensors() {
    let mask = planned(
        "score_mod_mask_mod",
        json!({"definition": "keep j<=i and (i-j)%5==0", "mod": "dilated"}),
        &[],
    );
    assert_eq!(options(&mask), [("mask_mod", "j<=i and (i-j)%5==0")]);
    let score = planned("score_mod_mask_mod", json!({"definition": "s*(1+0.3h) - 0.02|i-j|"}), &[]);
    assert_eq!(options(&score), [("score_mod", "s*(1+0.3h) - 0.02|i-j|")]);
    let definition = json!({"definition": "keep same document and j<=i"});
    let documents = planned("score_mod_mask_mod", definition, &[("document", &[4])]);
    assert_eq!(options(&documents), [("mask_mod", "true and j<=i")]);
    assert!(documents.inputs.get("documents_q").is_some() && documents.inputs.get("documents_kv").is_some());
}

#[test]
fn summands_become_biases() {
    for (definition, shape, broadcast, left) in [
        ("s + head_bias[h,j]", &[3, 4][..], [1, 3, 1, 4], None),
        ("2s + head_bias[ b , i ] - 0.5", &[2, 4], [2, 1, 4, 1], Some("2s - 0.5")),
        ("s + head_bias[b,h,i,j]", &[2, 3, 4, 4], [2, 3, 4, 4], None),
    ] {
        let plan = planned("score_mod_mask_mod", json!({"definition": definition}), &[("head_bias", shape)]);
        assert_eq!(plan.inputs.get("bias").unwrap().shape, broadcast, "{definition}");
        assert_eq!(plan.options.0.get("score_mod").map(String::as_str), left, "{definition}");
        assert_eq!(plan.renamed["grad.head_bias"], "grad.bias");
    }
    for definition in [
        "s + head_bias[j,h]",
        "s + head_bias[h]",
        "s * head_bias[h,j]",
        "tanh(s + head_bias[h,j])",
        "s + head_bias[h,j] * 2",
        "s - head_bias[h,j]",
    ] {
        let why = refused("score_mod_mask_mod", json!({"definition": definition}), &[("head_bias", &[3, 4])]);
        assert!(why.contains("does not add"), "{definition}: {why}");
    }
}

#[test]
fn graphs_become_formulas() {
    const INDICES: &str = "<int64 zero =  {0}, int64 one =  {1}, int64 idx_2 =  {2}, int64 idx_3 =  {3}, \
                           int64[4] q_shape =  {1,1,-1,1}, int64[2] k_shape =  {1,-1}, float neg_inf =  {-inf}>";
    const RANGES: &str = "scores_shape = Shape (scores)\n L_dim = Gather <axis: int = 0> (scores_shape, idx_2)\n \
                          S_dim = Gather <axis: int = 0> (scores_shape, idx_3)\n q_range = Range (zero, L_dim, one)\n \
                          q_idx = Reshape (q_range, q_shape)\n k_range = Range (zero, S_dim, one)\n \
                          k_idx = Reshape (k_range, k_shape)\n";
    let tensor = "f (float[B,H,L,S] scores) => (float[B,H,L,S] out) \n";
    for (graph, wanted) in [
        (format!("{tensor} <float bias =  {{0.5}}>\n{{\n out = Add (scores, bias)\n}}"), "(s + (0.5))"),
        (
            format!(
                "{tensor}{INDICES}\n{{\n {RANGES} m = GreaterOrEqual (q_idx, k_idx)\n \
                     out = Where (m, scores, neg_inf)\n}}"
            ),
            "where((i >= j), s, (-inf))",
        ),
        (
            format!(
                "{tensor}{INDICES}\n{{\n {RANGES} r = Sub (q_idx, k_idx)\n \
                     c = Cast <to: int = 1> (r)\n out = Add (scores, c)\n}}"
            ),
            "(s + (i - j))",
        ),
        (
            format!(
                "{tensor}{{\n cap = Constant <value_float: float = 20> ()\n d = Div (scores, cap)\n \
                     t = Tanh (d)\n out = Mul (t, cap)\n}}"
            ),
            "(tanh((s / (20))) * (20))",
        ),
        (
            "f (float score, int64 batch, int64 head, int64 q, int64 kv) => (float out)\n\
             {\n x = Cast <to: int = 1> (head)\n out = Mul (score, x)\n}"
                .to_string(),
            "(s * h)",
        ),
    ] {
        assert_eq!(onnx_graph::formula(&graph).as_deref(), Ok(wanted), "{graph}");
    }
    for (body, said) in [
        ("out = Softplus (scores)", "Softplus"),
        ("x = Tanh (scores)", "nothing computes `out`"),
        ("out = Add (scores, bias)", "no `bias` before it"),
        ("out = Shape (scores)", "not elementwise"),
        ("r = Range (zero, one, one)\n out = Reshape (r, one)", "zero"),
    ] {
        let why = onnx_graph::formula(&format!("{tensor}{{\n {body}\n}}")).unwrap_err();
        assert!(why.contains(said), "{body}: {why}");
    }
}

#[test]
fn the_flex_operator_is_graphs_and_factors() {
    let scaled = "p (float[B,H,L,S] probs) => (float[B,H,L,S] out)\n <float scale = {0.25}>\n{\n out = Mul (probs, scale)\n}";
    let mut case =
        case("onnx_flexattention", json!({"prob_mod": scaled, "scale": 0.1, "dtype": "float64"}), &[]);
    case.inputs.0.insert("v".into(), NamedTensor::f32("v", &[1, 1, 1, 2], vec![4.0, -8.0]).unwrap());
    let plan = plan(&case).unwrap();
    assert_eq!(plan.inputs.get("v").unwrap().data, TensorData::F32(vec![1.0, -2.0]));
    assert_eq!(options(&plan), [("scale", "0.1")]);
    assert!(plan.notes[0].contains("float64"));
    let curved = scaled.replace("Mul (probs, scale)", "Tanh (probs)");
    assert!(refused("onnx_flexattention", json!({"prob_mod": curved}), &[]).contains("a number only"));
}

#[test]
fn the_onnx_operator_is_a_call_and_its_surroundings() {
    let inputs: &[(&str, &[usize])] = &[
        ("q", &[2, 3, 12]),
        ("k", &[2, 5, 6]),
        ("v", &[2, 5, 4]),
        ("past_key", &[2, 2, 7, 3]),
        ("past_value", &[2, 2, 7, 2]),
        ("attn_mask", &[3, 10]),
    ];
    let options_of = |extra: serde_json::Value| {
        let mut options = json!({"rank": 3, "q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1, "softcap": 2.0,
                                 "left_window_size": 4, "op": "Attention", "opset": 25});
        options.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        options
    };
    let plan = planned("onnx_attention", options_of(json!({})), inputs);
    assert_eq!(
        options(&plan),
        [("align", "7"), ("causal", "true"), ("softcap", "2.0"), ("window_left", "4")]
    );
    let shape = |name: &str| plan.inputs.get(name).unwrap().shape.clone();
    assert_eq!(
        [shape("q"), shape("k"), shape("v")],
        [vec![2, 4, 3, 3], vec![2, 2, 12, 3], vec![2, 2, 12, 2]]
    );
    assert_eq!(shape("bias"), [3, 12], "two keys more, hidden");
    assert_eq!(plan.inputs.get("bias").unwrap().data.to_f64()[10..12], [f64::NEG_INFINITY; 2]);
    let Form::Onnx(onnx) = &plan.form else { panic!("{:?}", plan.form) };
    assert!(onnx.folded && onnx.weights.is_none());
    assert_eq!(onnx.present.get("present_key").unwrap().shape, [2, 2, 12, 3]);

    let of_mode = |mode: u64| {
        let mut case = case("onnx_attention", options_of(json!({"qk_matmul_output_mode": mode})), inputs);
        let scores = NamedTensor::f32("x", &[2, 4, 3, 12], vec![0.0; 288]).unwrap();
        case.outputs.0.insert("qk_matmul_output".into(), scores);
        let Form::Onnx(onnx) = plan_of(&case).form else { panic!("ONNX") };
        let weights = onnx.weights.unwrap();
        let names: Vec<String> = weights.inputs.0.into_keys().collect();
        (weights.options.0.into_keys().collect::<Vec<_>>().join(" "), names.join(" "), weights.scores)
    };
    assert_eq!(of_mode(0), ("".into(), "k q".into(), true));
    assert_eq!(of_mode(1), ("softcap".into(), "k q".into(), true));
    let all = ("align causal softcap window_left".to_string(), "bias k q".to_string());
    assert_eq!(of_mode(2), (all.0.clone(), all.1.clone(), true));
    assert_eq!(of_mode(3), (all.0, all.1, false));
}

fn plan_of(case: &GoldenCase) -> Plan {
    plan(case).unwrap()
}

#[test]
fn lengths_of_caches_move_the_queries_to_their_ends() {
    let lens: (&str, &[usize]) = ("nonpad_kv_seqlen", &[2]);
    let plan = planned("onnx_attention", json!({"rank": 4, "is_causal": 1}), &[lens]);
    assert_eq!(options(&plan), [("align", "bottom-right"), ("causal", "true")]);
    assert!(plan.inputs.get("kv_lens").is_some());
}
