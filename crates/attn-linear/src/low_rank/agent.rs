//! Agent attention: few agent tokens gather the values, and queries read the agents.
//!
//! ```text
//! O = softmax(scale Q A^T) softmax(scale A K^T) V          A [agents, head_dim]
//! ```
//!
//! Agents are given, or the averages of the queries in segments of equal length.
//!
//! Source: Han, Ye, Han, Xia, Pan, Wan, Song, Huang 2024 (Agent Attention), equation 6; its biases and its convolution of the
//! values are not included.

use super::attention::{Compose, Head64, LowRank};
use super::tensor::{Segments, Tensor, attend, attend64};
use attn_core::{AttnError, AttnShape, OutMut, Qkv, Result, TensorView, softmax_scale_or_default};

/// Agent attention, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agent {
    /// Agent tokens, where none are given.
    pub agents: usize,
    /// Multiplies raw dot products of both softmaxes; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for Agent {
    fn default() -> Self {
        Self { agents: 64, softmax_scale: None }
    }
}

/// Gradients of agent attention with agents as given.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By the agents, of their shape.
    pub agents: Vec<f32>,
}

impl Agent {
    fn scale(&self, head_dim: usize) -> Result<f32> {
        softmax_scale_or_default(self.softmax_scale, head_dim)
    }

    fn segments(&self, n_q: usize) -> Segments {
        Segments::even(n_q, self.agents.min(n_q))
    }

    fn check_agents(x: &Qkv<'_>, agents: &TensorView<'_>) -> Result<()> {
        let (s, found) = (x.shape(), agents.shape());
        for (axis, found, expected) in [
            ("batch", found[0], s.batch),
            ("heads", found[1], s.n_heads_q),
            ("head_dim", found[3], s.head_dim),
        ] {
            if found != expected {
                return Err(AttnError::shape("agent", axis, found, expected));
            }
        }
        Ok(())
    }

    /// Attends with agents `(batch, n_heads_q, agents, head_dim)` as given.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward_with(&self, x: &Qkv<'_>, agents: &TensorView<'_>, out: OutMut<'_>) -> Result<()> {
        Self::check_agents(x, agents)?;
        x.check_out(&out)?;
        let [q, k, v] = [x.q(), x.k(), x.v()].map(Tensor::of);
        let agents = Tensor::of(agents);
        let scale = self.scale(x.shape().head_dim)?;
        let gathered = attend(&agents, &k, &v, scale)?.out;
        crate::recomputed::store(out, &attend(&q, &agents, &gathered, scale)?.out.data);
        Ok(())
    }

    /// Gradients by all inputs, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients_with(
        &self,
        x: &Qkv<'_>,
        agents: &TensorView<'_>,
        grad_out: &TensorView<'_>,
    ) -> Result<AgentGrads> {
        Self::check_agents(x, agents)?;
        attn_core::check_like("grad_out", grad_out.shape(), x.dtype(), x.q(), x.shape().head_dim_v)?;
        let [q, k, v] = [x.q(), x.k(), x.v()].map(Tensor::of);
        let [q, k, v, agents] = self.back([&q, &k, &v, &Tensor::of(agents)], &Tensor::of(grad_out))?;
        Ok(AgentGrads { q: q.data, k: k.data, v: v.data, agents: agents.data })
    }

    fn back(&self, [q, k, v, agents]: [&Tensor; 4], by: &Tensor) -> Result<[Tensor; 4]> {
        let scale = self.scale(q.axes[3])?;
        let gather = attend(agents, k, v, scale)?;
        let read = attend(q, agents, &gather.out, scale)?;
        let [dq, mut dagents, by_gathered] = read.back(q, agents, &gather.out, by)?;
        let [more, dk, dv] = gather.back(agents, k, v, &by_gathered)?;
        dagents.add(&more);
        Ok([dq, dk, dv, dagents])
    }
}

impl LowRank for Agent {
    const NAME: &'static str = "agent";
    const CALLS: u64 = 2;
    const CROSS_LENGTHS: bool = true;
    const CONVEX: bool = true;

    fn rank(&self, s: &AttnShape) -> usize {
        self.agents.min(s.n_q)
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        self.scale(s.head_dim)?;
        if self.agents == 0 {
            return Err(AttnError::value("agents", 0, "at least 1"));
        }
        Ok(())
    }

    fn define(&self, h: Head64<'_>) -> Vec<f64> {
        let n = h.q.len() / h.head_dim;
        let count = self.agents.min(n);
        let mut agents = vec![0.0; count * h.head_dim];
        for (a, agent) in agents.chunks_exact_mut(h.head_dim).enumerate() {
            let rows: Vec<&[f64]> =
                h.q.chunks_exact(h.head_dim)
                    .enumerate()
                    .filter(|(t, _)| t * count / n == a)
                    .map(|(_, q)| q)
                    .collect();
            for row in &rows {
                agent.iter_mut().zip(*row).for_each(|(sum, x)| *sum += x / rows.len() as f64);
            }
        }
        let scale = self.softmax_scale.map_or(1.0 / (h.head_dim as f64).sqrt(), f64::from);
        let widths = (h.head_dim, h.head_dim_v);
        let gathered = attend64(&agents, h.k, h.v, widths, scale);
        attend64(h.q, &agents, &gathered, widths, scale)
    }
}

impl Compose for Agent {
    fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (agents, scale) = (self.segments(q.axes[2]).pool(q), self.scale(q.axes[3])?);
        let gathered = attend(&agents, k, v, scale)?.out;
        Ok(attend(q, &agents, &gathered, scale)?.out)
    }

    fn run_back(&self, [q, k, v]: [&Tensor; 3], by: &Tensor) -> Result<[Tensor; 3]> {
        let segments = self.segments(q.axes[2]);
        let [mut dq, dk, dv, dagents] = self.back([q, k, v, &segments.pool(q)], by)?;
        segments.pool_back(&dagents, &mut dq);
        Ok([dq, dk, dv])
    }
}
