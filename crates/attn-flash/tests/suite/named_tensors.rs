//! `flash` on named tensors: everything it reads together against the oracle, layouts against each other, and what it
//! refuses.

use attn_core::AttnShape;
use attn_core::dropout::Dropout;
use attn_core::exact::Exact;
use attn_core::mask::{Pair, Predicate};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData, find, run_qkv};
use attn_core::score::{ScoreFnWithDerivative, T5Buckets};
use attn_core::{AttnError, DType, Result};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;

fn flash() -> Entry {
    *find(&attn_flash::registry(), "flash").unwrap()
}

fn run(options: &[&str], tensors: &NamedTensors) -> Result<NamedTensors> {
    flash().run(&Options::parse(options.iter().copied()).unwrap(), tensors)
}

/// Numbers between -1 and 1 that look like nothing.
fn numbers(shape: &[usize], seed: usize) -> Vec<f32> {
    (0..shape.iter().product()).map(|at| (((at + 1) * (seed + 7)) as f32 * 0.731).sin()).collect()
}

fn floats(shape: &[usize], seed: usize) -> NamedTensor {
    NamedTensor::f32("x", shape, numbers(shape, seed)).unwrap()
}

fn booleans(shape: &[usize], hide: usize) -> NamedTensor {
    let data =
        TensorData::U8((0..shape.iter().product()).map(|at: usize| u8::from(at % hide != 1)).collect());
    NamedTensor { shape: shape.to_vec(), data }
}

fn integers(shape: &[usize], data: &[i32]) -> NamedTensor {
    NamedTensor { shape: shape.to_vec(), data: TensorData::I32(data.to_vec()) }
}

fn named(tensors: impl IntoIterator<Item = (&'static str, NamedTensor)>) -> NamedTensors {
    NamedTensors(tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect())
}

fn qkv(shape: AttnShape, seed: u64) -> NamedTensors {
    let problem = inputs::Problem::normal(shape, seed);
    let tensor = |name, shape: [usize; 4], data| (name, NamedTensor::f32(name, &shape, data).unwrap());
    named([
        tensor("q", shape.q(), problem.q),
        tensor("k", shape.k(), problem.k),
        tensor("v", shape.v(), problem.v),
    ])
}

fn with(
    mut tensors: NamedTensors,
    more: impl IntoIterator<Item = (&'static str, NamedTensor)>,
) -> NamedTensors {
    tensors.0.extend(named(more).0);
    tensors
}

fn f64s(given: &NamedTensors, name: &str) -> Vec<f64> {
    given.require(name).unwrap().data.to_f64()
}

const SHAPE: AttnShape =
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 7, n_kv: 11, head_dim: 8, head_dim_v: 6 };

#[test]
fn everything_at_once_is_the_definition() {
    let (q_ids, kv_ids) = ([0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]);
    let tensors = with(
        qkv(SHAPE, 11),
        [
            ("mask", booleans(&[2, 1, 7, 11], 9)),
            ("documents_q", integers(&[7], &q_ids)),
            ("documents_kv", integers(&[11], &kv_ids)),
            ("bias", floats(&[4, 1, 11], 1)),
            ("alibi_slopes", floats(&[2, 4], 2)),
            ("relative_table", floats(&[4, 5], 3)),
            ("t5_table", floats(&[8, 4], 4)),
            ("key_bias", floats(&[11], 5)),
            ("sinks", floats(&[4], 6)),
            ("keep", booleans(&[4, 7, 11], 4)),
            ("q_weight", floats(&[8], 7)),
            ("k_weight", floats(&[8], 8)),
        ],
    );
    let given = run(
        &[
            "causal=true",
            "window_left=6",
            "prefix=3",
            "softcap=5",
            "mask_mod=(i + j) % 5 != 0",
            "score_mod=s * (1 + 0.1 h) + 0.01 j",
            "max_distance=6",
            "dropout_p=0.25",
            "qk_norm=rms",
            "qk_norm_eps=1e-3",
        ],
        &tensors,
    )
    .unwrap();

    // The same, pair by pair.
    let f32s = |name: &str| tensors.f32(name).unwrap().unwrap().1;
    let bytes = |name: &str| f64s(&tensors, name).into_iter().map(|x| x != 0.0).collect::<Vec<_>>();
    let (seen, keep) = (bytes("mask"), bytes("keep"));
    let sees = Predicate(|p: Pair| {
        let position = p.i + 4;
        seen[(p.batch * 7 + p.i) * 11 + p.j]
            && q_ids[p.i] == kv_ids[p.j]
            && (p.j <= position || p.j < 3)
            && p.j + 6 >= position
            && !(p.i + p.j).is_multiple_of(5)
    });
    let (bias, slopes, near, far) =
        (f32s("bias"), f32s("alibi_slopes"), f32s("relative_table"), f32s("t5_table"));
    let buckets = T5Buckets::new(8, 6, true).unwrap();
    let added = |p: Pair| {
        let r = p.j as isize - p.i as isize - 4;
        bias[p.head * 11 + p.j] - slopes[p.batch * 4 + p.head] * r.unsigned_abs() as f32
            + near[p.head * 5 + (r.clamp(-2, 2) + 2) as usize]
            + far[buckets.bucket(r) * 4 + p.head]
    };
    let scores = ScoreFnWithDerivative(
        |s: f32, p: Pair| {
            let capped = 5.0 * (s / 5.0).tanh();
            capped * (1.0 + 0.1 * p.head as f32) + 0.01 * p.j as f32 + added(p)
        },
        |_: f32, _: Pair| f32::NAN, // not asked for
    );
    let x = tensors.qkv().unwrap();
    let sinks = f64s(&tensors, "sinks");
    let exact = Exact {
        softmax_scale: None,
        mask: &sees,
        score_mod: &scores,
        key_bias: Some(f32s("key_bias")),
        sinks: Some(&sinks),
        dropout: Some(Dropout::keep_mask(0.25, &keep, &[4, 7, 11], &SHAPE).unwrap()),
        qk_norm: Some(QkNorm {
            kind: NormKind::Rms { eps: 1e-3 },
            gamma_q: Some(f32s("q_weight")),
            gamma_k: Some(f32s("k_weight")),
        }),
    };
    let tol = Tol::AllClose { atol: 3e-6, rtol: 3e-6 };
    let want = exact.all(&x).unwrap();
    assert_close("o", &f64s(&given, "o"), &want.out, tol);
    assert_close("lse", &f64s(&given, "lse"), &want.lse.unwrap(), tol);
    let without = Exact { sinks: None, ..exact }.all(&x).unwrap();
    assert_close("lse_without_sink", &f64s(&given, "lse_without_sink"), &without.lse.unwrap(), tol);
}

#[test]
fn gradients_of_everything_are_the_oracles() {
    let (cap, shape) = (4.0, SHAPE);
    let tensors = with(
        qkv(shape, 5),
        [
            ("mask", booleans(&[7, 11], 6)),
            ("alibi_slopes", floats(&[4], 2)),
            ("bias", floats(&[4, 1, 11], 3)),
            ("t5_table", floats(&[8, 4], 4)),
            ("key_bias", floats(&[11], 5)),
            ("sinks", floats(&[4], 6)),
            ("keep", booleans(&[2, 1, 7, 11], 4)),
            ("q_weight", floats(&[8], 7)),
            ("k_weight", floats(&[8], 8)),
            ("grad_o", floats(&shape.out(), 9)),
        ],
    );
    let options = [
        "causal=true",
        "softcap=4",
        "score_mod=s * (1 + 0.1 h) - 0.1 |i - j|",
        "dropout_p=0.3",
        "qk_norm=l2",
    ];
    let given = run(&options, &tensors).unwrap();

    let f32s = |name: &str| tensors.f32(name).unwrap().unwrap().1;
    let bytes = |name: &str| f64s(&tensors, name).into_iter().map(|x| x != 0.0).collect::<Vec<_>>();
    let (seen, keep, slopes) = (bytes("mask"), bytes("keep"), f32s("alibi_slopes"));
    let (bias, table, buckets) = (f32s("bias"), f32s("t5_table"), T5Buckets::new(8, 128, true).unwrap());
    let bias_index = |p: Pair| p.head * 11 + p.j;
    let table_index = |p: Pair| buckets.bucket(p.j as isize - p.i as isize - 4) * 4 + p.head;
    let sees = Predicate(|p: Pair| p.j <= p.i + 4 && seen[p.i * 11 + p.j]);
    let scores = ScoreFnWithDerivative(
        |s: f32, p: Pair| {
            let capped =
                cap * (s / cap).tanh() * (1.0 + 0.1 * p.head as f32) - 0.1 * p.i.abs_diff(p.j) as f32;
            capped - slopes[p.head] * (p.i + 4).abs_diff(p.j) as f32
                + bias[bias_index(p)]
                + table[table_index(p)]
        },
        |s: f32, p: Pair| (1.0 - (s / cap).tanh().powi(2)) * (1.0 + 0.1 * p.head as f32),
    );
    let sinks = f64s(&tensors, "sinks");
    let exact = Exact {
        softmax_scale: None,
        mask: &sees,
        score_mod: &scores,
        key_bias: Some(f32s("key_bias")),
        sinks: Some(&sinks),
        dropout: Some(Dropout::keep_mask(0.3, &keep, &[2, 1, 7, 11], &shape).unwrap()),
        qk_norm: Some(QkNorm {
            kind: NormKind::L2 { eps: 1e-12 },
            gamma_q: Some(f32s("q_weight")),
            gamma_k: Some(f32s("k_weight")),
        }),
    };
    let (mut key_bias, mut grad_bias, mut grad_table) = (vec![0.0; 11], vec![0.0; 44], vec![0.0; 32]);
    let x = tensors.qkv().unwrap();
    let each_pair = |p: Pair, ds: f64| {
        key_bias[p.j] += ds;
        grad_bias[bias_index(p)] += ds;
        grad_table[table_index(p)] += ds;
    };
    let want = exact.backward(&x, &f64s(&tensors, "grad_o"), None, each_pair).unwrap();
    for (name, want) in [
        ("grad.q", want.q),
        ("grad.k", want.k),
        ("grad.v", want.v),
        ("grad.sinks", want.sinks.unwrap()),
        ("grad.q_weight", want.gamma_q.unwrap()),
        ("grad.k_weight", want.gamma_k.unwrap()),
        ("grad.key_bias", key_bias),
        ("grad.bias", grad_bias),
        ("grad.t5_table", grad_table),
    ] {
        assert_close(name, &f64s(&given, name), &want, Tol::ScaledMax(3e-6));
        let input = tensors.require(name.strip_prefix("grad.").unwrap()).unwrap();
        assert_eq!(given.require(name).unwrap().shape, input.shape, "{name}");
    }
    assert!(given.get("grad.alibi_slopes").is_none() && given.get("grad.mask").is_none(), "constants");
}

#[test]
fn packed_sequences_are_those_of_each_alone() {
    const HEADS: (usize, usize, usize) = (4, 2, 6);
    let (cu_q, cu_kv) = ([0, 3, 3, 10], [0, 8, 10, 16]);
    let packed = with(
        named([
            ("q", floats(&[10, HEADS.0, HEADS.2], 1)),
            ("k", floats(&[16, HEADS.1, HEADS.2], 2)),
            ("v", floats(&[16, HEADS.1, 5], 3)),
        ]),
        [
            ("cu_seqlens_q", integers(&[4], &cu_q)),
            ("cu_seqlens_k", integers(&[4], &cu_kv)),
            ("alibi_slopes", floats(&[4], 4)),
            ("sinks", floats(&[4], 5)),
        ],
    );
    let options = ["causal=true", "prefix=2", "score_mod=s + 0.1 b"];
    let given = run(&options, &packed).unwrap();
    assert_eq!(given.require("o").unwrap().shape, [10, 4, 5]);
    assert_eq!(given.require("lse").unwrap().shape, [10, 4]);
    for s in 0..3 {
        // `[total, heads, width]` to `(1, heads, length, width)`
        let alone = |name: &str, cu: &[i32; 4]| {
            let tensor = packed.require(name).unwrap();
            let (rows, heads, width) = (cu[s] as usize..cu[s + 1] as usize, tensor.shape[1], tensor.shape[2]);
            let (_, data) = packed.f32(name).unwrap().unwrap();
            let of_head = |h: usize| {
                rows.clone().flat_map(move |row| data[(row * heads + h) * width..][..width].to_vec())
            };
            NamedTensor::f32(name, &[1, heads, rows.len(), width], (0..heads).flat_map(of_head).collect())
                .unwrap()
        };
        let tensors = with(
            named([("q", alone("q", &cu_q)), ("k", alone("k", &cu_kv)), ("v", alone("v", &cu_kv))]),
            ["alibi_slopes", "sinks"].map(|name| (name, packed.require(name).unwrap().clone())),
        );
        let score_mod = format!("score_mod=s + {}", 0.1 * s as f64);
        let want = run(&[options[0], options[1], &score_mod], &tensors).unwrap();
        for (name, width) in [("o", 5), ("lse", 1), ("lse_without_sink", 1)] {
            let (got, want) = (f64s(&given, name), f64s(&want, name));
            let n = (cu_q[s + 1] - cu_q[s]) as usize;
            for row in 0..n {
                for h in 0..4 {
                    let got = &got[((cu_q[s] as usize + row) * 4 + h) * width..][..width];
                    let want = &want[(h * n + row) * width..][..width];
                    let tol = Tol::AllClose { atol: 2e-6, rtol: 2e-6 };
                    assert_close(&format!("{name}, sequence {s}, row {row}, head {h}"), got, want, tol);
                }
            }
        }
    }
}

#[test]
fn pages_and_lengths_are_the_same_keys() {
    const LENS: [i32; 2] = [9, 4];
    let (k, v) = (numbers(&[2, 2, 9, 8], 1), numbers(&[2, 2, 9, 8], 2));
    for dtype in DType::ALL {
        let tensor =
            |data: Vec<f32>, shape: &[usize]| NamedTensor::f32("x", shape, data).unwrap().rounded(dtype);
        // Pages of 4 keys, in an order of their own; what is beyond a length is NaN.
        let table = [2, 0, 4, 3, -1, -1];
        let pages = |from: &[f32]| {
            let mut cache = vec![f32::NAN; 5 * 4 * 2 * 8];
            for (batch, len) in LENS.into_iter().enumerate() {
                for j in 0..len as usize {
                    let page = table[batch * 3 + j / 4] as usize;
                    for h in 0..2 {
                        let to = ((page * 4 + j % 4) * 2 + h) * 8;
                        cache[to..to + 8].copy_from_slice(&from[((batch * 2 + h) * 9 + j) * 8..][..8]);
                    }
                }
            }
            tensor(cache, &[5, 4, 2, 8])
        };
        let q = tensor(numbers(&[2, 4, 3, 8], 3), &[2, 4, 3, 8]);
        let lens = integers(&[2], &LENS);
        let paged = named([
            ("q", q.clone()),
            ("k_cache", pages(&k)),
            ("v_cache", pages(&v)),
            ("block_table", integers(&[2, 3], &table)),
            ("seqlens_k", lens.clone()),
        ]);
        let mut whole = named([
            ("q", q),
            ("k", tensor(k.clone(), &[2, 2, 9, 8])),
            ("v", tensor(v.clone(), &[2, 2, 9, 8])),
            ("kv_lens", lens),
        ]);
        let options = ["causal=true", "window_left=5"];
        let (got, want) = (run(&options, &paged).unwrap(), run(&options, &whole).unwrap());
        assert_eq!(got, want, "{dtype}");
        // The first entry is full: lengths change nothing there.
        whole.0.remove("kv_lens");
        let full = run(&options, &whole).unwrap();
        assert_close("full", &f64s(&got, "o")[..96], &f64s(&full, "o")[..96], Tol::ScaledMax(1e-6));
        assert_ne!(f64s(&got, "o")[96..], f64s(&full, "o")[96..], "the second is not");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let ids = || integers(&[7], &[0; 7]);
    let cu = |last| integers(&[2], &[0, last]);
    let packed = [("cu_seqlens_q", cu(7)), ("cu_seqlens_k", cu(7))];
    let rank_three =
        || [("q", floats(&[7, 4, 8], 0)), ("k", floats(&[7, 4, 8], 0)), ("v", floats(&[7, 4, 8], 0))];
    let page = || floats(&[3, 4, 2, 8], 0);
    let pages = |table| {
        let q = ("q", floats(&[1, 4, 2, 8], 0));
        let rest = [("k_cache", page()), ("v_cache", page()), ("block_table", table)];
        with(named([q]), rest.into_iter().chain([("seqlens_k", integers(&[1], &[9]))]))
    };
    for (said, options, tensors) in [
        ("`gate`", &[][..], with(qkv(SHAPE, 0), [("gate", floats(&[4], 0))])),
        ("`documents_kv`", &[], with(qkv(SHAPE, 0), [("documents_q", ids())])),
        ("documents_kv", &[], with(qkv(SHAPE, 0), [("documents_q", ids()), ("documents_kv", ids())])),
        ("mask: dtype", &[], with(qkv(SHAPE, 0), [("mask", floats(&[7, 11], 0))])),
        ("mask: n_kv is 7", &[], with(qkv(SHAPE, 0), [("mask", booleans(&[7, 7], 2))])),
        ("sinks: n_heads_q is 3", &[], with(qkv(SHAPE, 0), [("sinks", floats(&[3], 0))])),
        ("kv_lens", &[], with(qkv(SHAPE, 0), [("kv_lens", floats(&[2], 0))])),
        ("lens", &[], with(qkv(SHAPE, 0), [("kv_lens", integers(&[2], &[3, 12]))])),
        ("relative_table: width is 4", &[], with(qkv(SHAPE, 0), [("relative_table", floats(&[4, 4], 0))])),
        ("t5_table's shape", &[], with(qkv(SHAPE, 0), [("t5_table", floats(&[32], 0))])),
        ("`dropout_p` is absent", &[], with(qkv(SHAPE, 0), [("keep", booleans(&[7, 11], 2))])),
        ("`qk_norm` is absent", &[], with(qkv(SHAPE, 0), [("q_weight", floats(&[8], 0))])),
        ("rms or l2", &["qk_norm=layer"], qkv(SHAPE, 0)),
        ("from 0 to 1", &["dropout_p=2"], qkv(SHAPE, 0)),
        ("`prefix` is 12", &["prefix=12"], qkv(SHAPE, 0)),
        ("a function at `weight`", &["mask_mod=weight"], qkv(SHAPE, 0)),
        ("option `temperature`", &["temperature=1"], qkv(SHAPE, 0)),
        ("q's shape", &[], with(qkv(SHAPE, 0), packed.clone())),
        ("missing tensor `cu_seqlens_q`", &[], with(named(rank_three()), [("cu_seqlens_k", cu(7))])),
        (
            "last entry 7",
            &[],
            with(
                with(named(rank_three()), packed.clone()),
                [("k", floats(&[8, 4, 8], 0)), ("v", floats(&[8, 4, 8], 0))],
            ),
        ),
        ("a tensor `mask`", &[], with(with(named(rank_three()), packed), [("mask", booleans(&[7, 7], 2))])),
        ("block_table's shape", &[], pages(integers(&[3], &[0, 1, 2]))),
        ("block_table, row 0", &[], pages(integers(&[1, 3], &[0, 1, 7]))),
        ("grad_out: length is 6", &[], with(qkv(SHAPE, 0), [("grad_o", floats(&[2, 4, 6, 6], 0))])),
        ("in pages", &[], with(pages(integers(&[1, 3], &[0, 1, 2])), [("grad_o", floats(&[1, 4, 2, 8], 0))])),
        ("a tensor `k`", &[], with(pages(integers(&[1, 3], &[0, 1, 2])), [("k", floats(&[1], 0))])),
    ] {
        let error = run(options, &tensors).expect_err(said).to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn options_of_calls_make_no_attention_of_q_k_and_v() {
    for option in ["prefix=3", "mask_mod=i < j", "score_mod=2s", "dropout_p=0.5", "qk_norm=l2"] {
        let options = Options::parse([option]).unwrap();
        let error = flash().build(&options).err().expect(option).to_string();
        assert!(error.contains("named tensors"), "{error}");
    }
}

#[test]
fn gradients_of_q_k_and_v_come_for_every_differentiable_variant() {
    let tensors = with(qkv(SHAPE, 4), [("grad_o", floats(&SHAPE.out(), 9))]);
    let options = Options::parse(["causal=true"]).unwrap();
    let plain = run_qkv(&flash(), &options, &tensors).unwrap();
    assert_eq!(plain, flash().run(&options, &tensors).unwrap());
    assert_eq!(plain.require("grad.v").unwrap().shape, SHAPE.v());
    let naive = *find(&attn_flash::registry(), "naive").unwrap();
    let error = naive.run(&options, &tensors).unwrap_err();
    assert!(matches!(error, AttnError::Unsupported { .. }) && error.to_string().contains("naive"), "{error}");
}
