//! Gradients of a whole problem: each head a task, its chunks backwards.
//!
//! The states at the start of every [`SEGMENT`] chunks are kept, those between them are computed again: memory beyond
//! the gradients is `key_dim value_dim / (SEGMENT chunk_len)` numbers a token and head.

use super::Chunk;
use super::head::{HeadRows, Stages, Step, Widened, chunk_len, extra_range, fill, piece, steps};
use super::inputs::{Extra, Inputs, Per, Sizes};
use super::memory::Memory;
use super::run::{check_blind, prepare};
use super::variant::{AnyVariant, Plan, Pull, Tokens};
use attn_core::parallel::for_each_task;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::simd::Isa;
use attn_core::view::Rows;
use attn_core::{AttnError, DType, Element, Result, TensorView, View};
use std::ops::Range;

/// Chunks between two states that are kept.
const SEGMENT: usize = 16;

/// Gradients of a loss with respect to all inputs of a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `q`, `k`, `v` and the extra inputs that were given, each of the shape of its input; inputs that have one row a head
    /// as `[heads, width]`.
    pub inputs: NamedTensors,
    /// Of the memory before the first token, `[batch, heads, memory]`.
    pub memory: Vec<f32>,
}

/// The gradients of one head's inputs.
struct HeadGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    extras: Vec<Vec<f32>>,
}

/// Computes the gradients, given that of the output and, where it matters, that of the memory after the last token.
pub(super) fn backward(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    memory: Option<&Memory>,
    d_out: TensorView<'_>,
    d_memory: Option<&[f32]>,
) -> Result<Gradients> {
    let (sizes, plan) = prepare(variant, x)?;
    if !variant.differentiable() {
        return Err(AttnError::unsupported(variant.name(), "gradients"));
    }
    let wanted = [sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim_v];
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if d_out.shape()[a] != wanted[a] {
            return Err(AttnError::shape("grad_out", axis, d_out.shape()[a], wanted[a]));
        }
    }
    if memory.is_some() || d_memory.is_some() {
        check_blind(variant, &plan, &sizes)?;
    }
    let mut initial = memory.cloned().unwrap_or_else(|| Memory::new(&plan, &sizes));
    initial.check(&plan, &sizes)?;
    let mut d_initial = vec![0.0; initial.numbers().len()];
    if let Some(given) = d_memory {
        if given.len() != d_initial.len() {
            return Err(AttnError::shape("grad_memory", "numbers", given.len(), d_initial.len()));
        }
        d_initial.copy_from_slice(given);
    }
    let call = Call { variant, x, sizes: &sizes, plan: &plan };
    let heads = match (x.q, d_out) {
        (TensorView::F32(_), TensorView::F32(d)) => call.run(d, &mut initial, &mut d_initial)?,
        (TensorView::Bf16(_), TensorView::Bf16(d)) => call.run(d, &mut initial, &mut d_initial)?,
        (TensorView::F16(_), TensorView::F16(d)) => call.run(d, &mut initial, &mut d_initial)?,
        (q, d) => {
            let (found, expected) = (d.dtype().to_string(), format!("{} (as in q)", q.dtype()));
            return Err(AttnError::DType { tensor: "grad_out".into(), found, expected });
        }
    };
    let inputs = call.gather(&heads)?;
    Ok(Gradients { inputs, memory: d_initial })
}

struct Call<'a> {
    variant: &'a dyn AnyVariant,
    x: &'a Inputs<'a>,
    sizes: &'a Sizes,
    plan: &'a Plan,
}

impl Call<'_> {
    fn run<E: Element>(
        &self,
        d_out: View<'_, E>,
        initial: &mut Memory,
        d_initial: &mut [f32],
    ) -> Result<Vec<HeadGradients>> {
        let sizes = self.sizes;
        let typed = |name: &str, view| {
            E::untag(view).ok_or_else(|| AttnError::DType {
                tensor: name.into(),
                found: view.dtype().to_string(),
                expected: E::DTYPE.to_string(),
            })
        };
        let (q, k, v) = (typed("q", self.x.q)?, typed("k", self.x.k)?, typed("v", self.x.v)?);
        let heads = (0..sizes.batch).flat_map(|batch| (0..sizes.heads).map(move |head| (batch, head)));
        let empty = |(batch, head)| {
            let extras = self.x.head_extras(sizes.heads, batch, head);
            let zeros = |rows: usize, width: usize| vec![0.0; rows * width];
            HeadGradients {
                q: zeros(sizes.tokens, sizes.head_dim),
                k: zeros(sizes.keys, sizes.head_dim),
                v: zeros(sizes.keys, sizes.head_dim_v),
                extras: extras.iter().map(|(_, rows)| zeros(rows.len(), rows.width())).collect(),
            }
        };
        let mut all: Vec<HeadGradients> = heads.clone().map(empty).collect();
        let memories = initial.heads_mut().zip(d_initial.chunks_exact_mut(self.plan.memory_len()));
        let tasks = heads.zip(memories).zip(&mut all).map(|(((batch, head), (memory, d_memory)), grads)| {
            let rows = [&q, &k, &v].map(|view| view.head(batch, head / (sizes.heads / view.shape()[1])));
            let [q, k, v] = rows;
            let extras = self.x.head_extras(sizes.heads, batch, head);
            let rows = HeadRows { q, k, v, head, extras };
            Head { rows, d_out: d_out.head(batch, head), memory, d_memory, grads }
        });
        let tasks: Vec<Head<'_, E>> = tasks.collect();
        let isa = Isa::current();
        let start = || Workspace {
            stages: Stages::new(self.plan, sizes),
            wide: Widened::new(self.plan, sizes, E::DTYPE != DType::F32),
            grads: self.plan.stages.iter().map(|_| Chunk::default()).collect(),
            gained: Chunk::default(),
            d_rows: Vec::new(),
            d_norms: Vec::new(),
        };
        for_each_task(tasks.into_iter(), start, |workspace, head| head.run(self, isa, workspace));
        Ok(all)
    }

    /// Sums the heads' gradients into the shapes of the inputs.
    fn gather(&self, heads: &[HeadGradients]) -> Result<NamedTensors> {
        let sizes = self.sizes;
        let sum = |shape: [usize; 4], part: &dyn Fn(&HeadGradients) -> &[f32]| -> Vec<f32> {
            let head = shape[2] * shape[3];
            let mut all = vec![0.0; shape.iter().product()];
            for (at, grads) in heads.iter().enumerate() {
                let (batch, h) = (at / sizes.heads, at % sizes.heads);
                let own = batch * shape[1] + h / (sizes.heads / shape[1]);
                all[own * head..][..head].iter_mut().zip(part(grads)).for_each(|(all, d)| *all += d);
            }
            all
        };
        let mut inputs = NamedTensors::default();
        let mut keep = |name: &str, shape: &[usize], data: Vec<f32>| -> Result<()> {
            inputs.0.insert(name.into(), NamedTensor::f32(name, shape, data)?);
            Ok(())
        };
        let (q, k, v) = (self.x.q.shape(), self.x.k.shape(), self.x.v.shape());
        keep("q", &q, sum(q, &|grads| &grads.q))?;
        keep("k", &k, sum(k, &|grads| &grads.k))?;
        keep("v", &v, sum(v, &|grads| &grads.v))?;
        for (e, (name, shape)) in self.x.extra_shapes().enumerate() {
            let data = sum(shape, &|grads| &grads.extras[e]);
            let per =
                self.variant.extras().iter().find(|extra: &&Extra| extra.name == name).map(|extra| extra.per);
            if per == Some(Per::Head) {
                let [batch, own, rows, width] = shape;
                let mut head = vec![0.0; own * width];
                for (at, row) in data.chunks_exact(width.max(1)).enumerate().take(batch * own * rows) {
                    let h = at / rows % own;
                    head[h * width..][..width].iter_mut().zip(row).for_each(|(all, d)| *all += d);
                }
                keep(name, &[own, width], head)?;
            } else {
                keep(name, &shape, data)?;
            }
        }
        Ok(inputs)
    }
}

/// A thread's buffers.
struct Workspace<'a> {
    stages: Stages,
    wide: Widened<'a>,
    /// Of the stages' chunks.
    grads: Vec<Chunk>,
    gained: Chunk,
    /// Of what a stage reads.
    d_rows: Vec<f32>,
    d_norms: Vec<f32>,
}

/// One head's task.
struct Head<'a, E> {
    rows: HeadRows<'a, E>,
    d_out: Rows<'a, E>,
    memory: &'a mut [f32],
    d_memory: &'a mut [f32],
    grads: &'a mut HeadGradients,
}

impl<'a, E: Element> Head<'a, E> {
    fn run(self, call: &Call<'_>, isa: Isa, w: &mut Workspace<'a>) {
        let Call { variant, sizes, plan, .. } = *call;
        let len = chunk_len(plan, sizes);
        let steps: Vec<_> = steps(plan, len, sizes.tokens, sizes.keys).collect();
        let forward = |step: &Step, memory: &mut [f32], w: &mut Workspace<'a>| {
            let x = self.rows.tokens(isa, variant, sizes, step, &mut w.wide);
            w.stages.run(variant, plan, &x, memory);
        };
        // Memories at the start of the segments.
        let mut kept = Vec::new();
        for (at, step) in steps.iter().enumerate() {
            if at % SEGMENT == 0 {
                kept.push(self.memory.to_vec());
            }
            // The last segment's memories are computed once.
            if at / SEGMENT < (steps.len() - 1) / SEGMENT {
                forward(step, self.memory, w);
            }
        }
        for (segment, start) in steps.chunks(SEGMENT).zip(kept).rev() {
            let mut memories = vec![start];
            for step in &segment[..segment.len() - 1] {
                let mut memory = memories[memories.len() - 1].clone();
                forward(step, &mut memory, w);
                memories.push(memory);
            }
            for (step, memory) in segment.iter().zip(&memories).rev() {
                let Workspace { stages, wide, grads, gained, d_rows, d_norms } = &mut *w;
                let x = self.rows.tokens(isa, variant, sizes, step, wide);
                let rows = step.tokens.clone();
                let d_out: Vec<f32> = rows.flat_map(|i| self.d_out.row(i).iter().map(|d| d.load())).collect();
                let (d_matrices, d_carry) = self.d_memory.split_at_mut(plan.matrices_len());
                let HeadGradients { q, k, v, extras } = &mut *self.grads;
                let cut = |range: &Range<usize>, width: usize| range.start * width..range.end * width;
                let extras = extras.iter_mut().zip(&self.rows.extras).map(|(grads, (name, rows))| {
                    let range = extra_range(variant.extras(), name, rows.len(), step);
                    (*name, &mut grads[cut(&range, rows.width())])
                });
                let mut to = Pull {
                    q: &mut q[cut(&step.tokens, sizes.head_dim)],
                    k: &mut k[cut(&step.keys, sizes.head_dim)],
                    v: &mut v[cut(&step.keys, sizes.head_dim_v)],
                    carry: &memory[plan.matrices_len()..],
                    d_carry,
                    notes: Vec::new(),
                    extras: extras.collect(),
                };
                let back = Back { call, x: &x, memory, d_out: &d_out };
                back.run(stages, grads, gained, [d_rows, d_norms], d_matrices, &mut to);
            }
        }
    }
}

/// One step backwards.
struct Back<'a> {
    call: &'a Call<'a>,
    x: &'a Tokens<'a>,
    /// Before it.
    memory: &'a [f32],
    d_out: &'a [f32],
}

impl Back<'_> {
    fn run(
        &self,
        stages: &mut Stages,
        grads: &mut [Chunk],
        gained: &mut Chunk,
        [d_rows, d_norms]: [&mut Vec<f32>; 2],
        d_matrices: &mut [f32],
        to: &mut Pull<'_>,
    ) {
        let Call { variant, plan, .. } = *self.call;
        let (x, queries) = (self.x, self.x.q.len());
        let resized = |rows: &mut Vec<f32>, len: usize| {
            rows.clear();
            rows.resize(len, 0.0);
        };
        let last = plan.stages.len() - 1;
        let options = &plan.stages[last];
        resized(d_rows, queries * options.value_dim);
        resized(d_norms, if options.norm { queries } else { 0 });
        if last > 0 || variant.finishes() {
            let (reads, chunk) = stages.run(variant, plan, x, &mut self.memory.to_vec());
            variant.pull_finish(x, chunk, reads, self.d_out, [d_rows, d_norms], to);
        } else {
            fill(variant, plan, x, &mut self.memory[plan.matrices_len()..].to_vec(), &mut stages.chunks[0]);
            d_rows.iter_mut().zip(self.d_out).for_each(|(d_row, d)| *d_row = options.scale * d);
        }
        let first = plan.stages[0].state_len();
        if last > 0 {
            let (state, d_state) = (&self.memory[first..plan.matrices_len()], &mut d_matrices[first..]);
            let piece = stages.chunks[last].piece(options);
            stages.engines[last].backward(x.isa, piece, state, [d_rows, d_norms], d_state, &mut grads[last]);
            let o = &plan.stages[0];
            resized(d_rows, queries * o.value_dim);
            resized(&mut gained.v, stages.chunks[0].v.len());
            resized(&mut gained.log_decay, stages.chunks[0].log_decay.len());
            variant.pull_refill(&stages.chunks[last], &grads[last], d_rows, gained, to);
            d_rows.iter_mut().for_each(|d| *d *= o.scale);
            d_norms.clear();
        }
        let piece = piece(&stages.chunks[0], plan, x, variant.given());
        let (state, d_state) = (&self.memory[..first], &mut d_matrices[..first]);
        grads[0].bonus.clear();
        stages.engines[0].backward(x.isa, piece, state, [d_rows, d_norms], d_state, &mut grads[0]);
        if last > 0 {
            let gained = [(&mut grads[0].v, &gained.v), (&mut grads[0].log_decay, &gained.log_decay)];
            gained.into_iter().for_each(|(d, more)| d.iter_mut().zip(more).for_each(|(d, more)| *d += more));
        }
        variant.pull(x, &stages.chunks[0], &grads[0], self.d_out, to);
    }
}
