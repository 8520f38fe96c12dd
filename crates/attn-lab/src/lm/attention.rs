//! Attention of a model's own layers, by candle's matrix products: `q`, `k`, `v` are `[heads, n, head_dim]`.
//!
//! ```text
//! out_i = Σ_j softmax_j(q_i·k_j / √head_dim) v_j        over the keys j that query i sees
//! ```
//!
//! Slow and plain on purpose: it serves training and the model's own loss; the engines are measured elsewhere.

use candle_core::{Device, Tensor};

use super::masked_softmax::{Visible, masked_softmax};

/// Queries whose scores are held at once; the scores of one block are `[heads, BLOCK_Q, n]`.
const BLOCK_Q: usize = 256;

/// The last `window` keys up to the query, in blocks of `window` queries against two blocks of keys: linear in `n`.
pub(crate) fn window_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    window: usize,
) -> candle_core::Result<Tensor> {
    let (heads, n, head_dim) = q.dims3()?;
    let n_blocks = n.div_ceil(window);
    let padded = n_blocks * window;
    let blocks = |x: &Tensor| x.reshape((heads * n_blocks, window, head_dim));
    // Key block b beside key block b − 1; before the first one stand zeros, which no query sees.
    let with_previous = |x: &Tensor| {
        let x = x.pad_with_zeros(1, window, padded - n)?;
        let own = blocks(&x.narrow(1, window, padded)?.contiguous()?)?;
        Tensor::cat(&[blocks(&x.narrow(1, 0, padded)?.contiguous()?)?, own], 1)
    };
    let q = blocks(&scaled(&q.pad_with_zeros(1, 0, padded - n)?)?)?;
    let scores = q.matmul(&with_previous(k)?.t()?)?;
    let probs = masked_softmax(&scores, Visible::Band { window, n_blocks })?;
    let out = probs.matmul(&with_previous(v)?)?;
    out.reshape((heads, padded, head_dim))?.narrow(1, 0, n)?.contiguous()
}

/// All keys up to the query, in blocks of queries. `q` may hold only the last positions of the text: its last row
/// sees the last key.
pub(crate) fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
    let (heads, n_q, head_dim) = q.dims3()?;
    let first = k.dim(1)?.checked_sub(n_q).ok_or_else(|| {
        candle_core::Error::Msg(format!("causal attention: {n_q} queries, {:?} keys", k.dim(1))).bt()
    })?;
    if n_q == 0 {
        return Tensor::zeros((heads, 0, head_dim), q.dtype(), &Device::Cpu);
    }
    let q = scaled(q)?;
    let outs = (0..n_q).step_by(BLOCK_Q).map(|start| {
        let len = BLOCK_Q.min(n_q - start);
        let seen = first + start + len;
        let scores =
            q.narrow(1, start, len)?.contiguous()?.matmul(&k.narrow(1, 0, seen)?.contiguous()?.t()?)?;
        let probs = masked_softmax(&scores, Visible::Causal { first_row: first + start })?;
        probs.matmul(&v.narrow(1, 0, seen)?.contiguous()?)
    });
    Tensor::cat(&outs.collect::<candle_core::Result<Vec<_>>>()?, 1)
}

/// Each of the `[heads, n, head_dim]` heads `group_size` times in a row.
pub(crate) fn repeat_heads(x: &Tensor, group_size: usize) -> candle_core::Result<Tensor> {
    if group_size == 1 {
        return Ok(x.clone());
    }
    let (heads, n, head_dim) = x.dims3()?;
    let x = x.unsqueeze(1)?.broadcast_as((heads, group_size, n, head_dim))?;
    x.contiguous()?.reshape((heads * group_size, n, head_dim))
}

fn scaled(q: &Tensor) -> candle_core::Result<Tensor> {
    q.affine(1.0 / (q.dim(2)? as f64).sqrt(), 0.0)
}
