use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use super::naive::{Naive, NaiveLayer, Rope, heads_first};
use super::{assert_close, noise_f32};
use crate::lm::{LlamaLike, llama_safetensors, llama2c};

const D_MODEL: usize = 16;
const HEADS_Q: usize = 4;
const HEADS_KV: usize = 2;
const HEAD_DIM: usize = 4;
const D_FF: usize = 20;
const LAYERS: usize = 3;
const VOCAB: usize = 11;
const TOKENS: [u32; 13] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 10];

/// Rounded to bf16, so that every way to store them holds the same numbers.
fn values(count: usize, seed: u64) -> Vec<f32> {
    noise_f32(count, seed).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
}

/// Per layer in the order of the Hugging Face names below.
const PARTS: [(&str, usize, usize); 9] = [
    ("input_layernorm", 1, D_MODEL),
    ("self_attn.q_proj", HEADS_Q * HEAD_DIM, D_MODEL),
    ("self_attn.k_proj", HEADS_KV * HEAD_DIM, D_MODEL),
    ("self_attn.v_proj", HEADS_KV * HEAD_DIM, D_MODEL),
    ("self_attn.o_proj", D_MODEL, HEADS_Q * HEAD_DIM),
    ("post_attention_layernorm", 1, D_MODEL),
    ("mlp.gate_proj", D_FF, D_MODEL),
    ("mlp.up_proj", D_FF, D_MODEL),
    ("mlp.down_proj", D_MODEL, D_FF),
];

fn part(layer: usize, index: usize) -> Vec<f32> {
    let (_, rows, cols) = PARTS[index];
    values(rows * cols, (100 * layer + index) as u64 + 1)
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn naive(rope: impl Fn() -> Rope, own_classifier: bool) -> Naive {
    let embedding = values(VOCAB * D_MODEL, 1000);
    let layer = |l: usize| {
        let part = |index: usize| wide(&part(l, index));
        NaiveLayer {
            attn_norm: part(0),
            wq: part(1),
            wk: part(2),
            wv: part(3),
            wo: part(4),
            ffn_norm: part(5),
            gate: part(6),
            up: part(7),
            down: part(8),
            rope: rope(),
            window: usize::MAX,
            log_scale: None,
        }
    };
    Naive {
        n_heads_q: HEADS_Q,
        n_heads_kv: HEADS_KV,
        head_dim: HEAD_DIM,
        norm_eps: 1e-5,
        embedding: embedding.chunks(D_MODEL).map(wide).collect(),
        layers: (0..LAYERS).map(layer).collect(),
        final_norm: wide(&values(D_MODEL, 1001)),
        classifier: wide(&if own_classifier { values(VOCAB * D_MODEL, 1002) } else { embedding.clone() }),
    }
}

fn check(what: &str, model: &LlamaLike, naive: &Naive) {
    let (inputs, logits) = naive.run(&TOKENS.map(|t| t as usize));
    for (layer, want) in inputs.iter().enumerate() {
        let got = model.capture_layer(&TOKENS, layer).unwrap();
        assert_eq!(
            (got.n_heads_q, got.n_heads_kv, got.n, got.head_dim),
            (HEADS_Q, HEADS_KV, TOKENS.len(), HEAD_DIM)
        );
        for (name, got, want) in [("q", &got.q, &want.q), ("k", &got.k, &want.k), ("v", &got.v, &want.v)] {
            assert_close(&format!("{what} layer {layer} {name}"), got, &heads_first(want, HEAD_DIM));
        }
    }
    assert_close(&format!("{what} logits"), &model.next_logits(&TOKENS).unwrap(), &logits[TOKENS.len() - 1]);
}

fn llama2c_file(own_classifier: bool) -> Vec<u8> {
    let vocab = if own_classifier { -(VOCAB as i32) } else { VOCAB as i32 };
    let header = [D_MODEL as i32, D_FF as i32, LAYERS as i32, HEADS_Q as i32, HEADS_KV as i32, vocab, 32];
    let mut floats = values(VOCAB * D_MODEL, 1000);
    // llama2.c stores the gate, then down, then up.
    for index in [0, 1, 2, 3, 4, 5, 6, 8, 7] {
        (0..LAYERS).for_each(|layer| floats.extend(part(layer, index)));
    }
    floats.extend(values(D_MODEL, 1001));
    floats.extend(vec![f32::NAN; 32 * HEAD_DIM]);
    if own_classifier {
        floats.extend(values(VOCAB * D_MODEL, 1002));
    }
    let header = header.iter().flat_map(|x| x.to_le_bytes());
    header.chain(floats.iter().flat_map(|x| x.to_le_bytes())).collect()
}

#[test]
fn llama2c_checkpoints_equal_the_naive_model() {
    for own_classifier in [false, true] {
        let model = llama2c::parse(&llama2c_file(own_classifier), "test").unwrap();
        let naive = naive(|| Rope::Interleaved(10_000.0), own_classifier);
        check(&format!("own classifier {own_classifier}"), &model, &naive);
    }
}

fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// Writes the named tensors, `[rows, cols]` or `[cols]` if there is one row.
fn write(path: &Path, tensors: &[(String, usize, usize, Vec<f32>)], dtype: Dtype) {
    let encoded = tensors.iter().map(|(name, rows, cols, values)| {
        let dims = if *rows == 1 { vec![*cols] } else { vec![*rows, *cols] };
        (name, dims, encode(values, dtype))
    });
    let encoded = encoded.collect::<Vec<_>>();
    let views =
        encoded.iter().map(|(name, dims, data)| (name, TensorView::new(dtype, dims.clone(), data).unwrap()));
    serialize_to_file(views, None::<HashMap<String, String>>, path).unwrap();
}

fn tensors(own_classifier: bool) -> Vec<(String, usize, usize, Vec<f32>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), VOCAB, D_MODEL, values(VOCAB * D_MODEL, 1000)),
        ("model.norm.weight".to_string(), 1, D_MODEL, values(D_MODEL, 1001)),
    ];
    for layer in 0..LAYERS {
        for (index, (name, rows, cols)) in PARTS.into_iter().enumerate() {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), rows, cols, part(layer, index)));
        }
    }
    if own_classifier {
        tensors.push(("lm_head.weight".to_string(), VOCAB, D_MODEL, values(VOCAB * D_MODEL, 1002)));
    }
    tensors
}

fn config() -> serde_json::Value {
    serde_json::json!({
        "hidden_size": D_MODEL, "intermediate_size": D_FF, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
        "num_attention_heads": HEADS_Q, "num_key_value_heads": HEADS_KV, "rope_theta": 500.0,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": null
    })
}

#[test]
fn safetensors_of_every_dtype_equal_the_naive_model() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    for (dtype, own_classifier) in [(Dtype::F32, false), (Dtype::BF16, true), (Dtype::F16, true)] {
        let path = dir.path().join("model.safetensors");
        write(&path, &tensors(own_classifier), dtype);
        let naive = naive(|| Rope::HalfSplit(500.0), own_classifier);
        check(&format!("{dtype:?} file"), &llama_safetensors::load(&path).unwrap(), &naive);
        check(&format!("{dtype:?} directory"), &llama_safetensors::load(dir.path()).unwrap(), &naive);
    }
}

#[test]
fn a_model_in_several_files_is_read_from_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    let all = tensors(true);
    let (first, second) = all.split_at(7);
    write(&dir.path().join("model-00001-of-00002.safetensors"), first, Dtype::F32);
    write(&dir.path().join("model-00002-of-00002.safetensors"), second, Dtype::F32);
    let naive = naive(|| Rope::HalfSplit(500.0), true);
    check("two files", &llama_safetensors::load(dir.path()).unwrap(), &naive);
}

#[test]
fn models_that_do_more_than_a_plain_llama_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error_with = |config: serde_json::Value, tensors: &[(String, usize, usize, Vec<f32>)]| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        write(&dir.path().join("model.safetensors"), tensors, Dtype::F32);
        llama_safetensors::load(dir.path()).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let with = |key: &str, value: serde_json::Value| {
        let mut config = config();
        config[key] = value;
        config
    };
    assert_eq!(error_with(config(), &tensors(false)), "");
    let scaled = with("rope_scaling", serde_json::json!({"rope_type": "llama3", "factor": 32.0}));
    assert!(error_with(scaled, &tensors(false)).contains("\"llama3\" is not supported"));
    assert!(error_with(with("hidden_act", "gelu".into()), &tensors(false)).contains("gelu"));
    assert!(error_with(with("num_key_value_heads", 3.into()), &tensors(false)).contains("cannot share 3"));
    assert!(error_with(with("num_attention_heads", 0.into()), &tensors(false)).contains("0 heads"));
    let missing = error_with(config(), &tensors(false)[1..]);
    assert!(missing.contains("model.embed_tokens.weight is missing"), "{missing}");
    let mut biased = tensors(false);
    biased.push(("model.layers.0.self_attn.q_proj.bias".to_string(), 1, 16, vec![0.0; 16]));
    assert!(error_with(config(), &biased).contains("q_proj.bias"));
    let wrong = error_with(with("intermediate_size", 24.into()), &tensors(false));
    assert!(wrong.contains("mlp.gate_proj") && wrong.contains("expected [24, 16]"), "{wrong}");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(llama_safetensors::load(dir.path()).unwrap_err().to_string().contains("config.json"));
}
