//! The functions of candle-flash-attn, each against candle's own operations, forwards and backwards.

use super::naive::{Naive, max_difference};
use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
use attn_flash as candle_flash_attn;

const SCALE: f32 = 0.3;
/// Largest differences of outputs and of gradients.
const BOUNDS: [(DType, f32, f32); 3] =
    [(DType::F32, 3e-6, 3e-5), (DType::BF16, 2e-2, 6e-2), (DType::F16, 3e-3, 1e-2)];

type Function<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// Runs both with and without gradients in every dtype. `Var`s are rounded to the dtype first, so that both see the same.
fn compare(name: &str, shapes: [Vec<usize>; 3], ours: Function<'_>, naive: Function<'_>) -> Result<()> {
    for (dtype, bound, grad_bound) in BOUNDS {
        let var = |shape: &Vec<usize>| {
            Var::from_tensor(&Tensor::randn(0f32, 1.0, shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?)
        };
        let [q, k, v] = shapes.each_ref().map(var);
        let vars = [q?, k?, v?];
        let [q, k, v] = vars.each_ref();
        let (got, want) = (ours(q, k, v)?, naive(q, k, v)?);
        assert_eq!((got.dtype(), got.is_contiguous()), (dtype, true), "{name} {dtype:?}");
        let error = max_difference(&got, &want)?;
        assert!(error < bound, "{name} {dtype:?}: {error}");
        let untracked = ours(&q.detach(), &k.detach(), &v.detach())?;
        assert_eq!(max_difference(&got, &untracked)?, 0.0, "{name} {dtype:?}: tracked and not");
        let weights = Tensor::randn(0f32, 1.0, want.dims(), &Device::Cpu)?;
        let loss = |out: &Tensor| out.to_dtype(DType::F32)?.mul(&weights)?.sum_all()?.backward();
        let (got, want) = (loss(&got)?, loss(&want)?);
        for (input, var) in ["q", "k", "v"].into_iter().zip(&vars) {
            let (got, want) = (got.get(var).expect(input), want.get(var).expect(input));
            assert_eq!((got.dtype(), got.dims()), (dtype, var.dims()), "{name}: gradient of {input}");
            let error = max_difference(got, want)?;
            assert!(error < grad_bound, "{name} {dtype:?}: gradient of {input}: {error}");
        }
    }
    Ok(())
}

fn slopes() -> Result<Tensor> {
    Tensor::new(&[0.5f32, 0.25, 0.125, 0.0], &Device::Cpu)
}

#[test]
fn batches_equal_candles_own_operations() -> Result<()> {
    use candle_flash_attn::{
        flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
        flash_attn_windowed,
    };
    let slopes = &slopes()?;
    let plain = Naive { scale: f64::from(SCALE), ..Naive::default() };
    let causal = Naive { right: Some(0), ..plain };
    let alibi = Naive { slopes: Some(slopes), ..plain };
    // More keys than queries, so that the alignment matters; two query heads share each key/value head.
    let shapes = || [vec![2, 13, 4, 8], vec![2, 21, 2, 8], vec![2, 21, 2, 8]];
    let cases: [(&str, Naive<'_>, Function<'_>); 10] = [
        ("full", plain, &|q, k, v| flash_attn(q, k, v, SCALE, false)),
        ("causal", causal, &|q, k, v| flash_attn(q, k, v, SCALE, true)),
        ("windowed", Naive { left: Some(5), right: Some(2), ..plain }, &|q, k, v| {
            flash_attn_windowed(q, k, v, SCALE, Some(5), Some(2))
        }),
        ("left window", Naive { left: Some(4), ..plain }, &|q, k, v| {
            flash_attn_windowed(q, k, v, SCALE, Some(4), None)
        }),
        ("windows wider than the keys", plain, &|q, k, v| {
            flash_attn_windowed(q, k, v, SCALE, Some(100), Some(usize::MAX))
        }),
        ("alibi", alibi, &|q, k, v| flash_attn_alibi(q, k, v, slopes, SCALE, false)),
        ("causal alibi", Naive { right: Some(0), ..alibi }, &|q, k, v| {
            flash_attn_alibi(q, k, v, slopes, SCALE, true)
        }),
        ("alibi, windowed", Naive { left: Some(7), right: Some(0), ..alibi }, &|q, k, v| {
            flash_attn_alibi_windowed(q, k, v, slopes, SCALE, Some(7), Some(0))
        }),
        ("soft cap", Naive { softcap: Some(2.0), left: Some(7), ..plain }, &|q, k, v| {
            flash_attn_alibi_windowed_softcap(q, k, v, None, SCALE, Some(7), None, 2.0)
        }),
        ("soft cap before alibi", Naive { softcap: Some(2.0), right: Some(0), ..alibi }, &|q, k, v| {
            flash_attn_alibi_windowed_softcap(q, k, v, Some(slopes), SCALE, None, Some(0), 2.0)
        }),
    ];
    for (name, naive, ours) in cases {
        compare(name, shapes(), ours, &|q, k, v| naive.bnhd(q, k, v))?;
    }
    Ok(())
}

#[test]
fn packed_sequences_equal_each_alone() -> Result<()> {
    use candle_flash_attn::{
        flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
        flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_windowed,
    };
    // As many keys as queries, more, one query; an empty sequence between them.
    let (cu_q, cu_kv) = ([0u32, 9, 9, 14, 15], [0u32, 9, 9, 23, 40]);
    let (seq_q, seq_k) = (&Tensor::new(&cu_q, &Device::Cpu)?, &Tensor::new(&cu_kv, &Device::Cpu)?);
    let signed = (&seq_q.to_dtype(DType::I32)?, &seq_k.to_dtype(DType::I64)?);
    let slopes = &slopes()?;
    let plain = Naive { scale: f64::from(SCALE), ..Naive::default() };
    let alibi = Naive { slopes: Some(slopes), ..plain };
    let shapes = || [vec![15, 4, 8], vec![40, 2, 8], vec![40, 2, 8]];
    let cases: [(&str, Naive<'_>, Function<'_>); 7] = [
        ("full", plain, &|q, k, v| flash_attn_varlen(q, k, v, signed.0, signed.1, 9, 17, SCALE, false)),
        ("causal", Naive { right: Some(0), ..plain }, &|q, k, v| {
            flash_attn_varlen(q, k, v, seq_q, seq_k, 9, 17, SCALE, true)
        }),
        ("windowed", Naive { left: Some(4), right: Some(1), ..plain }, &|q, k, v| {
            flash_attn_varlen_windowed(q, k, v, seq_q, seq_k, 9, 17, SCALE, Some(4), Some(1))
        }),
        ("alibi", alibi, &|q, k, v| {
            flash_attn_varlen_alibi(q, k, v, slopes, seq_q, seq_k, 9, 17, SCALE, false)
        }),
        ("causal alibi", Naive { right: Some(0), ..alibi }, &|q, k, v| {
            flash_attn_varlen_alibi(q, k, v, slopes, seq_q, seq_k, 99, 99, SCALE, true)
        }),
        ("alibi, windowed", Naive { left: Some(6), right: Some(0), ..alibi }, &|q, k, v| {
            flash_attn_varlen_alibi_windowed(q, k, v, slopes, seq_q, seq_k, 9, 17, SCALE, Some(6), Some(0))
        }),
        ("soft cap before alibi", Naive { softcap: Some(2.0), left: Some(6), ..alibi }, &|q, k, v| {
            let slopes = Some(slopes);
            flash_attn_varlen_alibi_windowed_softcap(
                q,
                k,
                v,
                slopes,
                seq_q,
                seq_k,
                9,
                17,
                SCALE,
                Some(6),
                None,
                2.0,
            )
        }),
    ];
    for (name, naive, ours) in cases {
        compare(name, shapes(), ours, &|q, k, v| naive.packed([q, k, v], &cu_q, &cu_kv))?;
    }
    Ok(())
}

#[test]
fn tensors_are_read_through_their_strides() -> Result<()> {
    // One projection gives all heads of q, k and v: slices of it are neither contiguous nor at the start of their memory.
    let all = Tensor::randn(0f32, 1.0, (2, 11, 8, 16), &Device::Cpu)?;
    let (q, k, v) = (all.narrow(2, 0, 4)?, all.narrow(2, 4, 2)?, all.narrow(2, 6, 2)?);
    let own = |t: &Tensor| t.contiguous();
    let want = candle_flash_attn::flash_attn(&own(&q)?, &own(&k)?, &own(&v)?, SCALE, true)?;
    let got = candle_flash_attn::flash_attn(&q, &k, &v, SCALE, true)?;
    assert_eq!(max_difference(&got, &want)?, 0.0);
    // Transposed: (batch, heads, length, width) in memory.
    let transposed = |t: &Tensor| own(&t.transpose(1, 2)?)?.transpose(1, 2);
    let got =
        candle_flash_attn::flash_attn(&transposed(&q)?, &transposed(&k)?, &transposed(&v)?, SCALE, true)?;
    assert_eq!(max_difference(&got, &want)?, 0.0);
    // The same key for every head: a stride of zero.
    let one = k.narrow(2, 0, 1)?;
    let want = candle_flash_attn::flash_attn(&q, &own(&one)?, &own(&one)?, SCALE, false)?;
    let shared = one.broadcast_as((2, 11, 2, 16))?;
    let got = candle_flash_attn::flash_attn(&q, &shared, &shared, SCALE, false)?;
    assert!(max_difference(&got, &want)? < 1e-6);
    Ok(())
}

#[test]
fn nothing_to_attend_gives_zeros_or_nothing() -> Result<()> {
    let tensor = |n, heads| Tensor::ones((2, n, heads, 8), DType::F32, &Device::Cpu);
    let no_keys = candle_flash_attn::flash_attn(&tensor(3, 4)?, &tensor(0, 2)?, &tensor(0, 2)?, SCALE, true)?;
    assert_eq!(no_keys.flatten_all()?.to_vec1::<f32>()?, vec![0.0; 2 * 3 * 4 * 8]);
    let no_queries =
        candle_flash_attn::flash_attn(&tensor(0, 4)?, &tensor(3, 2)?, &tensor(3, 2)?, SCALE, true)?;
    assert_eq!(no_queries.dims(), [2, 0, 4, 8]);
    // More queries than keys: the first ones stand before all keys.
    let rows = candle_flash_attn::flash_attn(&tensor(5, 4)?, &tensor(2, 2)?, &tensor(2, 2)?, SCALE, true)?;
    let sums = rows.sum((0, 2, 3))?.to_vec1::<f32>()?;
    assert_eq!(sums, [0.0, 0.0, 0.0, 64.0, 64.0]);
    let none = Tensor::new(&[0u32], &Device::Cpu)?;
    let packed = |heads| Tensor::ones((0, heads, 8), DType::F32, &Device::Cpu);
    let (q, kv) = (packed(4)?, packed(2)?);
    let out = candle_flash_attn::flash_attn_varlen(&q, &kv, &kv, &none, &none, 0, 0, SCALE, true)?;
    assert_eq!(out.dims(), [0, 4, 8]);
    Ok(())
}
