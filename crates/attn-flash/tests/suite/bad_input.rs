//! Every entry point refuses what does not fit: the error names the argument, what was found and what was expected, and
//! nothing has been written.

use attn_core::dropout::Dropout;
use attn_core::mask::{DenseMask, Documents, KeyLengths, PrefixLm};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::score::{Alibi, Bias, RelativeBias, T5Bias, T5Buckets};
use attn_core::{
    Attention, AttnError, AttnShape, OutMut, Qkv, Result, SoftmaxAttention, StreamShape, Streaming, View,
    ViewMut,
};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, KvView, OutputGrad, PagedKv, Problem, attend_any};
use attn_flash::{Flash, FlashCall, Naive, TileSizes};
use half::bf16;

const SHAPE: AttnShape =
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 3, n_kv: 5, head_dim: 8, head_dim_v: 6 };
const UNTOUCHED: f32 = -77.25;

/// Inputs that fit `SHAPE`.
struct Tensors {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Tensors {
    fn new() -> Self {
        let numbers =
            |shape: [usize; 4]| (0..shape.iter().product()).map(|x: usize| (x as f32).sin()).collect();
        Self { q: numbers(SHAPE.q()), k: numbers(SHAPE.k()), v: numbers(SHAPE.v()) }
    }

    fn qkv(&self) -> Qkv<'_> {
        Qkv::new(view("q", &self.q, SHAPE.q()), view("k", &self.k, SHAPE.k()), view("v", &self.v, SHAPE.v()))
            .unwrap()
    }
}

fn view<'a>(name: &str, data: &'a [f32], shape: [usize; 4]) -> View<'a, f32> {
    View::contiguous(name, data, shape).unwrap()
}

/// Runs `call` on buffers of these sizes and gives the error's text; panics if there is none or something was written.
#[track_caller]
fn refused(
    what: &str,
    out_shape: [usize; 4],
    lse_len: usize,
    call: impl FnOnce(OutMut<'_>, &mut [f32]) -> Result<()>,
) -> String {
    let (mut out, mut lse) = (vec![UNTOUCHED; out_shape.iter().product()], vec![UNTOUCHED; lse_len]);
    let view = ViewMut::contiguous("out", &mut out, out_shape).unwrap();
    let error = call(view.into(), &mut lse).expect_err(what);
    assert!(out.iter().chain(&lse).all(|x| *x == UNTOUCHED), "{what}: something was written");
    error.to_string()
}

#[track_caller]
fn assert_says(what: &str, error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{what}: `{error}` does not say `{word}`");
    }
}

#[test]
fn configurations_that_mean_nothing() {
    let tensors = Tensors::new();
    let cases: [(&str, Flash, &[&str]); 6] = [
        (
            "NaN scale",
            Flash { softmax_scale: Some(f32::NAN), ..Flash::full() },
            &["softmax_scale is NaN", "finite"],
        ),
        (
            "infinite scale",
            Flash { softmax_scale: Some(f32::INFINITY), ..Flash::full() },
            &["softmax_scale is inf", "finite"],
        ),
        ("negative cap", Flash { softcap: Some(-2.0), ..Flash::full() }, &["softcap is -2", "positive"]),
        ("NaN cap", Flash { softcap: Some(f32::NAN), ..Flash::full() }, &["softcap is NaN", "positive"]),
        (
            "infinite cap",
            Flash { softcap: Some(f32::INFINITY), ..Flash::full() },
            &["softcap is inf", "positive"],
        ),
        (
            "NaN scale, causal",
            Flash { softmax_scale: Some(f32::NAN), ..Flash::causal() },
            &["softmax_scale is NaN"],
        ),
    ];
    for (what, flash, words) in cases {
        let (x, out) = (tensors.qkv(), SHAPE.out());
        assert_says(what, &refused(what, out, 0, |out, _| flash.forward(x, out)), words);
        assert_says(
            what,
            &refused(what, out, SHAPE.rows(), |out, lse| flash.forward_with_lse(x, out, lse)),
            words,
        );
        assert_says(what, &refused(what, out, 0, |out, _| flash.call().forward(x, out, None)), words);
        assert_says(what, &flash.definition(&x).unwrap_err().to_string(), words);
    }
    let naive = Naive { softmax_scale: Some(f32::NAN), causal: false };
    let error = refused("naive", SHAPE.out(), 0, |out, _| naive.forward(tensors.qkv(), out));
    assert_says("naive", &error, &["softmax_scale is NaN"]);
    let spec = AnySpec::new(f32::NAN, &attn_core::mask::SeeAll, &attn_core::score::Unchanged);
    let error =
        refused("engine", SHAPE.out(), 0, |out, _| attend_any(tensors.qkv().into(), out, None, &spec));
    assert_says("engine", &error, &["softmax_scale is NaN"]);
    for (block_q, block_kv, words) in
        [(0, 8, "block_q is 0"), (48, 8, "block_q is 48"), (32, 0, "block_kv is 0")]
    {
        assert_says("tiles", &TileSizes::new(block_q, block_kv).unwrap_err().to_string(), &[words]);
    }
}

#[test]
fn outputs_that_do_not_fit() {
    let tensors = Tensors::new();
    let rows = SHAPE.rows();
    let names = ["batch", "head", "n", "head_dim"];
    for (axis, name) in names.into_iter().enumerate() {
        let mut shape = SHAPE.out();
        shape[axis] += 1;
        let what = format!("out with another {name}");
        let found = format!("is {}, expected {}", shape[axis], SHAPE.out()[axis]);
        for flash in [Flash::full(), Flash::causal()] {
            let error =
                refused(&what, shape, rows, |out, lse| flash.forward_with_lse(tensors.qkv(), out, lse));
            assert_says(&what, &error, &["out", &found]);
        }
        let error = refused(&what, shape, 0, |out, _| Naive::default().forward(tensors.qkv(), out));
        assert_says(&what, &error, &["out", &found]);
    }
    for len in [rows - 1, rows + 1, 0] {
        let words = format!("lse: rows is {len}, expected {rows}");
        let flash = refused("lse", SHAPE.out(), len, |out, lse| {
            Flash::full().forward_with_lse(tensors.qkv(), out, lse)
        });
        let naive = refused("lse", SHAPE.out(), len, |out, lse| {
            Naive::default().forward_with_lse(tensors.qkv(), out, lse)
        });
        assert_says("flash", &flash, &[&words]);
        assert_says("naive", &naive, &[&words]);
    }
    let mut half = vec![bf16::ONE; SHAPE.out().iter().product()];
    let out = ViewMut::contiguous("out", &mut half, SHAPE.out()).unwrap();
    let error = Flash::full().forward(tensors.qkv(), out.into()).unwrap_err().to_string();
    assert_says("bf16 out of f32 inputs", &error, &["out", "bf16", "f32"]);
    assert!(half.iter().all(|x| *x == bf16::ONE), "something was written");
}

#[test]
fn inputs_that_do_not_fit_each_other() {
    let numbers = vec![0.5f32; 4096];
    let of = |name: &str, shape: [usize; 4]| view(name, &numbers[..shape.iter().product()], shape);
    let (q, k, v) = (SHAPE.q(), SHAPE.k(), SHAPE.v());
    let with = |mut shape: [usize; 4], axis: usize, n: usize| {
        shape[axis] = n;
        shape
    };
    let cases: [([[usize; 4]; 3], &[&str]); 9] = [
        ([q, with(k, 0, 3), v], &["k: batch is 3", "2 (as in q)"]),
        ([q, k, with(v, 0, 1)], &["v: batch is 1", "2 (as in q)"]),
        ([q, k, with(v, 1, 4)], &["v: n_heads_kv is 4", "2 (as in k)"]),
        ([q, k, with(v, 2, 4)], &["v: n_kv is 4", "5 (as in k)"]),
        ([q, with(k, 3, 7), v], &["k: head_dim is 7", "8 (as in q)"]),
        ([with(q, 1, 5), k, v], &["q: n_heads_q is 5", "multiple of k's 2"]),
        ([q, with(k, 1, 0), with(v, 1, 0)], &["q: n_heads_q is 4", "multiple of k's 0"]),
        ([with(q, 3, 0), with(k, 3, 0), v], &["q: head_dim is 0", "at least 1"]),
        ([q, k, with(v, 3, 0)], &["v: head_dim_v is 0", "at least 1"]),
    ];
    for ([q, k, v], words) in cases {
        let (q, k, v) = (of("q", q), of("k", k), of("v", v));
        assert_says("qkv", &Qkv::new(q, k, v).unwrap_err().to_string(), words);
        assert_says("cache", &Problem::cached(q, k, v, None).unwrap_err().to_string(), words);
    }
    let half = vec![bf16::ONE; SHAPE.k().iter().product()];
    let half = View::contiguous("k", &half, SHAPE.k()).unwrap();
    let error = Qkv::new(of("q", q), half, of("v", v)).unwrap_err().to_string();
    assert_says("dtypes", &error, &["k: dtype is bf16", "f32 (as in q)"]);
}

#[test]
fn additions_of_another_size() {
    let (tensors, call) = (Tensors::new(), Flash::causal().call());
    let numbers = [0.25f32; 64];
    let norm = |eps, gamma_q, gamma_k| QkNorm { kind: NormKind::Rms { eps }, gamma_q, gamma_k };
    let cases: [(FlashCall<'_>, &[&str]); 8] = [
        (call.sinks(&numbers[..3]), &["sinks: n_heads_q is 3, expected 4"]),
        (call.sinks(&[]), &["sinks: n_heads_q is 0, expected 4"]),
        (call.key_bias(&numbers[..4]), &["key_bias: elements is 4", "n_kv = 5", "= 20"]),
        (call.key_bias(&numbers[..10]), &["key_bias: elements is 10", "n_kv = 5", "= 20"]),
        (call.qk_norm(norm(1e-6, Some(&numbers[..9]), None)), &["gamma_q: head_dim is 9, expected 8"]),
        (call.qk_norm(norm(1e-6, None, Some(&numbers[..6]))), &["gamma_k: head_dim is 6, expected 8"]),
        (call.qk_norm(norm(0.0, None, None)), &["eps is 0", "positive"]),
        (call.qk_norm(norm(f32::NAN, None, None)), &["eps is NaN", "positive"]),
    ];
    for (call, words) in cases {
        let what = words[0];
        let error =
            refused(what, SHAPE.out(), SHAPE.rows(), |out, lse| call.forward(tensors.qkv(), out, Some(lse)));
        assert_says(what, &error, words);
    }
}

#[test]
fn masks_and_score_mods_of_another_problem() {
    let (s, no, ids, numbers) = (&SHAPE, [true; 64], [0i32; 64], [0.5f32; 64]);
    let error = |result: std::result::Result<(), AttnError>| result.unwrap_err().to_string();
    let t5 = T5Buckets::new(4, 8, false).unwrap();
    let cases: [(String, &[&str]); 16] = [
        (error(DenseMask::new(&no[..14], &[3, 5], s).map(drop)), &["mask: shape [3, 5]", "14 elements"]),
        (error(DenseMask::new(&no[..12], &[3, 4], s).map(drop)), &["mask: n_kv is 4", "1 or 5"]),
        (error(DenseMask::new(&no[..10], &[2, 1, 5], s).map(drop)), &["mask: n_heads_q is 2", "1 or 4"]),
        (error(DenseMask::new(&no[..5], &[1, 1, 1, 1, 5], s).map(drop)), &["mask: shape", "at most 4 axes"]),
        (error(Bias::new(&numbers[..10], &[2, 5], s).map(drop)), &["bias: n_q is 2", "1 or 3"]),
        (error(Bias::new(&numbers[..9], &[2, 5], s).map(drop)), &["bias: shape [2, 5]", "9 elements"]),
        (error(Documents::new(&ids[..4], &ids[..5], s).map(drop)), &["documents_q: n_q is 4", "3"]),
        (error(Documents::new(&ids[..3], &ids[..9], s).map(drop)), &["documents_kv: n_kv is 9", "5"]),
        (error(KeyLengths::new(vec![5, 6], s).map(drop)), &["key_lengths[1] is 6", "n_kv = 5"]),
        (error(KeyLengths::new(vec![5; 3], s).map(drop)), &["key_lengths: batch is 3", "1 or 2"]),
        (error(PrefixLm::new(vec![9], s, Default::default()).map(drop)), &["prefix[0] is 9", "n_kv = 5"]),
        (error(Alibi::new(vec![0.5; 3], s, 0).map(drop)), &["alibi_slopes: n_heads_q is 3", "4"]),
        (
            error(Alibi::new(vec![0.5; 4], s, isize::MAX).map(drop)),
            &["offset is 9223372036854775807", "536870912"],
        ),
        (
            error(RelativeBias::new(&numbers[..19], 2, s, 0).map(drop)),
            &["table: 19 elements", "4 heads of 2 * 2 + 1"],
        ),
        (error(RelativeBias::new(&numbers, usize::MAX, s, 0).map(drop)), &["table: 64 elements"]),
        (
            error(T5Bias::new(&numbers[..15], t5, s, 0).map(drop)),
            &["table: 15 elements", "4 buckets of 4 heads"],
        ),
    ];
    for (error, words) in cases {
        assert_says(words[0], &error, words);
    }
    for p in [-0.1, 1.5, f32::NAN] {
        let found = format!("is {p}");
        assert_says("dropout", &error(Dropout::new(p, 1).map(drop)), &["dropout", &found, "0 to 1"]);
        let given = Dropout::keep_mask(p, &no[..5], &[5], s).map(drop);
        assert_says("dropout", &error(given), &["dropout", &found, "0 to 1"]);
    }
    let keep = Dropout::keep_mask(0.5, &no[..4], &[4], s).map(drop);
    assert_says("keep", &error(keep), &["keep: n_kv is 4", "1 or 5"]);
}

#[test]
fn caches_and_pages_that_do_not_fit() {
    let tensors = Tensors::new();
    let x = tensors.qkv();
    let (data, scales) = (vec![1i8; SHAPE.k().iter().product()], vec![1.0f32; 64]);
    let int8 = |blocks: usize, block: usize| KvView::Int8 {
        data: View::contiguous("k", &data, SHAPE.k()).unwrap(),
        scales: view("scales", &scales[..4 * blocks], [2, 2, blocks, 1]),
        block,
    };
    let cached = |k: KvView<'_>| Problem::cached(*x.q(), k, *x.v(), None).unwrap_err().to_string();
    assert_says("scales", &cached(int8(2, 2)), &["k's scales: length is 2, expected 3"]);
    assert_says("block", &cached(int8(2, 0)), &["k's scale block is 0", "at least 1"]);

    let pages = vec![0.5f32; 3 * 2 * 4 * 8];
    let k = view("k_cache", &pages, [3, 2, 4, 8]);
    let v = view("v_cache", &pages[..3 * 2 * 4 * 6], [3, 2, 4, 6]);
    let paged = |v: View<'_, f32>, block_table: &[i32], lens: &[i32]| {
        let kv = PagedKv { k: k.into(), v: v.into(), block_table, lens };
        Problem::paged(*x.q(), kv).unwrap_err().to_string()
    };
    let short = view("v_cache", &pages[..2 * 2 * 4 * 6], [2, 2, 4, 6]);
    let slots = view("v_cache", &pages[..3 * 2 * 3 * 6], [3, 2, 3, 6]);
    let cases: [(String, &[&str]); 8] = [
        (paged(short, &[0, 1], &[4, 4]), &["v_cache: pages is 2", "3 (as in k_cache)"]),
        (paged(slots, &[0, 1], &[4, 4]), &["v_cache: page_size is 3", "4 (as in k_cache)"]),
        (paged(v, &[0, 1, 2], &[4, 4]), &["block_table: entries is 3", "multiple of 2"]),
        (paged(v, &[0, 1], &[4, 4, 4]), &["lens: batch is 3, expected 2"]),
        (paged(v, &[0, 1], &[5, 4]), &["lens is 5", "0 to 4"]),
        (paged(v, &[0, 1], &[4, -1]), &["lens is -1", "0 to 4"]),
        (paged(v, &[0, 3], &[4, 1]), &["block_table, row 1 is 3", "below 3"]),
        (paged(v, &[-1, 0], &[1, 1]), &["block_table, row 0 is -1", "below 3"]),
    ];
    for (error, words) in cases {
        assert_says(words[0], &error, words);
    }
    let error = Problem::packed(x, &[0, 3], &[0, 5]).unwrap_err().to_string();
    assert_says("packed batch", &error, &["q: batch is 2", "1 (packed sequences)"]);
}

#[test]
fn gradients_that_do_not_fit() {
    let tensors = Tensors::new();
    let x = tensors.qkv();
    let out = vec![0.5f32; SHAPE.out().iter().product()];
    let lse = vec![0.5f32; SHAPE.rows()];
    let sinks = [0.5f32; 4];
    let run = |q_shape: [usize; 4],
               out_shape: [usize; 4],
               lse: &[f32],
               sinks_len: Option<usize>,
               call: FlashCall<'_>| {
        let numbers = |len: usize| vec![UNTOUCHED; len];
        let (mut q, mut k, mut v) =
            (numbers(q_shape.iter().product()), numbers(tensors.k.len()), numbers(tensors.v.len()));
        let mut grad_sinks = sinks_len.map(numbers);
        let view_mut = |name, data, shape| ViewMut::contiguous(name, data, shape).unwrap();
        let mut grads = Grads::new(
            view_mut("grad_q", &mut q, q_shape).into(),
            view_mut("grad_k", &mut k, SHAPE.k()).into(),
            view_mut("grad_v", &mut v, SHAPE.v()).into(),
        );
        grads.sinks = grad_sinks.as_deref_mut();
        let given = view("out", &out[..out_shape.iter().product()], out_shape).into();
        let forward = ForwardResult { out: given, lse };
        let grad = OutputGrad { out: view("grad_out", &out, SHAPE.out()).into(), lse: None };
        let error = call.backward(x, forward, grad, grads).unwrap_err().to_string();
        let written = [q, k, v, grad_sinks.unwrap_or_default()].concat();
        assert!(written.iter().all(|x| *x == UNTOUCHED), "{error}: something was written");
        error
    };
    let (call, q, o) = (Flash::causal().call(), SHAPE.q(), SHAPE.out());
    let cases: [(String, &[&str]); 5] = [
        (run([2, 4, 2, 8], o, &lse, None, call), &["grad_q: length is 2, expected 3"]),
        (run(q, [2, 4, 3, 5], &lse, None, call), &["out", "is 5, expected 6"]),
        (run(q, o, &lse[1..], None, call), &["lse: rows is 23, expected 24"]),
        (run(q, o, &lse, Some(4), call), &["grad_sinks is asked for"]),
        (run(q, o, &lse, Some(3), call.sinks(&sinks)), &["grad_sinks: elements is 3, expected 4"]),
    ];
    for (error, words) in cases {
        assert_says(words[0], &error, words);
    }
}

#[test]
fn streams_refuse_what_they_cannot_append() {
    let tensors = Tensors::new();
    let x = tensors.qkv();
    let shape = StreamShape::of(&x);
    let not_causal = Flash::full().start(shape).map(drop).unwrap_err().to_string();
    assert_says("full", &not_causal, &["flash does not support", "causal"]);
    let odd = Flash::causal().start(StreamShape { n_heads_q: 3, ..shape }).map(drop).unwrap_err().to_string();
    assert_says("heads", &odd, &["q: n_heads_q is 3", "multiple of 2"]);
    let mut stream = Flash::causal().start(shape).unwrap();
    let error = refused("more keys than queries", SHAPE.out(), 0, |out, _| stream.append(x, out));
    assert_says("append", &error, &["k: n_kv is 5", "3"]);
    assert!(stream.is_empty(), "a refused piece is not counted");
}

#[test]
fn what_was_made_for_another_shape_is_refused() {
    let smaller = AttnShape { batch: 3, n_heads_q: 2, n_heads_kv: 2, n_q: 2, n_kv: 4, ..SHAPE };
    let (seen, ids, numbers) = (vec![true; 48], vec![1; 12], vec![0.5; 48]);
    let axes = [3, 2, 2, 4];
    let tensors = Tensors::new();
    let call = || Flash::full().call();
    let refused = |what: &str, run: &dyn Fn(Qkv<'_>, OutMut<'_>) -> Result<()>| {
        let mut out = vec![UNTOUCHED; SHAPE.out().iter().product()];
        let error = run(tensors.qkv(), ViewMut::contiguous("out", &mut out, SHAPE.out()).unwrap().into());
        let error = error.expect_err(what).to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert!(out.iter().all(|x| *x == UNTOUCHED), "{what}");
    };
    let dense = DenseMask::new(&seen, &axes, &smaller).unwrap();
    refused("mask", &|x, out| call().mask(dense).forward(x, out, None));
    let documents = Documents::new(&ids[..2], &ids[..4], &smaller).unwrap();
    refused("documents_q", &|x, out| call().mask(&documents).forward(x, out, None));
    let bias = Bias::new(&numbers, &axes, &smaller).unwrap();
    refused("bias", &|x, out| call().score_mod(bias).forward(x, out, None));
    let alibi = Alibi::new(vec![0.5; 2], &smaller, 0).unwrap();
    refused("alibi_slopes", &|x, out| call().score_mod(&alibi).forward(x, out, None));
    let table = RelativeBias::new(&numbers[..6], 1, &smaller, 0).unwrap();
    refused("table", &|x, out| call().score_mod(table).forward(x, out, None));
    let buckets = T5Buckets::new(4, 8, true).unwrap();
    let t5 = T5Bias::new(&numbers[..8], buckets, &smaller, 0).unwrap();
    refused("table", &|x, out| call().score_mod(&t5).forward(x, out, None));
    let keep = Dropout::keep_mask(0.5, &seen, &axes, &smaller).unwrap();
    refused("keep", &|x, out| call().dropout(keep).forward(x, out, None));
    let lens = KeyLengths::new(vec![3, 4, 2], &AttnShape { batch: 3, ..SHAPE }).unwrap();
    assert!(call().mask(&lens).definition(&tensors.qkv()).is_ok(), "more entries than needed do no harm");
}
