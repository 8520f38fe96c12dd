//! The functions of candle-flash-attn 0.11, with its names and argument conventions, on the CPU.
//!
//! `softmax(softmax_scale * q k^T) v` for `q (batch, n_q, n_heads_q, head_dim)`, `k (batch, n_kv, n_heads_kv, head_dim)`,
//! `v (batch, n_kv, n_heads_kv, head_dim_v)`; consecutive query heads share a key/value head. As there:
//!
//! - the last query stands at the last key, for causal masks, windows and ALiBi alike, in each sequence of its own;
//! - `window_size_left` and `window_size_right` are keys seen on each side of that position, both ends included; `None`, or
//!   more than there are keys, is all; `(None, Some(0))` is causal;
//! - the soft cap comes first, then ALiBi, then the mask; a soft cap of 0 is none.
//!
//! Beyond it: gradients of q, k and v; f32 besides bf16 and f16; any `head_dim`, and another for `v`; a row that sees no key
//! is zero. Packed sequences take `seqlens` of u32 as there, of i32 and of i64.
//!
//! Sources: Dao et al. 2022, Dao 2023 (FlashAttention); Press et al. 2021 (ALiBi).

use super::kernel::Lengths;
use super::numbers::prefix_sums;
use crate::Flash;
use attn_core::candle::AxisOrder;
use attn_core::candle::candle_core::{Result, Tensor, bail};

/// What the functions have in common.
#[derive(Clone, Copy, Default)]
struct Options<'a> {
    alibi_slopes: Option<&'a Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: Option<f32>,
}

impl Options<'_> {
    fn causal(self, causal: bool) -> Self {
        Self { window_size_right: causal.then_some(0), ..self }
    }

    fn run(self, qkv: [&Tensor; 3], n_kv: usize, lengths: Option<Lengths>) -> Result<Tensor> {
        let flash = Flash {
            softmax_scale: Some(self.softmax_scale),
            window_left: self.window_size_left.filter(|keys| *keys <= n_kv),
            window_right: self.window_size_right.filter(|keys| *keys <= n_kv),
            softcap: self.softcap,
            ..Flash::full()
        };
        let mut call = flash.call().on_tensors();
        if let Some(slopes) = self.alibi_slopes {
            call = call.alibi(slopes);
        }
        call.run(if lengths.is_some() { AxisOrder::Nhd } else { AxisOrder::Bnhd }, lengths, qkv)
    }

    fn batch(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let n_kv = k.dims().get(1).copied().unwrap_or(0);
        self.run([q, k, v], n_kv, None)
    }

    fn packed(self, q: &Tensor, k: &Tensor, v: &Tensor, packed: Packed<'_>) -> Result<Tensor> {
        let Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k } = packed;
        let names = ["seqlens_q", "seqlens_k"];
        let lengths =
            Lengths { q: prefix_sums(names[0], seqlens_q)?, kv: prefix_sums(names[1], seqlens_k)?, names };
        check_longest("max_seqlen_q", &lengths.q, max_seqlen_q)?;
        check_longest("max_seqlen_k", &lengths.kv, max_seqlen_k)?;
        self.run([q, k, v], max_seqlen_k, Some(lengths))
    }
}

/// Where packed sequences begin and end.
struct Packed<'a> {
    seqlens_q: &'a Tensor,
    seqlens_k: &'a Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
}

/// Checks that no sequence is longer than `most`; of sums that decrease the engine has more to say.
pub(super) fn check_longest(name: &str, sums: &[i32], most: usize) -> Result<()> {
    let longest = sums.windows(2).map(|w| i64::from(w[1]) - i64::from(w[0])).max().unwrap_or(0);
    if sums.is_sorted() && usize::try_from(longest).is_ok_and(|longest| longest > most) {
        bail!("{name} is {most}, expected at least {longest}, the longest sequence");
    }
    Ok(())
}

/// Attention of `(batch, length, heads, width)` tensors; `causal` lets a query see no key after its own position.
///
/// ```
/// use attn_flash::flash_attn;
/// # use attn_core::candle::candle_core::{Device, Result, Tensor, Var};
///
/// # fn main() -> Result<()> {
/// let q = Var::from_tensor(&Tensor::randn(0f32, 1.0, (2, 9, 4, 16), &Device::Cpu)?)?;
/// let kv = Tensor::randn(0f32, 1.0, (2, 9, 2, 16), &Device::Cpu)?; // two query heads share each
/// let out = flash_attn(&q, &kv, &kv, 0.25, true)?;
/// assert_eq!(out.dims(), [2, 9, 4, 16]);
/// assert!(out.sqr()?.sum_all()?.backward()?.get(&q).is_some());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`crate::candle::FlashTensors::forward_t`].
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    Options { softmax_scale, ..Options::default() }.causal(causal).batch(q, k, v)
}

/// [`flash_attn`] with a sliding window.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = Options { softmax_scale, window_size_left, window_size_right, ..Options::default() };
    options.batch(q, k, v)
}

/// [`flash_attn`] with biases that fall linearly with the distance; `alibi_slopes (n_heads_q)` or `(batch, n_heads_q)`.
///
/// # Errors
/// As [`flash_attn`]; slopes that track gradients.
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let options = Options { alibi_slopes: Some(alibi_slopes), softmax_scale, ..Options::default() };
    options.causal(causal).batch(q, k, v)
}

/// [`flash_attn_alibi`] with a sliding window.
///
/// # Errors
/// As [`flash_attn_alibi`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let alibi_slopes = Some(alibi_slopes);
    Options { alibi_slopes, softmax_scale, window_size_left, window_size_right, softcap: None }.batch(q, k, v)
}

/// [`flash_attn_windowed`] with a soft cap and, if given, ALiBi.
///
/// # Errors
/// As [`flash_attn_alibi`]; a soft cap that is negative or not finite.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let softcap = Some(softcap);
    Options { alibi_slopes, softmax_scale, window_size_left, window_size_right, softcap }.batch(q, k, v)
}

/// [`flash_attn`] of packed sequences: `q (total_q, n_heads_q, head_dim)`, `k (total_kv, n_heads_kv, head_dim)`,
/// `v (total_kv, n_heads_kv, head_dim_v)` -> `(total_q, n_heads_q, head_dim_v)`. `seqlens_q` and `seqlens_k` are
/// `(sequences + 1)` prefix sums of their lengths, none of which is longer than `max_seqlen_q` and `max_seqlen_k`.
///
/// # Errors
/// As [`crate::candle::FlashTensors::forward_packed_t`]; a sequence that is longer than said.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let packed = Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k };
    Options { softmax_scale, ..Options::default() }.causal(causal).packed(q, k, v, packed)
}

/// [`flash_attn_varlen`] with a sliding window.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let packed = Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k };
    let options = Options { softmax_scale, window_size_left, window_size_right, ..Options::default() };
    options.packed(q, k, v, packed)
}

/// [`flash_attn_varlen`] with ALiBi: `alibi_slopes (n_heads_q)` or `(sequences, n_heads_q)`.
///
/// # Errors
/// As [`flash_attn_varlen`]; slopes that track gradients.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let packed = Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k };
    let options = Options { alibi_slopes: Some(alibi_slopes), softmax_scale, ..Options::default() };
    options.causal(causal).packed(q, k, v, packed)
}

/// [`flash_attn_varlen_alibi`] with a sliding window.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let packed = Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k };
    let alibi_slopes = Some(alibi_slopes);
    let options = Options { alibi_slopes, softmax_scale, window_size_left, window_size_right, softcap: None };
    options.packed(q, k, v, packed)
}

/// [`flash_attn_varlen_windowed`] with a soft cap and, if given, ALiBi.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`]; a soft cap that is negative or not finite.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let packed = Packed { seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k };
    let softcap = Some(softcap);
    let options = Options { alibi_slopes, softmax_scale, window_size_left, window_size_right, softcap };
    options.packed(q, k, v, packed)
}
