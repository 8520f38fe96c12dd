//! Gradients of a whole problem: each head a task, its chunks backwards.
//!
//! The states at the start of every [`SEGMENT`] chunks are kept, those between them are computed again: memory beyond
//! the gradients is `key_dim value_dim / (SEGMENT chunk_len)` numbers a token and head.

use super::inputs::{Extra, Inputs, Per, Sizes};
use super::memory::Memory;
use super::run::{chunk_len, cut_extras, load, prepare};
use super::variant::{Plan, AnyVariant, Pull, Tokens};
use super::{Chunk, Engine};
use attn_core::parallel::for_each_task;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::simd::Isa;
use attn_core::view::Rows;
use attn_core::{AttnError, Element, Result, TensorView, View};
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
    if !variant.differentiable() || plan.stages.len() != 1 || plan.memory_len() != plan.matrices_len() {
        return Err(AttnError::unsupported(variant.name(), "gradients"));
    }
    let wanted = [sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim_v];
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if d_out.shape()[a] != wanted[a] {
            return Err(AttnError::shape("grad_out", axis, d_out.shape()[a], wanted[a]));
        }
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
        let tasks = heads.zip(memories).zip(&mut all).map(|(((batch, head), (state, d_state)), grads)| {
            let rows = [&q, &k, &v].map(|view| view.head(batch, head / (sizes.heads / view.shape()[1])));
            let [q, k, v] = rows;
            let extras = self.x.head_extras(sizes.heads, batch, head);
            let d_out = d_out.head(batch, head);
            Head { q, k, v, d_out, head, extras, state, d_state, grads }
        });
        let tasks: Vec<Head<'_, E>> = tasks.collect();
        let isa = Isa::current();
        let len = chunk_len(self.plan, sizes.tokens);
        let start = || Engine::new(&self.plan.stages[0], len);
        for_each_task(tasks.into_iter(), start, |engine, head| head.run(self, isa, engine));
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
            let per = self.variant.extras().iter().find(|extra: &&Extra| extra.name == name).map(|extra| extra.per);
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

/// One head's task.
struct Head<'a, E> {
    q: Rows<'a, E>,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
    d_out: Rows<'a, E>,
    head: usize,
    extras: Vec<(&'static str, Rows<'a, f32>)>,
    state: &'a mut [f32],
    d_state: &'a mut [f32],
    grads: &'a mut HeadGradients,
}

impl<E: Element> Head<'_, E> {
    fn run(mut self, call: &Call<'_>, isa: Isa, engine: &mut Engine) {
        let (sizes, options) = (call.sizes, &call.plan.stages[0]);
        let len = chunk_len(call.plan, sizes.tokens);
        let chunks: Vec<_> =
            (0..sizes.tokens).step_by(len).map(|first| first..(first + len).min(sizes.tokens)).collect();
        let mut chunk = Chunk::new(options, len);
        let mut wide = [
            vec![0.0; len * sizes.head_dim],
            vec![0.0; len * call.plan.keys_per_token * sizes.head_dim],
            vec![0.0; len * call.plan.keys_per_token * sizes.head_dim_v],
        ];
        // States at the start of the segments.
        let mut kept = Vec::new();
        for (at, tokens) in chunks.iter().enumerate() {
            if at % SEGMENT == 0 {
                kept.push(self.state.to_vec());
            }
            // The last segment's states are computed once.
            if at / SEGMENT < (chunks.len() - 1) / SEGMENT {
                self.with_tokens(call, isa, tokens, &mut wide, |x, _| {
                    call.variant.fill(x, &mut [], reset(&mut chunk, options, tokens.len()))
                });
                engine.run(isa, &chunk, self.state);
            }
        }
        let mut grads = Chunk::default();
        let mut d_reads = Vec::new();
        for (segment, start) in chunks.chunks(SEGMENT).zip(kept).rev() {
            let mut states = vec![start];
            for tokens in &segment[..segment.len() - 1] {
                self.with_tokens(call, isa, tokens, &mut wide, |x, _| {
                    call.variant.fill(x, &mut [], reset(&mut chunk, options, tokens.len()))
                });
                let mut state = states[states.len() - 1].clone();
                engine.run(isa, &chunk, &mut state);
                states.push(state);
            }
            for (tokens, state) in segment.iter().zip(&states).rev() {
                let mut d_out = Vec::with_capacity(tokens.len() * sizes.head_dim_v);
                tokens.clone().for_each(|i| d_out.extend(self.d_out.row(i).iter().map(|d| d.load())));
                let d_state = std::mem::take(&mut self.d_state);
                self.with_tokens(call, isa, tokens, &mut wide, |x, to| {
                    call.variant.fill(x, &mut [], reset(&mut chunk, options, tokens.len()));
                    d_reads.clear();
                    d_reads.extend(d_out.iter().map(|d| options.scale * d));
                    grads.bonus.clear();
                    engine.backward(isa, &chunk, state, &d_reads, d_state, &mut grads);
                    call.variant.pull(x, &chunk, &grads, &d_out, to);
                });
                self.d_state = d_state;
            }
        }
    }

    /// Calls `work` with some tokens and where their gradients go.
    fn with_tokens(
        &mut self,
        call: &Call<'_>,
        isa: Isa,
        tokens: &Range<usize>,
        wide: &mut [Vec<f32>; 3],
        work: impl FnOnce(&Tokens<'_>, &mut Pull<'_>),
    ) {
        let sizes = call.sizes;
        let per = call.plan.keys_per_token;
        let keys = tokens.start * per..tokens.end * per;
        let mut pieces = Vec::with_capacity(self.extras.len());
        cut_extras(&self.extras, sizes, tokens, &keys, &mut pieces);
        let [wide_q, wide_k, wide_v] = wide;
        let x = Tokens {
            q: load(isa, self.q.slice(tokens.clone()), wide_q),
            k: load(isa, self.k.slice(keys.clone()), wide_k),
            v: load(isa, self.v.slice(keys.clone()), wide_v),
            head: self.head,
            heads: sizes.heads,
            extras: &pieces,
        };
        let cut = |range: &Range<usize>, width: usize| range.start * width..range.end * width;
        let HeadGradients { q, k, v, extras } = &mut *self.grads;
        let extras = extras.iter_mut().zip(&self.extras).map(|(grads, (name, rows))| {
            let range = if rows.len() == sizes.tokens { tokens } else { &keys };
            (*name, &mut grads[cut(range, rows.width())])
        });
        let mut to = Pull {
            q: &mut q[cut(tokens, sizes.head_dim)],
            k: &mut k[cut(&keys, sizes.head_dim)],
            v: &mut v[cut(&keys, sizes.head_dim_v)],
            extras: extras.collect(),
        };
        work(&x, &mut to);
    }
}

/// `chunk` with room for `len` tokens.
fn reset<'a>(chunk: &'a mut Chunk, options: &super::Options, len: usize) -> &'a mut Chunk {
    chunk.resize(options, len);
    chunk
}
