//! LongNet as an [`Attention`]: branch after branch, merged in f32.

use super::{Branch, LongNet};
use crate::Decision;
use crate::attend::Call;
use crate::profile::USUAL;
use crate::store::store;
use attn_core::exact::{Exact, Reference};
use attn_core::merge::merge_into;
use attn_core::score::Unchanged;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Element, OutMut, Profile, Qkv,
    QkvGrads, Result, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, View,
    ViewMut, softmax_flops, softmax_scale_or_default,
};
use attn_flash::TileSizes;
use attn_flash::engine::{ForwardResult, Grads};
use attn_flash::stream::{CachedStream, Kept};

/// The numbers of a tensor in f32, row-major.
fn widened(tensor: &TensorView<'_>) -> Vec<f32> {
    fn rows<E: Element>(view: &View<'_, E>) -> Vec<f32> {
        let [batch, heads, _, _] = view.shape();
        let heads = (0..batch * heads).map(|at| view.head(at / heads, at % heads));
        heads.flat_map(|head| head.iter().flatten().map(|x| x.load()).collect::<Vec<_>>()).collect()
    }
    match tensor {
        TensorView::F32(view) => rows(view),
        TensorView::Bf16(view) => rows(view),
        TensorView::F16(view) => rows(view),
    }
}

fn view<'a>(name: &str, rows: &'a [f32], axes: [usize; 4]) -> Result<TensorView<'a>> {
    Ok(View::contiguous(name, rows, axes)?.into())
}

/// Inputs in f32: partial results are then rounded once, after the merge.
struct Widened {
    /// q, k and v, unless they are f32 already.
    copies: Option<[Vec<f32>; 3]>,
}

impl Widened {
    fn new(x: &Qkv<'_>) -> Self {
        let copies = (x.dtype() != DType::F32).then(|| [x.q(), x.k(), x.v()].map(widened));
        Self { copies }
    }

    fn qkv<'a>(&'a self, x: Qkv<'a>) -> Result<Qkv<'a>> {
        let Some([q, k, v]) = &self.copies else { return Ok(x) };
        let s = x.shape();
        Qkv::new(view("q", q, s.q())?, view("k", k, s.k())?, view("v", v, s.v())?)
    }
}

/// What the backward pass needs: the merged result in f32.
struct Merged {
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl LongNet {
    /// Runs `visit` with the engine call of each branch.
    fn each_branch(&self, shape: &AttnShape, mut visit: impl FnMut(Call<'_>) -> Result<()>) -> Result<()> {
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        self.branches.iter().try_for_each(|branch: &Branch| {
            let decision: Decision = self.decision(*branch, shape)?;
            visit(Call { decision: &decision, softmax_scale, score_mod: &Unchanged, sinks: None })
        })
    }

    fn merged(&self, x: Qkv<'_>) -> Result<Merged> {
        let shape = x.shape();
        let wide = Widened::new(&x);
        let x = wide.qkv(x)?;
        let len = shape.rows() * shape.head_dim_v;
        let mut all = Merged { out: vec![0.0; len], lse: vec![f32::NEG_INFINITY; shape.rows()] };
        let (mut out, mut lse) = (vec![0.0; len], vec![0.0; shape.rows()]);
        self.each_branch(&shape, |call| {
            call.forward(x, ViewMut::contiguous("out", &mut out, shape.out())?.into(), Some(&mut lse))?;
            merge_into(&mut all.out, &mut all.lse, &out, &lse)
        })?;
        Ok(all)
    }

    fn attend(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Merged> {
        x.check_out(&out)?;
        let merged = self.merged(x)?;
        store(out, &merged.out)?;
        Ok(merged)
    }
}

impl Attention for LongNet {
    fn name(&self) -> &'static str {
        "longnet"
    }

    fn profile(&self) -> Profile {
        Profile {
            target: Target::Own,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            ..USUAL
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let scratch = TileSizes::auto(shape).workspace_bytes(shape) * rayon::current_num_threads() as u64;
        let merged = 2 * (shape.rows() * (shape.head_dim_v + 1)) as u64;
        let inputs =
            [shape.q(), shape.k(), shape.v()].into_iter().map(|axes| axes.iter().product::<usize>() as u64);
        let widened = if dtype == DType::F32 { 0 } else { inputs.sum() };
        Cost::of(shape, dtype, softmax_flops(self.pairs(shape), shape), scratch + 4 * (merged + widened))
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.attend(x, out).map(drop)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let (mask, copies) = self.mask(&self.branches, &x.shape());
        let softmax_scale = self.softmax_scale.map(f64::from);
        Exact { softmax_scale, mask: &mask, score_mod: &copies, ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.causal.then_some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl SoftmaxAttention for LongNet {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        attn_core::check_lse(lse, &x.shape())?;
        lse.copy_from_slice(&self.attend(x, out)?.lse);
        Ok(())
    }
}

impl Differentiable for LongNet {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.attend(x, out).map(Saved::new)
    }

    /// Each branch gives its own share, from the merged result.
    fn backward(
        &self,
        x: Qkv<'_>,
        _: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let shape = x.shape();
        let merged: &Merged = saved.get()?;
        if grad_out.shape() != shape.out() {
            let (found, expected) = (format!("{:?}", grad_out.shape()), format!("{:?}", shape.out()));
            return Err(AttnError::value("grad_out's shape", found, expected));
        }
        let wide = Widened::new(&x);
        let x = wide.qkv(x)?;
        let out = view("out", &merged.out, shape.out())?;
        let axes = [shape.q(), shape.k(), shape.v()];
        let zeros = || axes.map(|axes| vec![0.0f32; axes.iter().product()]);
        let (mut sums, mut shares) = (zeros(), zeros());
        self.each_branch(&shape, |call| {
            let [q, k, v] = &mut shares;
            let own = Grads::new(
                ViewMut::contiguous("grad_q", q, axes[0])?.into(),
                ViewMut::contiguous("grad_k", k, axes[1])?.into(),
                ViewMut::contiguous("grad_v", v, axes[2])?.into(),
            );
            call.backward(x, ForwardResult { out, lse: &merged.lse }, grad_out, own)?;
            for (sum, share) in sums.iter_mut().zip(&shares) {
                sum.iter_mut().zip(share).for_each(|(sum, share)| *sum += share);
            }
            Ok(())
        })?;
        store(grads.q, &sums[0])?;
        store(grads.k, &sums[1])?;
        store(grads.v, &sums[2])
    }
}

impl Streaming for LongNet {
    /// Keeps every position: segments depend on where they stand in the sequence.
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        if !self.causal {
            return Err(AttnError::unsupported("longnet", "streaming unless it is causal"));
        }
        CachedStream::start(self.clone(), shape, Kept { sinks: 0, last: None })
    }
}
