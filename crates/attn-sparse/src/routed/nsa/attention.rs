//! Native sparse attention as an [`Attention`].

use super::branches::Rows;
use super::compression::Compressed;
use super::inputs::{NsaInputs, NsaOutputs};
use super::{Nsa, NsaGates};
use crate::profile::USUAL;
use crate::routed::router::{causal_pairs, list_bytes, pairs_up_to, rows_together};
use crate::routed::rows::heads_f32;
use crate::store::store;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::Mask;
use attn_core::merge::gated_sum;
use attn_core::{
    Attention, AttnShape, Cost, DType, Differentiable, Growth, OutMut, Profile, Qkv, QkvGrads, Result, Saved,
    StreamShape, StreamState, Streaming, Target, TensorView, View, softmax_flops, softmax_scale_or_default,
};
use std::ops::Range;

/// Entries of a row's list that its branches count as: they bound the rows whose branches exist at a time.
const BRANCHES: usize = 64;

impl Nsa {
    /// All branches and their gated sum; what [`Nsa::backward`](Nsa::backward_with) needs.
    ///
    /// Memory: the three branches, `O(n_q)`.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the input that does not fit.
    pub fn forward_with(&self, x: &NsaInputs<'_>) -> Result<NsaOutputs> {
        x.check(self)?;
        let shape = StreamShape::of(&x.qkv);
        let compressed = match &x.compressed {
            Some(given) => Compressed::given(&shape, &given.k, &given.v),
            None => {
                let mut compressed = Compressed::new(&shape);
                compressed.append(self, x.qkv.k(), x.qkv.v());
                compressed
            }
        };
        let mut all = self.part(&x.qkv, &compressed, 0..x.qkv.shape().n_q, x.selected)?;
        all.out = self.gated(&all, x.gates.as_ref(), x.qkv.shape().head_dim_v)?;
        Ok(all)
    }

    /// The branches of some rows; the compressed blocks are those of all keys up to the last row's, or more.
    fn part(
        &self,
        x: &Qkv<'_>,
        compressed: &Compressed,
        rows: Range<usize>,
        selected: Option<&[Vec<usize>]>,
    ) -> Result<NsaOutputs> {
        let s = x.shape();
        let n_kv = (rows.end + s.n_kv).saturating_sub(s.n_q).min(s.n_kv);
        let shape = AttnShape { n_q: rows.len(), n_kv, ..s };
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, s.head_dim)?;
        let q = heads_f32(x.q(), rows);
        let q = View::contiguous("q", &q, shape.q())?;
        let kv = (x.k().narrow(0..n_kv).into(), x.v().narrow(0..n_kv).into());
        self.attend(&Rows { shape, softmax_scale }, q, kv, compressed, selected)
    }

    /// The sum of the branches; without gates all count alike.
    pub(super) fn gated(
        &self,
        parts: &NsaOutputs,
        gates: Option<&NsaGates<'_>>,
        width: usize,
    ) -> Result<Vec<f32>> {
        let alike = vec![1.0 / self.n_branches() as f32; parts.compress.lse.len()];
        let or_alike = |gate: Option<&'_ [f32]>| gate.map_or_else(|| alike.clone(), <[f32]>::to_vec);
        let [compress, select, window] = [
            or_alike(gates.map(|gates| gates.compress)),
            or_alike(gates.map(|gates| gates.select)),
            or_alike(gates.and_then(|gates| gates.window)),
        ];
        let mut sum: Vec<(&[f32], &[f32])> =
            vec![(&parts.compress.out, &compress), (&parts.select.out, &select)];
        sum.extend(parts.window.as_ref().map(|branch| (branch.out.as_slice(), window.as_slice())));
        let mut out = vec![0.0; alike.len() * width];
        gated_sum(&mut out, alike.len(), &sum)?;
        Ok(out)
    }
}

impl Attention for Nsa {
    fn name(&self) -> &'static str {
        "nsa"
    }

    fn profile(&self) -> Profile {
        Profile {
            target: Target::Own,
            // Before the first compressed block ends, its branch is 0.
            convex: false,
            time: Growth::Quadratic,
            ..USUAL
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let compressed = crate::heads(s) * causal_pairs(s) / self.compress_stride as u64;
        let selected = pairs_up_to(s, self.select_len.saturating_mul(self.n_selected));
        let window = if self.window == 0 { 0 } else { pairs_up_to(s, self.window) };
        let scores = 2 * compressed * s.head_dim as u64;
        let flops = softmax_flops(compressed + selected + window, s) + scores;
        let widths = s.head_dim + s.head_dim_v;
        let blocks = s.batch * s.n_heads_kv * self.n_complete(s.n_kv) * (3 * widths) * 4;
        let rows = s.batch
            * s.n_heads_q
            * s.n_q.min(rows_together(s.n_q, BRANCHES))
            * (s.head_dim + 5 * s.head_dim_v)
            * 4;
        let lists = list_bytes(s, s.n_heads_kv, self.n_selected);
        Cost::of(s, dtype, flops, (blocks + rows) as u64 + lists)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        x.check_out(&out)?;
        self.check()?;
        let s = x.shape();
        softmax_scale_or_default(self.softmax_scale, s.head_dim)?;
        let together = rows_together(s.n_q, BRANCHES);
        let blocks: Vec<_> = (0..s.n_q).step_by(together).map(|at| at..(at + together).min(s.n_q)).collect();
        let (n_blocks, mut pieces) = (blocks.len(), out.into_cuts(blocks.clone()));
        let (mut compressed, mut appended) = (Compressed::new(&StreamShape::of(&x)), 0);
        if s.rows() == 0 {
            return Ok(());
        }
        for (block, rows) in blocks.into_iter().enumerate() {
            let end = (rows.end + s.n_kv).saturating_sub(s.n_q).min(s.n_kv);
            compressed.append(self, &x.k().narrow(appended..end), &x.v().narrow(appended..end));
            appended = end;
            let parts = self.part(&x, &compressed, rows.clone(), None)?;
            let sum = self.gated(&parts, None, s.head_dim_v)?;
            for (head, of_head) in sum.chunks_exact(rows.len() * s.head_dim_v).enumerate() {
                for (i, row) in of_head.chunks_exact(s.head_dim_v).enumerate() {
                    pieces[head * n_blocks + block].store(i, row.iter().copied());
                }
            }
        }
        Ok(())
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        if s.rows() == 0 {
            return Ok(Reference { out: Vec::new(), lse: None });
        }
        let parts = self.forward_with(&NsaInputs::new(*x))?;
        let mut compressed = Compressed::new(&StreamShape::of(x));
        compressed.append(self, x.k(), x.v());
        let (q, blocks) = (heads_f32(x.q(), 0..s.n_q), compressed.rows());
        let (k, v) = compressed.views(&blocks)?;
        let means = Qkv::new(View::contiguous("q", &q, s.q())?, k, v)?;
        let softmax_scale = self.softmax_scale.map(f64::from);
        let exact =
            |x: &Qkv<'_>, mask: &dyn Mask| Ok(Exact { softmax_scale, mask, ..Exact::default() }.all(x)?.out);
        let rows = Rows { shape: s, softmax_scale: 1.0 };
        let mut branches = vec![
            exact(&means, &Rows { shape: s, softmax_scale: 1.0 }.ended(self))?,
            exact(x, self.decision(&s, &parts.selected)?.mask())?,
        ];
        if self.window > 0 {
            branches.push(exact(x, &rows.band(self))?);
        }
        let sum = |at: usize| branches.iter().map(|branch| branch[at]).sum::<f64>() / branches.len() as f64;
        Ok(Reference { out: (0..s.rows() * s.head_dim_v).map(sum).collect(), lse: None })
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        Some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl Streaming for Nsa {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        Ok(Box::new(self.stream(shape)?))
    }
}

impl Differentiable for Nsa {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        x.check_out(&out)?;
        let all = self.forward_with(&NsaInputs::new(x))?;
        store(out, &all.out)?;
        Ok(Saved::new(all))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        _: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let s = x.shape();
        crate::routed::index_inputs::check_axes("grad_out", grad_out.shape(), s.out())?;
        let grad_out = heads_f32(&grad_out, 0..s.n_q);
        let all = self.backward_with(&NsaInputs::new(x), saved.get()?, &grad_out)?;
        store(grads.q, &all.q)?;
        store(grads.k, &all.k)?;
        store(grads.v, &all.v)?;
        Ok(())
    }
}
