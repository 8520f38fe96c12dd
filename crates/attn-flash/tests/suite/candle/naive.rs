//! Attention in candle's own operations, with everything that the functions under test take: what they are compared with,
//! gradients included.

use attn_core::candle::candle_core::{D, DType, Device, Result, Tensor};

pub(crate) fn random(shape: (usize, usize, usize, usize)) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// NaN if either has one.
pub(crate) fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let numbers = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let pairs = numbers(a)?.into_iter().zip(numbers(b)?);
    Ok(pairs.fold(0.0, |max, (a, b)| {
        let difference = if a == b { 0.0 } else { (a - b).abs() };
        if difference.is_nan() || difference > max { difference } else { max }
    }))
}

/// What to compute besides `softmax(scale q k^T) v`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Naive<'a> {
    pub(crate) scale: f64,
    pub(crate) left: Option<usize>,
    pub(crate) right: Option<usize>,
    pub(crate) softcap: Option<f64>,
    pub(crate) slopes: Option<&'a Tensor>,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) sinks: Option<&'a Tensor>,
}

impl Naive<'_> {
    /// `(batch, heads, length, width)`, in f32; the output and the log-sum-exps.
    pub(crate) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let wide = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        let (batch, heads, n_q, _) = q.dims4()?;
        let (_, kv_heads, n_kv, _) = k.dims4()?;
        // Consecutive query heads share a key/value head.
        let repeated = |t: &Tensor| -> Result<Tensor> {
            let (b, h, n, d) = t.dims4()?;
            let all = t.unsqueeze(2)?.expand((b, h, heads / kv_heads, n, d))?.contiguous()?;
            all.reshape((b, heads, n, d))
        };
        let (q, k, v) = (wide(q)?, repeated(&wide(k)?)?, repeated(&wide(v)?)?);
        let mut scores = (q.matmul(&k.t()?.contiguous()?)? * self.scale)?;
        if let Some(cap) = self.softcap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let distance: Vec<f32> = (0..n_q * n_kv)
            .map(|at| (at % n_kv) as f32 - (at / n_kv) as f32 - (n_kv as f32 - n_q as f32))
            .collect();
        if let Some(slopes) = self.slopes {
            let distance = Tensor::from_vec(distance.clone(), (n_q, n_kv), &Device::Cpu)?.abs()?;
            scores = scores.broadcast_sub(&slopes.reshape((heads, 1, 1))?.broadcast_mul(&distance)?)?;
        }
        if let Some(bias) = self.bias {
            scores = scores.broadcast_add(bias)?;
        }
        let hidden =
            |d: f32| self.left.is_some_and(|l| -d > l as f32) || self.right.is_some_and(|r| d > r as f32);
        let mask = distance.iter().map(|d| if hidden(*d) { f32::NEG_INFINITY } else { 0.0 }).collect();
        scores = scores.broadcast_add(&Tensor::from_vec(mask, (n_q, n_kv), &Device::Cpu)?)?;
        if let Some(sinks) = self.sinks {
            let column = sinks.reshape((1, heads, 1, 1))?.broadcast_as((batch, heads, n_q, 1))?;
            scores = Tensor::cat(&[&scores, &column.contiguous()?], D::Minus1)?;
        }
        let max = scores.max_keepdim(D::Minus1)?.detach();
        let exp = scores.broadcast_sub(&max)?.exp()?;
        let sum = exp.sum_keepdim(D::Minus1)?;
        let weights = exp.broadcast_div(&sum)?.narrow(D::Minus1, 0, n_kv)?.contiguous()?;
        Ok((weights.matmul(&v)?, (sum.log()? + max)?.squeeze(D::Minus1)?))
    }

    /// The output for `(batch, length, heads, width)`.
    pub(crate) fn bnhd(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let swap = |t: &Tensor| t.transpose(1, 2);
        self.forward(&swap(q)?, &swap(k)?, &swap(v)?)?.0.transpose(1, 2)?.contiguous()
    }

    /// The output for packed sequences `(length, heads, width)`, one sequence after the other.
    pub(crate) fn packed(&self, qkv: [&Tensor; 3], cu_q: &[u32], cu_kv: &[u32]) -> Result<Tensor> {
        let [q, k, v] = qkv;
        let mut outputs = Vec::new();
        for s in 0..cu_q.len() - 1 {
            let cut = |t: &Tensor, cu: &[u32]| {
                t.narrow(0, cu[s] as usize, (cu[s + 1] - cu[s]) as usize)?.unsqueeze(0)
            };
            if cu_q[s + 1] > cu_q[s] {
                outputs.push(self.bnhd(&cut(q, cu_q)?, &cut(k, cu_kv)?, &cut(v, cu_kv)?)?.squeeze(0)?);
            }
        }
        Tensor::cat(&outputs, 0)
    }
}
