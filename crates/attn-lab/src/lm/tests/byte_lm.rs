use std::path::Path;

use super::naive::{Naive, NaiveLayer, Rope, heads_first};
use super::{assert_close, noise, tiny, tiny_config};
use crate::lm::{ByteLm, Captured, GlobalAttention, LmError, Weights};

fn naive(model: &ByteLm) -> Naive {
    let config = model.config().clone();
    let get = |name: &str| -> Vec<f64> {
        let (_, tensor) = model.weights().iter().find(|(n, _)| *n == name).unwrap();
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
    };
    let layer = |l: usize| {
        let get = |name: &str| get(&format!("layers.{l}.{name}"));
        let global = l == config.global_layer;
        NaiveLayer {
            attn_norm: get("attn_norm"),
            wq: get("wq"),
            wk: get("wk"),
            wv: get("wv"),
            wo: get("wo"),
            ffn_norm: get("ffn_norm"),
            gate: get("gate"),
            up: get("up"),
            down: get("down"),
            rope: if global { Rope::None } else { Rope::HalfSplit(config.rope_theta) },
            window: if global { usize::MAX } else { config.window },
            log_scale: global.then(|| get("log_scale")),
        }
    };
    Naive {
        n_heads_q: config.n_heads,
        n_heads_kv: config.n_heads,
        head_dim: config.head_dim,
        norm_eps: config.norm_eps,
        embedding: get("embedding").chunks(config.d_model).map(<[f64]>::to_vec).collect(),
        layers: (0..config.n_layers).map(layer).collect(),
        final_norm: get("final_norm"),
        classifier: get("embedding"),
    }
}

#[test]
fn every_layer_and_the_loss_equal_the_naive_model() {
    let model = tiny(1);
    let text = noise(53, 2);
    let (inputs, logits) = naive(&model).run(&text.iter().map(|&b| usize::from(b)).collect::<Vec<_>>());
    for (layer, want) in inputs.iter().enumerate() {
        let got = model.capture_in_chunks(&text, layer, 16).unwrap();
        for (name, got, want) in [("q", &got.q, &want.q), ("k", &got.k, &want.k), ("v", &got.v, &want.v)] {
            assert_close(&format!("layer {layer} {name}"), got, &heads_first(want, model.config().head_dim));
        }
    }
    for targets in [1..53, 20..30, 52..53] {
        let want = targets.clone().map(|t| {
            let row = &logits[t - 1];
            row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[usize::from(text[t])]
        });
        let want = want.sum::<f64>() / targets.len() as f64;
        let got = model.losses(&text, targets.clone(), &[GlobalAttention::Exact]).unwrap()[0];
        assert!((got - want).abs() < 1e-5, "targets {targets:?}: got {got}, want {want}");
    }
}

#[test]
fn capture_does_not_depend_on_the_chunks() {
    let model = tiny(3);
    let text = noise(200, 4);
    for layer in 0..4 {
        let whole = model.capture_in_chunks(&text, layer, 1000).unwrap();
        for chunk in [1, 7, 8, 64, 199] {
            let parts = model.capture_in_chunks(&text, layer, chunk).unwrap();
            for (name, got, want) in
                [("q", &parts.q, &whole.q), ("k", &parts.k, &whole.k), ("v", &parts.v, &whole.v)]
            {
                let want = want.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                assert_close(&format!("layer {layer}, chunk {chunk}, {name}"), got, &want);
            }
        }
    }
}

#[test]
fn later_bytes_change_nothing_earlier() {
    let model = tiny(5);
    let text = noise(100, 6);
    let mut changed = text.clone();
    changed[60..].fill(0);
    for layer in 0..4 {
        let (a, b) =
            (model.capture_layer(&text, layer).unwrap(), model.capture_layer(&changed, layer).unwrap());
        let before =
            |x: &[f32]| x.chunks(100 * 6).flat_map(|head| head[..60 * 6].to_vec()).collect::<Vec<_>>();
        for (name, a, b) in [("q", &a.q, &b.q), ("k", &a.k, &b.k), ("v", &a.v, &b.v)] {
            assert_eq!(before(a), before(b), "layer {layer} {name}");
            assert_ne!(a, b, "layer {layer} {name}: the change is not seen at all");
        }
    }
}

#[test]
fn a_closure_with_exact_attention_gives_the_exact_loss() {
    let model = tiny(7);
    let text = noise(90, 8);
    let stand_ins = [GlobalAttention::Exact, GlobalAttention::Removed, GlobalAttention::Window(8)];
    let losses = model.losses(&text, 50..90, &stand_ins).unwrap();
    for (stand_in, want) in stand_ins.into_iter().zip(losses) {
        let got = model.loss(&text, 50..90, &|inputs| stand_in.attend(inputs)).unwrap();
        assert!((got - want).abs() < 1e-6, "{stand_in:?}: got {got}, want {want}");
    }
}

#[test]
fn training_losses_equal_the_loss() {
    let model = tiny(9);
    let text = noise(121, 10);
    let exact = |targets| model.losses(&text, targets, &[GlobalAttention::Exact]).unwrap()[0];
    let value = |loss: candle_core::Tensor| f64::from(loss.to_scalar::<f32>().unwrap());
    assert!((value(model.training_loss(&text, 1).unwrap()) - exact(1..121)).abs() < 1e-5);
    assert!((value(model.long_context_loss(&text, 30).unwrap()) - exact(91..121)).abs() < 1e-5);
    let both = value(model.training_loss(&[text.clone(), text.clone()].concat(), 2).unwrap());
    assert!((both - exact(1..121)).abs() < 1e-5);
}

#[test]
fn the_gate_predicts_the_same_bytes_at_every_length() {
    let model = tiny(11);
    let text = noise(400, 12);
    let rows = model.gate(&text, &[16, 48, 128]).unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.n, row.targets)).collect::<Vec<_>>(),
        [(16, 128), (48, 128), (128, 128)]
    );
    // With the layer removed, context matters only up to the reach of three window layers, 21 bytes.
    assert!((rows[1].removed_loss - rows[2].removed_loss).abs() < 1e-5);
    let error = model.gate(&text[..128], &[128]).unwrap_err();
    assert!(matches!(error, LmError::TextTooShort { found: 128, asked: 129, .. }), "{error}");
    assert!(model.gate(&text, &[]).is_err());
    assert!(model.gate(&text, &[0]).is_err());
}

#[test]
fn a_saved_model_loads_with_its_config_and_bf16_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    tiny(13).save(&path).unwrap();
    let once = ByteLm::load(&path).unwrap();
    assert_eq!(*once.config(), tiny_config());
    once.save(&path).unwrap();
    let twice = ByteLm::load(&path).unwrap();
    let text = noise(40, 14);
    assert_eq!(once.capture(&text).unwrap(), twice.capture(&text).unwrap());
}

#[test]
fn the_shipped_model_predicts_and_uses_its_global_layer() {
    let model = ByteLm::shipped().unwrap();
    assert_eq!(model.config().head_dim, 64);
    let text = include_bytes!("../byte_lm.rs");
    let stand_ins = [GlobalAttention::Exact, GlobalAttention::Removed];
    let losses = model.losses(text, text.len() - 1000..text.len(), &stand_ins).unwrap();
    assert!(losses[0] < 1.6 && losses[1] > losses[0] + 0.05, "{losses:?}");
}

#[test]
fn bad_input_is_an_error_that_says_what_to_do() {
    let model = tiny(15);
    let says = |result: crate::lm::Result<Captured>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    };
    says(model.capture(b""), "empty");
    says(model.capture_layer(b"abc", 4), "layers 0 to 3");
    for targets in [0..2, 2..2, 2..9] {
        assert!(
            model.losses(b"abcdefgh", targets.clone(), &[GlobalAttention::Exact]).is_err(),
            "{targets:?}"
        );
    }
    let error = model.loss(b"abcdefgh", 2..5, &|_| Ok(vec![0.0; 3])).unwrap_err().to_string();
    assert!(error.contains("expected (2, 4, 6)"), "{error}");
    assert!(model.training_loss(b"abc", 2).is_err());
    assert!(model.training_loss(b"", 0).is_err());
    assert!(model.long_context_loss(b"abc", 3).is_err());

    let error = ByteLm::load(Path::new("/nowhere/m.safetensors")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/m.safetensors"), "{error}");
    assert!(ByteLm::new(tiny_config(), Weights::default()).is_err());
    let mut odd = tiny_config();
    odd.head_dim = 7;
    assert!(Weights::random(&odd, 0).is_err());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    for bytes in [&b""[..], b"12345678", &[0xFF; 64]] {
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(ByteLm::load(&path), Err(LmError::Format { .. })), "{bytes:?}");
    }
}
