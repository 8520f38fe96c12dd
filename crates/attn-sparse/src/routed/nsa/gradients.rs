//! The backward pass: each branch with its gate's share of the output's gradient.
//!
//! ```text
//! dC = g_c dout      dg_c = dout . C      (and so on)
//! dk_j = dk_j (selected) + dk_j (window) + sum_{blocks c with j} dkc_c / l
//! ```

use super::branches::Rows;
use super::compression::Compressed;
use super::inputs::{NsaBranch, NsaGrads, NsaInputs, NsaOutputs};
use super::{Nsa, inputs::NsaGates};
use crate::routed::router::rows_apart;
use crate::routed::rows::heads_f32;
use attn_core::merge::gated_sum_backward;
use attn_core::{AttnError, AttnShape, Result, StreamShape, View, ViewMut, softmax_scale_or_default};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};

/// Gradients of one branch.
struct BranchGrads {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
}

/// What a branch computed, and what weighs it.
struct Step<'a> {
    branch: &'a NsaBranch,
    gate: &'a [f32],
    grad_out: &'a [f32],
}

impl Step<'_> {
    fn backward(&self, problem: Problem<'_>, spec: &AnySpec<'_>) -> Result<BranchGrads> {
        let s: AttnShape = problem.shape();
        let floats = |axes: [usize; 4]| vec![0.0f32; axes.iter().product()];
        let mut all =
            BranchGrads { q: floats(s.q()), k: floats(s.k()), v: floats(s.v()), gate: vec![0.0; s.rows()] };
        let mut grad = floats(s.out());
        gated_sum_backward(self.grad_out, &self.branch.out, self.gate, &mut grad, &mut all.gate)?;
        let forward = ForwardResult {
            out: View::contiguous("out", &self.branch.out, s.out())?.into(),
            lse: &self.branch.lse,
        };
        let grad = OutputGrad { out: View::contiguous("grad_out", &grad, s.out())?.into(), lse: None };
        let grads = Grads::new(
            ViewMut::contiguous("grad_q", &mut all.q, s.q())?.into(),
            ViewMut::contiguous("grad_k", &mut all.k, s.k())?.into(),
            ViewMut::contiguous("grad_v", &mut all.v, s.v())?.into(),
        );
        attend_backward_any(problem, forward, grad, grads, spec)?;
        Ok(all)
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
}

impl Nsa {
    /// Gradients of a loss, given `grad_out [batch, n_heads_q, n_q, head_dim_v]`; `y` is what [`Nsa::forward_with`] gave for
    /// `x`. The choice of blocks has no gradient.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn backward_with(&self, x: &NsaInputs<'_>, y: &NsaOutputs, grad_out: &[f32]) -> Result<NsaGrads> {
        x.check(self)?;
        let s = x.qkv.shape();
        if grad_out.len() != s.rows() * s.head_dim_v {
            return Err(AttnError::shape("grad_out", "elements", grad_out.len(), s.rows() * s.head_dim_v));
        }
        let rows =
            Rows { shape: s, softmax_scale: softmax_scale_or_default(self.softmax_scale, s.head_dim)? };
        let alike = vec![1.0 / self.n_branches() as f32; s.rows()];
        let NsaGates { compress, select, window } =
            x.gates.unwrap_or(NsaGates { compress: &alike, select: &alike, window: Some(&alike) });

        let shape = StreamShape::of(&x.qkv);
        let compressed = match &x.compressed {
            Some(given) => Compressed::given(&shape, &given.k, &given.v),
            None => {
                let mut compressed = Compressed::new(&shape);
                compressed.append(self, x.qkv.k(), x.qkv.v());
                compressed
            }
        };
        let (q, blocks, ended) = (heads_f32(x.qkv.q(), 0..s.n_q), compressed.rows(), rows.ended(self));
        let q = View::contiguous("q", &q, s.q())?;
        let (k, v) = compressed.views(&blocks)?;
        let step = |branch, gate| Step { branch, gate, grad_out };
        let of_means =
            step(&y.compress, compress).backward(Problem::cached(q, k, v, None)?, &rows.together(&ended))?;

        let problem = || Problem::cached(q, *x.qkv.k(), *x.qkv.v(), None);
        let decision = self.decision(&s, &y.selected)?;
        let spec = rows_apart(decision.mask(), self.select_len, rows.softmax_scale, &s);
        let mut sum = step(&y.select, select).backward(problem()?, &spec)?;
        add(&mut sum.q, &of_means.q);
        let mut gate_window = Vec::new();
        if let (Some(branch), Some(gate)) = (&y.window, window) {
            let band = rows.band(self);
            let of_window = step(branch, gate).backward(problem()?, &rows.together(&band))?;
            add(&mut sum.q, &of_window.q);
            add(&mut sum.k, &of_window.k);
            add(&mut sum.v, &of_window.v);
            gate_window = of_window.gate;
        }
        if x.compressed.is_none() {
            let heads = s.batch * s.n_heads_kv;
            self.mean_backward(heads, &of_means.k, &mut sum.k, s.head_dim);
            self.mean_backward(heads, &of_means.v, &mut sum.v, s.head_dim_v);
        }
        Ok(NsaGrads {
            q: sum.q,
            k: sum.k,
            v: sum.v,
            gate_compress: of_means.gate,
            gate_select: sum.gate,
            gate_window,
            k_compress: of_means.k,
            v_compress: of_means.v,
        })
    }
}
