//! The oracle of `attn_core::exact`, which judges everything else, against outputs and gradients of other people's code;
//! see `testdata/README.md`.

use attn_core::dropout::Dropout;
use attn_core::exact::{Exact, ExactGrads};
use attn_core::mask::{Align, And, Band, BandPerBatch, Documents, KeyLengths, Pair, PrefixLm};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::registry::{NamedTensors, TensorData};
use attn_core::score::{Alibi, Bias, BiasIndex, ScoreFnWithDerivative, SoftCap, T5Bias, T5Buckets, Then};
use attn_testkit::compare::assert_close;
use attn_testkit::golden::{GoldenCase, load_dir};

fn number(case: &GoldenCase, option: &str) -> Option<f64> {
    case.options.get(option).and_then(|value| value.as_f64())
}

fn flag(case: &GoldenCase, option: &str) -> bool {
    case.options.get(option).is_some_and(|value| value.as_bool() == Some(true) || value.as_i64() == Some(1))
}

fn floats<'a>(tensors: &'a NamedTensors, name: &str) -> Option<&'a [f32]> {
    tensors.f32(name).unwrap().map(|(_, data)| data)
}

fn indices(tensors: &NamedTensors, name: &str) -> Option<Vec<i32>> {
    tensors.get(name).map(|tensor| tensor.data.to_f64().into_iter().map(|x| x as i32).collect())
}

/// Builds the case's attention and hands it on, with the bias whose gradient the file may hold.
fn with_attention(case: &GoldenCase, check: impl FnOnce(&Exact<'_>, Option<(&str, &dyn BiasIndex)>)) {
    let shape = case.inputs.qkv().unwrap().shape();
    let inputs = &case.inputs;
    let width = |option| number(case, option).filter(|width| *width >= 0.0).map(|width| width as usize);
    let (left, causal) = (width("window_left"), flag(case, "causal"));
    let band = (causal || left.is_some() || width("window_right").is_some()).then(|| Band {
        left,
        right: if causal { Some(0) } else { width("window_right") },
        ..Band::causal(&shape, Align::BottomRight)
    });

    // ONNX: keys from a length on are hidden, and the causal diagonal ends at that length.
    let lens = indices(inputs, "nonpad_kv_seqlen");
    let lengths = lens
        .clone()
        .map(|lens| KeyLengths::new(lens.iter().map(|len| *len as usize).collect(), &shape).unwrap());
    let diagonals = lens.filter(|_| flag(case, "is_causal")).map(|lens| {
        let offsets = lens.iter().map(|len| *len as isize - shape.n_q as isize).collect();
        BandPerBatch::new(offsets, None, Some(0), &shape).unwrap()
    });

    let named = case.options.get("mod").and_then(|name| name.as_str()).unwrap_or_default();
    let top_left = (named == "document").then(|| Band::causal(&shape, Align::TopLeft));
    let documents = indices(inputs, "document").map(|ids| Documents::new(&ids, &ids, &shape).unwrap());
    let prefix = (named == "prefix_lm").then(|| PrefixLm::new(vec![7], &shape, Align::TopLeft).unwrap());
    let mask = And(And(band, And(lengths, diagonals)), And(top_left, And(documents, prefix)));

    let offset = shape.n_kv as isize - shape.n_q as isize;
    let cap = number(case, "softcap").map(|cap| SoftCap::new(cap as f32).unwrap());
    let alibi =
        floats(inputs, "alibi_slopes").map(|slopes| Alibi::new(slopes.to_vec(), &shape, offset).unwrap());
    let bias = match inputs.f32("bias_with_neginf").unwrap() {
        Some((axes, bias)) => Some(("bias", Bias::new(bias, axes, &shape).unwrap())),
        None => floats(inputs, "head_bias")
            .map(|bias| ("head_bias", Bias::new(bias, &[shape.n_heads_q, 1, shape.n_kv], &shape).unwrap())),
    };
    let buckets = number(case, "num_buckets").map(|n| {
        let max = number(case, "max_distance").unwrap() as usize;
        T5Buckets::new(n as usize, max, flag(case, "bidirectional")).unwrap()
    });
    let t5 = buckets.map(|buckets| {
        assert_buckets(case, buckets, offset);
        T5Bias::new(floats(inputs, "table").unwrap(), buckets, &shape, offset).unwrap()
    });
    let slope = |at: Pair| 1.0 + 0.1 * at.head as f32;
    let rel_scale = (named == "rel_scale").then_some(ScoreFnWithDerivative(
        |s: f32, at: Pair| s * slope(at) - 0.05 * at.i.abs_diff(at.j) as f32,
        |_: f32, at: Pair| slope(at),
    ));
    let add = bias.as_ref().map(|(_, bias)| bias);
    let score_mod = Then(Then(cap, rel_scale), Then(alibi, Then(add, t5.as_ref())));

    let sinks: Option<Vec<f64>> = inputs.get("sinks").map(|sinks| sinks.data.to_f64());
    let keep: Option<Vec<bool>> = inputs.get("keep").map(|keep| match &keep.data {
        TensorData::U8(keep) => keep.iter().map(|keep| *keep != 0).collect(),
        other => panic!("keep is {other:?}"),
    });
    let dropout = keep.as_ref().map(|keep| {
        let p = number(case, "dropout_p").unwrap() as f32;
        Dropout::keep_mask(p, keep, &inputs.get("keep").unwrap().shape, &shape).unwrap()
    });
    let kind = match case.variant.as_str() {
        "qk_norm_rms" => Some(NormKind::Rms { eps: number(case, "eps").unwrap() as f32 }),
        "qk_norm_l2" => Some(NormKind::L2 { eps: 1e-12 }),
        _ => None,
    };
    let (gamma_q, gamma_k) = (floats(inputs, "q_weight"), floats(inputs, "k_weight"));
    let exact = Exact {
        softmax_scale: number(case, "scale"),
        mask: &mask,
        score_mod: &score_mod,
        key_bias: None,
        sinks: sinks.as_deref(),
        dropout,
        qk_norm: kind.map(|kind| QkNorm { kind, gamma_q, gamma_k }),
    };
    let learned = match (&bias, &t5) {
        (Some((name, bias)), _) => Some((*name, bias as &dyn BiasIndex)),
        (None, Some(t5)) => Some(("table", t5 as &dyn BiasIndex)),
        _ => None,
    };
    check(&exact, learned);
}

fn assert_buckets(case: &GoldenCase, buckets: T5Buckets, offset: isize) {
    let stored = case.aux.require("bucket").unwrap();
    let n_kv = stored.shape[1];
    for (at, want) in stored.data.to_f64().into_iter().enumerate() {
        let r = (at % n_kv) as isize - (at / n_kv) as isize - offset;
        assert_eq!(buckets.bucket(r) as f64, want, "{}: distance {r}", case.case);
    }
}

#[test]
fn outputs_and_gradients_of_the_oracle_are_those_of_other_peoples_code() {
    let cases = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    assert_eq!(cases.len(), 17);
    let mut gradients = 0;
    for case in &cases {
        with_attention(case, |exact, learned| {
            let x = case.inputs.qkv().unwrap();
            let got = exact.all(&x).unwrap();
            let compare = |name: &str, got: &[f64], want: &[f64]| {
                assert_close(&format!("{}: {name}", case.case), got, want, case.tolerance_for(name).unwrap());
            };
            compare("out.o", &got.out, &case.outputs.require("o").unwrap().data.to_f64());
            if let Some(want) = case.outputs.get("lse") {
                compare("out.lse", &got.lse.unwrap(), &want.data.to_f64());
            }

            let Some(w) = &case.w else { return };
            let mut learned_grad = learned.map(|(_, bias)| vec![0.0; bias.len()]);
            let grads = exact.backward(&x, &w.data.to_f64(), None, |at, ds| {
                if let (Some(grad), Some((_, bias))) = (&mut learned_grad, learned) {
                    grad[bias.index(at)] += ds;
                }
            });
            let ExactGrads { q, k, v, sinks, gamma_q, gamma_k } = grads.unwrap();
            let learned_name = learned.map_or("", |(name, _)| name);
            for (name, want) in &case.grads.0 {
                let got = match name.as_str() {
                    "q" => Some(&q),
                    "k" => Some(&k),
                    "v" => Some(&v),
                    "sinks" => sinks.as_ref(),
                    "q_weight" => gamma_q.as_ref(),
                    "k_weight" => gamma_k.as_ref(),
                    name if name == learned_name => learned_grad.as_ref(),
                    _ => None,
                };
                let got = got.unwrap_or_else(|| panic!("{}: no gradient of {name}", case.case));
                compare(&format!("grad.{name}"), got, &want.data.to_f64());
                gradients += 1;
            }
        });
    }
    assert!(gradients > 40, "{gradients} gradients compared");
}
