//! What cannot be computed is an error that names the argument; never a panic, never a number.

use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
use attn_flash::{
    Flash, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed_softcap, flash_attn_varlen,
    flash_attn_varlen_alibi, flash_attn_windowed,
};

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn lengths(sums: &[u32]) -> Tensor {
    Tensor::new(sums, &Device::Cpu).unwrap()
}

/// Each error has all of its words.
fn check(cases: Vec<(&str, Result<Tensor>, &[&str])>) {
    for (what, result, words) in cases {
        let error = match result {
            Ok(out) => panic!("{what}: gave {:?}", out.dims()),
            Err(error) => error.to_string(),
        };
        assert!(words.iter().all(|word| error.contains(word)), "{what}: {error}, expected {words:?}");
    }
}

#[test]
fn batches() -> Result<()> {
    let (q, k) = (tensor(&[2, 5, 4, 8]), tensor(&[2, 7, 2, 8]));
    let slopes = tensor(&[4]);
    let tracked = Var::from_tensor(&slopes)?.into_inner();
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| flash_attn(q, k, v, 0.3, true);
    let cap = |cap| flash_attn_alibi_windowed_softcap(&q, &k, &k, None, 0.3, None, None, cap);
    let alibi = |slopes: &Tensor| flash_attn_alibi(&q, &k, &k, slopes, 0.3, true);
    check(vec![
        ("rank 3", run(&q.flatten(0, 1)?, &k, &k), &["q's shape", "(batch, length, heads, width)"]),
        ("rank 5", run(&q, &k.unsqueeze(0)?, &k), &["k's shape"]),
        ("rank 0", run(&q, &k, &tensor(&[])), &["v's shape", "[]"]),
        ("integers", run(&q.to_dtype(DType::U32)?, &k, &k), &["q", "U32"]),
        ("f64", run(&q, &k, &k.to_dtype(DType::F64)?), &["v", "F64"]),
        ("mixed dtypes", run(&q, &k.to_dtype(DType::BF16)?, &k), &["k: dtype is bf16", "f32"]),
        ("batch", run(&q, &tensor(&[3, 7, 2, 8]), &k), &["k: batch is 3", "2"]),
        ("head_dim", run(&q, &tensor(&[2, 7, 2, 16]), &k), &["k: head_dim is 16", "8"]),
        ("lengths of k and v", run(&q, &k, &tensor(&[2, 6, 2, 8])), &["v: ", "6", "7"]),
        ("heads of k and v", run(&q, &k, &tensor(&[2, 7, 4, 8])), &["v: ", "4", "2"]),
        ("groups", run(&q, &tensor(&[2, 7, 3, 8]), &tensor(&[2, 7, 3, 8])), &["n_heads_q", "4", "3"]),
        ("no heads", run(&q, &tensor(&[2, 7, 0, 8]), &tensor(&[2, 7, 0, 8])), &["n_heads", "0"]),
        ("strided last axis", run(&q.transpose(1, 3)?, &k, &k), &["q", "contiguous"]),
        ("NaN scale", flash_attn(&q, &k, &k, f32::NAN, true), &["softmax_scale", "NaN"]),
        ("infinite scale", flash_attn_windowed(&q, &k, &k, f32::INFINITY, None, None), &["softmax_scale"]),
        ("negative cap", cap(-1.0), &["softcap", "-1"]),
        ("NaN cap", cap(f32::NAN), &["softcap", "NaN"]),
        ("number of slopes", alibi(&tensor(&[3])), &["alibi_slopes", "3", "4"]),
        ("rank of slopes", alibi(&tensor(&[1, 1, 4])), &["alibi_slopes's shape", "(n_heads_q)"]),
        ("dtype of slopes", alibi(&slopes.to_dtype(DType::U8)?), &["alibi_slopes", "U8"]),
        ("slopes with gradients", alibi(&tracked), &["alibi_slopes", "gradients", "detach"]),
        ("slopes made of what has gradients", alibi(&(&tracked * 2.0)?), &["alibi_slopes", "gradients"]),
    ]);
    assert_eq!(cap(0.0)?.dims(), q.dims(), "a cap of 0 is none");
    Ok(())
}

#[test]
fn packed_sequences() -> Result<()> {
    let (q, k) = (tensor(&[9, 4, 8]), tensor(&[12, 2, 8]));
    let (cu_q, cu_k) = (lengths(&[0, 4, 9]), lengths(&[0, 5, 12]));
    let run = |cu_q: &Tensor, cu_k: &Tensor| flash_attn_varlen(&q, &k, &k, cu_q, cu_k, 9, 12, 0.3, true);
    let of = |q: &Tensor, k: &Tensor, v: &Tensor| flash_attn_varlen(q, k, v, &cu_q, &cu_k, 9, 12, 0.3, true);
    let longest = |max_q, max_k| flash_attn_varlen(&q, &k, &k, &cu_q, &cu_k, max_q, max_k, 0.3, true);
    let alibi = |slopes: &Tensor| flash_attn_varlen_alibi(&q, &k, &k, slopes, &cu_q, &cu_k, 9, 12, 0.3, true);
    let huge = Tensor::new(&[0i64, 4, 1 << 40], &Device::Cpu)?;
    let negative = Tensor::new(&[0i32, -4, 9], &Device::Cpu)?;
    check(vec![
        ("rank 4", of(&q.unsqueeze(0)?, &k, &k), &["q's shape", "(length, heads, width)"]),
        ("groups", of(&q, &tensor(&[12, 3, 8]), &tensor(&[12, 3, 8])), &["n_heads_q", "4", "3"]),
        ("head_dim", of(&q, &tensor(&[12, 2, 4]), &k), &["k: head_dim"]),
        ("start", run(&lengths(&[1, 4, 9]), &cu_k), &["seqlens_q", "1"]),
        ("end", run(&lengths(&[0, 4, 8]), &cu_k), &["seqlens_q", "8", "9"]),
        ("end of keys", run(&cu_q, &lengths(&[0, 5, 13])), &["seqlens_k", "13", "12"]),
        ("decreasing", run(&cu_q, &lengths(&[0, 13, 12])), &["seqlens_k", "12 after 13"]),
        ("negative", run(&negative, &cu_k), &["seqlens_q", "-4"]),
        ("beyond i32", run(&huge, &cu_k), &["seqlens_q", "1099511627776"]),
        ("number of sequences", run(&cu_q, &lengths(&[0, 5, 7, 12])), &["seqlens_k", "4", "3", "seqlens_q"]),
        ("empty", run(&lengths(&[]), &cu_k), &["seqlens_q", "empty"]),
        ("rank of lengths", run(&cu_q, &cu_k.unsqueeze(0)?), &["seqlens_k's shape"]),
        ("dtype of lengths", run(&cu_q.to_dtype(DType::F32)?, &cu_k), &["seqlens_q", "F32"]),
        ("longest queries", longest(4, 12), &["max_seqlen_q is 4", "5"]),
        ("longest keys", longest(9, 6), &["max_seqlen_k is 6", "7"]),
        ("slopes", alibi(&tensor(&[5])), &["alibi_slopes", "5", "4"]),
    ]);
    Ok(())
}

#[test]
fn bias_and_sinks() -> Result<()> {
    let (q, k) = (tensor(&[2, 4, 5, 8]), tensor(&[2, 2, 7, 8]));
    let tracked = |shape: &[usize]| Var::from_tensor(&tensor(shape)).unwrap().into_inner();
    for (how, make) in [("fixed", &tensor as &dyn Fn(&[usize]) -> Tensor), ("learned", &tracked)] {
        let call = || Flash::causal().call().on_tensors();
        let bias = |bias: &Tensor| call().bias(bias).forward_t(&q, &k, &k);
        let sinks = |sinks: &Tensor| call().sinks(sinks).forward_t(&q, &k, &k);
        check(vec![
            ("keys", bias(&make(&[5, 6])), &["bias: n_kv is 6", "7"]),
            ("heads", bias(&make(&[3, 1, 1])), &["bias: n_heads_q is 3", "4"]),
            ("axes", bias(&make(&[1, 1, 1, 1, 1])), &["bias", "4 axes"]),
            ("mask for bias", bias(&tensor(&[5, 7]).to_dtype(DType::U8)?), &["bias", "U8"]),
            ("number of sinks", sinks(&make(&[2])), &["sinks", "2", "4"]),
            ("shape of sinks", sinks(&make(&[2, 2])), &["sinks' shape", "[2, 2]"]),
            ("dtype of sinks", sinks(&tensor(&[4]).to_dtype(DType::I64)?), &["sinks", "I64"]),
            ("q", call().sinks(&make(&[4])).forward_t(&q.flatten(0, 1)?, &k, &k), &["q's shape"]),
            ("v", call().sinks(&make(&[4])).forward_t(&q, &k, &k.to_dtype(DType::F16)?), &["v: dtype", "32"]),
            ("k", call().sinks(&make(&[4])).forward_bnhd_t(&q, &k, &k), &["n_heads_q", "5", "7"]),
        ]);
        assert!(bias(&make(&[1])).is_ok(), "{how}: one number for all pairs");
    }
    Ok(())
}
