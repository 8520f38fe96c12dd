//! Gradients of a whole problem: each head a task, its chunks backwards.
//!
//! The memories at the start of every segment of chunks are kept, those between them are computed again, without reads, when
//! the segment's turn comes. A segment is as long as [`KEPT`] numbers last: up to that the past is computed once.

use super::Chunk;
use super::head::{
    HeadRows, Stages, Step, Wanted, Widened, blind, chunk_len, extra_range, fill, piece, steps,
};
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

/// Numbers of a segment's memories, about.
const KEPT: usize = 1 << 20;
/// A segment has at least so many chunks.
const MIN_SEGMENT: usize = 16;

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
struct HeadGradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    extras: Vec<&'a mut [f32]>,
}

/// The gradients of one input of this shape, a share for every output head.
struct Shares<'a> {
    shape: [usize; 4],
    heads: usize,
    /// `[batch, output heads, length, width]`, unless they are the input's heads and go straight to where they are wanted.
    data: Vec<f32>,
    to: Option<&'a mut [f32]>,
}

impl<'a> Shares<'a> {
    fn new(shape: [usize; 4], heads: usize, to: Option<&'a mut [f32]>) -> Self {
        let straight = to.is_some() && shape[1] == heads;
        let len = if straight { 0 } else { shape[0] * heads * shape[2] * shape[3] };
        Self { shape, heads, data: vec![0.0; len], to }
    }

    /// Each output head's; without end, and empty where they have no numbers.
    fn heads_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let one = (self.shape[2] * self.shape[3]).max(1);
        let all = match &mut self.to {
            Some(to) if self.shape[1] == self.heads => &mut **to,
            _ => &mut self.data,
        };
        all.chunks_exact_mut(one).chain(std::iter::repeat_with(Default::default))
    }

    /// Summed over the output heads that share one of the input's; `None` where they have gone to where they are wanted.
    fn sum(self) -> Option<Vec<f32>> {
        let Self { shape: [batch, own, length, width], heads, data, to } = self;
        let one = length * width;
        if own == heads || one == 0 {
            return if to.is_some() { None } else { Some(data) };
        }
        let mut summed = if to.is_some() { Vec::new() } else { vec![0.0; batch * own * one] };
        let given = to.is_some();
        let all = match to {
            Some(to) => {
                to.fill(0.0);
                to
            }
            None => &mut summed,
        };
        for (at, share) in data.chunks_exact(one).enumerate() {
            let head = at / heads * own + at % heads / (heads / own);
            all[head * one..][..one].iter_mut().zip(share).for_each(|(all, d)| *all += d);
        }
        (!given).then_some(summed)
    }
}

/// Computes the gradients, given that of the output and, where it matters, that of the memory after the last token.
pub(super) fn backward(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    memory: Option<&Memory>,
    d_out: TensorView<'_>,
    d_memory: Option<&[f32]>,
) -> Result<Gradients> {
    backward_into(variant, x, memory, d_out, d_memory, [None, None, None])
}

/// [`backward`], with those of q, k and v written to `to` where it is given, and then not told.
pub(super) fn backward_into(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    memory: Option<&Memory>,
    d_out: TensorView<'_>,
    d_memory: Option<&[f32]>,
    to: [Option<&mut [f32]>; 3],
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
    let shares = match (x.q, d_out) {
        (TensorView::F32(_), TensorView::F32(d)) => call.run(d, &mut initial, &mut d_initial, to)?,
        (TensorView::Bf16(_), TensorView::Bf16(d)) => call.run(d, &mut initial, &mut d_initial, to)?,
        (TensorView::F16(_), TensorView::F16(d)) => call.run(d, &mut initial, &mut d_initial, to)?,
        (q, d) => {
            let (found, expected) = (d.dtype().to_string(), format!("{} (as in q)", q.dtype()));
            return Err(AttnError::DType { tensor: "grad_out".into(), found, expected });
        }
    };
    let inputs = call.gather(shares)?;
    Ok(Gradients { inputs, memory: d_initial })
}

struct Call<'a> {
    variant: &'a dyn AnyVariant,
    x: &'a Inputs<'a>,
    sizes: &'a Sizes,
    plan: &'a Plan,
}

impl Call<'_> {
    fn run<'t, E: Element>(
        &self,
        d_out: View<'_, E>,
        initial: &mut Memory,
        d_initial: &mut [f32],
        to: [Option<&'t mut [f32]>; 3],
    ) -> Result<Vec<Shares<'t>>> {
        let sizes = self.sizes;
        let typed = |name: &str, view| {
            E::untag(view).ok_or_else(|| AttnError::DType {
                tensor: name.into(),
                found: view.dtype().to_string(),
                expected: E::DTYPE.to_string(),
            })
        };
        let (q, k, v) = (typed("q", self.x.q)?, typed("k", self.x.k)?, typed("v", self.x.v)?);
        let extras = self.x.extra_shapes().map(|(_, shape)| shape);
        let shapes = [q.shape(), k.shape(), v.shape()].into_iter().chain(extras);
        let to = to.into_iter().chain(std::iter::repeat_with(|| None));
        let mut all: Vec<_> = shapes.zip(to).map(|(shape, to)| Shares::new(shape, sizes.heads, to)).collect();
        let mut shares: Vec<_> = all.iter_mut().map(Shares::heads_mut).collect();
        let heads = (0..sizes.batch).flat_map(|batch| (0..sizes.heads).map(move |head| (batch, head)));
        let memories = initial.heads_mut().zip(d_initial.chunks_exact_mut(self.plan.memory_len()));
        let tasks = heads.zip(memories).map(|((batch, head), (memory, d_memory))| {
            let rows = [&q, &k, &v].map(|view| view.head(batch, head / (sizes.heads / view.shape()[1])));
            let [q, k, v] = rows;
            let extras = self.x.head_extras(sizes.heads, batch, head);
            let rows = HeadRows { q, k, v, head, extras };
            let mut grads = shares.iter_mut().map(|heads| heads.next().unwrap_or_default());
            let [q, k, v] = [0; 3].map(|_| grads.next().unwrap_or_default());
            let grads = HeadGradients { q, k, v, extras: grads.collect() };
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
            d_out: Vec::new(),
            memories: Vec::new(),
        };
        for_each_task(tasks.into_iter(), start, |workspace, head| head.run(self, isa, workspace));
        drop(shares);
        Ok(all)
    }

    /// The gradients by name.
    fn gather(&self, shares: Vec<Shares<'_>>) -> Result<NamedTensors> {
        let mut inputs = NamedTensors::default();
        let mut keep = |name: &str, shape: &[usize], data: Vec<f32>| -> Result<()> {
            inputs.0.insert(name.into(), NamedTensor::f32(name, shape, data)?);
            Ok(())
        };
        let extras = self.x.extra_shapes().map(|(name, _)| name);
        for (name, shares) in ["q", "k", "v"].into_iter().chain(extras).zip(shares) {
            let shape = shares.shape;
            let Some(data) = shares.sum() else { continue };
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
    /// Of a step's output.
    d_out: Vec<f32>,
    /// A segment's, each before its step.
    memories: Vec<f32>,
}

/// One head's task.
struct Head<'a, E> {
    rows: HeadRows<'a, E>,
    d_out: Rows<'a, E>,
    memory: &'a mut [f32],
    d_memory: &'a mut [f32],
    grads: HeadGradients<'a>,
}

impl<'a, E: Element> Head<'a, E> {
    fn run(self, call: &Call<'_>, isa: Isa, w: &mut Workspace<'a>) {
        let Call { variant, sizes, plan, .. } = *call;
        let Self { rows, d_out, memory, d_memory, mut grads } = self;
        let steps: Vec<_> = steps(plan, chunk_len(plan, sizes), sizes.tokens, sizes.keys).collect();
        let numbers = memory.len();
        let cut = |range: &Range<usize>, width: usize| range.start * width..range.end * width;
        // Where they are wanted anything may stand; each row below belongs to one step.
        grads.q[cut(&(0..blind(plan, sizes.tokens, sizes.keys)), sizes.head_dim)].fill(0.0);
        let absorb = |step: &Step, memory: &mut [f32], stages: &mut Stages, wide: &mut Widened<'a>| {
            let x = rows.tokens(isa, variant, sizes, step, wide);
            stages.run(variant, plan, &x, memory, Wanted::State, None, &mut || {});
        };
        let segment = (KEPT / numbers.max(1)).max(MIN_SEGMENT);
        // Memories at the start of the segments.
        let all = steps.len();
        let mut kept = Vec::new();
        for steps in steps.chunks(segment) {
            kept.push(memory.to_vec());
            // The last segment's memories are computed once.
            if kept.len() * segment < all {
                steps.iter().for_each(|step| absorb(step, memory, &mut w.stages, &mut w.wide));
            }
        }
        for (segment, mut memory) in steps.chunks(segment).zip(kept).rev() {
            w.memories.resize(segment.len() * numbers, 0.0);
            for (at, step) in segment.iter().enumerate() {
                w.memories[at * numbers..][..numbers].copy_from_slice(&memory);
                if at + 1 < segment.len() {
                    absorb(step, &mut memory, &mut w.stages, &mut w.wide);
                }
            }
            for (at, step) in segment.iter().enumerate().rev() {
                let Workspace {
                    stages,
                    wide,
                    grads: chunks,
                    gained,
                    d_rows,
                    d_norms,
                    d_out: d_step,
                    memories,
                } = &mut *w;
                let memory = &memories[at * numbers..][..numbers];
                let x = rows.tokens(isa, variant, sizes, step, wide);
                d_step.clear();
                for i in step.tokens.clone() {
                    d_step.extend(d_out.row(i).iter().map(|d| d.load()));
                }
                let (d_matrices, d_carry) = d_memory.split_at_mut(plan.matrices_len());
                let HeadGradients { q, k, v, extras } = &mut grads;
                let extras = extras.iter_mut().zip(&rows.extras).map(|(grads, (name, rows))| {
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
                let back = Back { call, x: &x, memory, d_out: d_step };
                [&mut to.q, &mut to.k, &mut to.v].into_iter().for_each(|d| d.fill(0.0));
                back.run(stages, chunks, gained, [d_rows, d_norms], d_matrices, &mut to);
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
            let (reads, chunk) =
                stages.run(variant, plan, x, &mut self.memory.to_vec(), Wanted::Reads, None, &mut || {});
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
