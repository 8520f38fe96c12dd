//! The backward pass of a call that ran: where it writes, into what, and what it must keep.

use super::bytes::Bytes;
use super::numbers::numbers;
use super::sequences::Sequences;
use super::tensor::{LSE_CANARY, Layout, Tensor};
use attn_core::{DType, Result};
use attn_flash::engine::{ForwardResult, Grads, OutputGrad};

/// Gradients of the outputs, and room for those of the inputs.
#[derive(Debug, Clone)]
pub struct Gradients {
    out: Tensor,
    lse: Option<Vec<f32>>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Option<Vec<f32>>,
    key_bias: Option<Vec<f32>>,
}

/// What a backward pass wrote, as bits: of `q`, `k`, `v`, sinks and key bias.
pub type Bits = [Vec<u32>; 5];

impl Gradients {
    /// `sinks` and `key_bias` are the lengths of what the call takes.
    pub fn draw(
        bytes: &mut Bytes<'_>,
        sequences: &Sequences,
        sinks: Option<usize>,
        key_bias: Option<usize>,
    ) -> Self {
        let [q, k, v] = sequences.shapes();
        let out = sequences.out_shape();
        let mut tensor = |mut shape: [usize; 4], is_read: bool| {
            if bytes.one_in(32) {
                let axis = bytes.within(0..=3);
                shape[axis] = bytes.about(shape[axis].min(4096));
            }
            let dtype = if bytes.one_in(3) { bytes.pick(&DType::ALL) } else { DType::F32 };
            let repeats = is_read || bytes.one_in(24);
            let layout = Layout::of(bytes, shape, repeats);
            if is_read { Tensor::filled(bytes, dtype, layout) } else { Tensor::untouched(dtype, layout) }
        };
        let (q, k, v) = (tensor(q, false), tensor(k, false), tensor(v, false));
        let grad_out = tensor(out, true);
        let rows = out[..3].iter().fold(1usize, |rows, n| rows.saturating_mul(*n)).min(1 << 16);
        let lse = bytes.one_in(3).then(|| {
            let len = bytes.about(rows);
            numbers(bytes, len)
        });
        let mut room = |len: Option<usize>| {
            let len = len.or_else(|| bytes.one_in(64).then_some(1));
            len.filter(|_| bytes.one_in(2)).map(|len| vec![LSE_CANARY; bytes.about(len)])
        };
        let (sinks, key_bias) = (room(sinks), room(key_bias));
        Self { out: grad_out, lse, q, k, v, sinks, key_bias }
    }

    /// Hands everything to `backward`.
    pub fn collect(
        &mut self,
        out: &Tensor,
        lse: &[f32],
        backward: impl FnOnce(ForwardResult<'_>, OutputGrad<'_>, Grads<'_>) -> Result<()>,
    ) -> Result<()> {
        let forward = ForwardResult { out: out.view("out")?, lse };
        let grad = OutputGrad { out: self.out.view("grad_out")?, lse: self.lse.as_deref() };
        let (q, k) = (self.q.view_mut("grad_q")?, self.k.view_mut("grad_k")?);
        let grads = Grads::new(q, k, self.v.view_mut("grad_v")?);
        let (sinks, key_bias) = (self.sinks.as_deref_mut(), self.key_bias.as_deref_mut());
        backward(forward, grad, Grads { sinks, key_bias, ..grads })
    }

    pub fn bits(&self) -> Bits {
        let of = |numbers: &Option<Vec<f32>>| numbers.iter().flatten().map(|x| x.to_bits()).collect();
        [self.q.bits(), self.k.bits(), self.v.bits(), of(&self.sinks), of(&self.key_bias)]
    }

    /// Every number was written, and nothing between rows.
    pub fn written_exactly(&self) -> bool {
        let filled = |numbers: &Option<Vec<f32>>| {
            numbers.iter().flatten().all(|x| x.to_bits() != LSE_CANARY.to_bits())
        };
        let tensors = [&self.q, &self.k, &self.v];
        tensors.into_iter().all(Tensor::written_exactly) && filled(&self.sinks) && filled(&self.key_bias)
    }
}
