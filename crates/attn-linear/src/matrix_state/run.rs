//! All heads of a problem: each a task of its own, chunk by chunk.

use super::inputs::{Inputs, Sizes};
use super::memory::Memory;
use super::variant::{Plan, AnyVariant, Tokens};
use super::{Chunk, Engine, naive};
use attn_core::exact::Reference;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::widen;
use attn_core::view::{Rows, RowsMut};
use attn_core::{AttnError, DType, Element, OutMut, Result, ViewMut};
use std::ops::Range;

/// Below this many FLOPs waking other threads costs more than it gives.
const SERIAL_FLOPS: u64 = 1 << 20;

/// Sizes and plan of a call, checked.
pub(super) fn prepare(variant: &dyn AnyVariant, x: &Inputs<'_>) -> Result<(Sizes, Plan)> {
    let sizes = x.sizes(variant.name(), variant.extras())?;
    let plan = variant.plan(&sizes)?;
    plan.stages.iter().try_for_each(super::Options::check)?;
    if sizes.keys != sizes.tokens * plan.keys_per_token {
        let expected = format!(
            "{} ({} for each of {} queries)",
            sizes.tokens * plan.keys_per_token,
            plan.keys_per_token,
            sizes.tokens
        );
        return Err(AttnError::shape("k", "n_kv", sizes.keys, expected));
    }
    Ok((sizes, plan))
}

/// Ranges of the tokens of packed sequences, from the prefix sums of their lengths; one sequence without them.
fn sequences(cu_seqlens: Option<&[usize]>, tokens: usize) -> Result<Vec<Range<usize>>> {
    let Some(sums) = cu_seqlens else { return Ok(std::iter::once(0..tokens).collect()) };
    let fits = sums.first() == Some(&0) && sums.last() == Some(&tokens) && sums.is_sorted();
    if fits {
        return Ok(sums.windows(2).map(|pair| pair[0]..pair[1]).collect());
    }
    Err(AttnError::value("cu_seqlens", format!("{sums:?}"), format!("rising from 0 to the {tokens} tokens")))
}

/// Sizes of the memory of packed sequences: each is a batch entry of its own.
pub(super) fn packed_sizes(sizes: &Sizes, cu_seqlens: Option<&[usize]>) -> Result<Sizes> {
    let sequences = sequences(cu_seqlens, sizes.tokens)?.len();
    Ok(Sizes { batch: sizes.batch * sequences, ..sizes.clone() })
}

/// Runs `x`; `memory` is that before the first token, and afterwards that after the last, of every sequence.
pub(super) fn forward(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    cu_seqlens: Option<&[usize]>,
    out: OutMut<'_>,
    memory: Option<&mut Memory>,
) -> Result<()> {
    let (sizes, plan) = prepare(variant, x)?;
    let cuts = sequences(cu_seqlens, sizes.tokens)?;
    let packed = packed_sizes(&sizes, cu_seqlens)?;
    let wanted = [sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim_v];
    for (a, axis) in ["batch", "n_heads_q", "n_q", "head_dim_v"].into_iter().enumerate() {
        if out.shape()[a] != wanted[a] {
            return Err(AttnError::shape("out", axis, out.shape()[a], wanted[a]));
        }
    }
    if out.dtype() != x.q.dtype() {
        let (found, expected) = (out.dtype().to_string(), format!("{} (as in q)", x.q.dtype()));
        return Err(AttnError::DType { tensor: "out".into(), found, expected });
    }
    if let Some(memory) = &memory {
        memory.check(&plan, &packed)?;
    }
    let call = Call { variant, x, sizes: &sizes, packed: &packed, plan: &plan, cuts: &cuts };
    match out {
        OutMut::F32(out) => call.run(out, memory),
        OutMut::Bf16(out) => call.run(out, memory),
        OutMut::F16(out) => call.run(out, memory),
    }
}

/// Tokens that the chunks of a problem hold at most.
pub(super) fn chunk_len(plan: &Plan, tokens: usize) -> usize {
    plan.stages.iter().map(|o| o.chunk_len).min().unwrap_or(1).min(tokens.max(1))
}

struct Call<'a> {
    variant: &'a dyn AnyVariant,
    x: &'a Inputs<'a>,
    sizes: &'a Sizes,
    /// The memory's.
    packed: &'a Sizes,
    plan: &'a Plan,
    /// Tokens of the sequences.
    cuts: &'a [Range<usize>],
}

impl Call<'_> {
    fn run<E: Element>(&self, out: ViewMut<'_, E>, memory: Option<&mut Memory>) -> Result<()> {
        let (sizes, plan) = (self.sizes, self.plan);
        let typed = |name: &str, view| {
            E::untag(view).ok_or_else(|| AttnError::DType {
                tensor: name.into(),
                found: view.dtype().to_string(),
                expected: E::DTYPE.to_string(),
            })
        };
        let (q, k, v) = (typed("q", self.x.q)?, typed("k", self.x.k)?, typed("v", self.x.v)?);
        let mut none;
        let memory = match memory {
            Some(memory) => memory,
            None => {
                none = Memory::new(plan, self.packed);
                &mut none
            }
        };
        // Blocks come batch by batch, head by head, sequence by sequence; memories sequence by sequence, head by head.
        let n = self.cuts.len();
        let mut memories: Vec<_> = memory.heads_mut().map(Some).collect();
        let blocks = out.into_cuts(self.cuts.to_vec()).enumerate();
        let tasks = blocks.map(|(at, block)| {
            let (batch, head, sequence) = (block.batch, block.head, at % n);
            let tokens = self.cuts[sequence].clone();
            let keys = tokens.start * plan.keys_per_token..tokens.end * plan.keys_per_token;
            let rows = [&q, &k, &v].map(|view| view.head(batch, head / (sizes.heads / view.shape()[1])));
            let [q, k, v] = rows;
            let mut extras = Vec::new();
            cut_extras(&self.x.head_extras(sizes.heads, batch, head), sizes, &tokens, &keys, &mut extras);
            let memory = memories[(batch * n + sequence) * sizes.heads + head].take().unwrap_or_default();
            let (q, k, v) = (q.slice(tokens), k.slice(keys.clone()), v.slice(keys));
            Head { q, k, v, head, extras, memory, out: block.out }
        });
        let tasks: Vec<Head<'_, E>> = tasks.collect();
        let isa = Isa::current();
        let start = || Workspace::new(plan, sizes, E::DTYPE);
        let run =
            |w: &mut Workspace, head: Head<'_, E>| head.run(self.variant, self.sizes, self.plan, isa, w);
        let flops: u64 = plan.stages.iter().map(|o| o.flops(sizes.tokens)).sum();
        if tasks.len() as u64 * flops < SERIAL_FLOPS {
            let mut workspace = start();
            tasks.into_iter().for_each(|task| run(&mut workspace, task));
        } else {
            for_each_task(tasks.into_iter(), start, run);
        }
        Ok(())
    }
}

/// A thread's buffers.
pub(super) struct Workspace {
    engines: Vec<Engine>,
    chunks: Vec<Chunk>,
    /// Half types widened: q, k, v.
    wide: [Vec<f32>; 3],
    reads: Vec<f32>,
    out: Vec<f32>,
}

impl Workspace {
    fn new(plan: &Plan, sizes: &Sizes, dtype: DType) -> Self {
        let len = chunk_len(plan, sizes.tokens);
        let keys = len * plan.keys_per_token;
        let wide = |len: usize| vec![0.0; if dtype == DType::F32 { 0 } else { len }];
        Self {
            engines: plan.stages.iter().map(|o| Engine::new(o, len)).collect(),
            chunks: plan.stages.iter().map(|o| Chunk::new(o, len)).collect(),
            wide: [wide(len * sizes.head_dim), wide(keys * sizes.head_dim), wide(keys * sizes.head_dim_v)],
            reads: Vec::new(),
            out: vec![0.0; len * sizes.head_dim_v],
        }
    }

    /// Bytes of [`Workspace::new`].
    pub(super) fn bytes(plan: &Plan, sizes: &Sizes, dtype: DType) -> u64 {
        let len = chunk_len(plan, sizes.tokens);
        let keys = len * plan.keys_per_token;
        let wide = len * sizes.head_dim + keys * (sizes.head_dim + sizes.head_dim_v);
        let wide = if dtype == DType::F32 { 0 } else { wide };
        let engines: usize = plan.stages.iter().map(|o| Engine::bytes(o, len) + 4 * len * o.value_dim).sum();
        (engines + 4 * (wide + len * sizes.head_dim_v)) as u64
    }
}

/// One head's task.
struct Head<'a, E> {
    q: Rows<'a, E>,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
    head: usize,
    extras: Vec<(&'static str, Rows<'a, f32>)>,
    memory: &'a mut [f32],
    out: RowsMut<'a, E>,
}

impl<E: Element> Head<'_, E> {
    fn run(self, variant: &dyn AnyVariant, sizes: &Sizes, plan: &Plan, isa: Isa, w: &mut Workspace) {
        let Self { q, k, v, head, extras, memory, mut out } = self;
        let (len, per) = (chunk_len(plan, sizes.tokens), plan.keys_per_token);
        let own = Sizes { tokens: q.len(), keys: k.len(), ..sizes.clone() };
        let (matrices, carry) = memory.split_at_mut(plan.matrices_len());
        let mut pieces = Vec::with_capacity(extras.len());
        for first in (0..own.tokens).step_by(len) {
            let tokens = first..(first + len).min(own.tokens);
            let keys = tokens.start * per..tokens.end * per;
            cut_extras(&extras, &own, &tokens, &keys, &mut pieces);
            let [wide_q, wide_k, wide_v] = &mut w.wide;
            let x = Tokens {
                q: load(isa, q.slice(tokens.clone()), wide_q),
                k: load(isa, k.slice(keys.clone()), wide_k),
                v: load(isa, v.slice(keys), wide_v),
                head,
                heads: sizes.heads,
                extras: &pieces,
            };
            let mut matrices = &mut *matrices;
            for (stage, options) in plan.stages.iter().enumerate() {
                let (before, these) = w.chunks.split_at_mut(stage);
                let chunk = &mut these[0];
                chunk.resize(options, tokens.len());
                match before.last() {
                    None => variant.fill(&x, carry, chunk),
                    Some(first) => variant.refill(&x, first, &w.reads, chunk),
                }
                let (matrix, rest) = std::mem::take(&mut matrices).split_at_mut(options.state_len());
                matrices = rest;
                if let Some(recurrence) = variant.recurrence() {
                    recurrence.run(isa, options, chunk, matrix, &mut w.reads);
                    w.reads.iter_mut().for_each(|read| *read *= options.scale);
                    continue;
                }
                let reads = w.engines[stage].run(isa, chunk, matrix);
                w.reads.clear();
                w.reads.extend(reads.iter().map(|read| options.scale * read));
            }
            let done = &mut w.out[..tokens.len() * sizes.head_dim_v];
            if let Some(chunk) = w.chunks.last() {
                variant.finish(&x, chunk, &w.reads, done);
            }
            for (i, row) in tokens.zip(done.chunks_exact(sizes.head_dim_v)) {
                out.row_mut(i).iter_mut().zip(row).for_each(|(o, x)| *o = E::store(*x));
            }
        }
    }
}

/// The rows of each extra input that belong to some tokens.
pub(super) fn cut_extras<'a>(
    extras: &[(&'static str, Rows<'a, f32>)],
    sizes: &Sizes,
    tokens: &Range<usize>,
    keys: &Range<usize>,
    pieces: &mut Vec<(&'static str, Rows<'a, f32>)>,
) {
    pieces.clear();
    for (name, rows) in extras {
        let range = if rows.len() == sizes.tokens { tokens } else { keys };
        pieces.push((name, rows.slice(range.clone())));
    }
}

/// Rows as f32: in place where they are that already.
pub(super) fn load<'a, E: Element>(isa: Isa, rows: Rows<'a, E>, wide: &'a mut [f32]) -> Rows<'a, f32> {
    struct Widen<'a, E>(Rows<'a, E>, &'a mut [f32]);
    impl<E: Element> SimdOp for Widen<'_, E> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, _: S) {
            widen(self.0, self.1);
        }
    }
    let (len, width) = (rows.len(), rows.width());
    match E::as_f32(rows.data()) {
        Some(data) => Rows::new(data, len, width, rows.stride()),
        None => {
            let wide = &mut wide[..len * width];
            isa.run(Widen(rows, wide));
            Rows::new(wide, len, width, width)
        }
    }
}

/// The definition: the variant's front end and back end around the recurrence in f64 over the whole sequence.
pub(super) fn definition(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    memory: Option<&Memory>,
) -> Result<Reference> {
    let (sizes, plan) = prepare(variant, x)?;
    let mut memory = memory.cloned().unwrap_or_else(|| Memory::new(&plan, &sizes));
    memory.check(&plan, &sizes)?;
    let heads = (0..sizes.batch).flat_map(|batch| (0..sizes.heads).map(move |head| (batch, head)));
    let mut out = Vec::new();
    for ((batch, head), memory) in heads.zip(memory.heads_mut()) {
        let rows = |view: &attn_core::TensorView<'_>| {
            let own = head / (sizes.heads / view.shape()[1]);
            view.head_f64(batch, own).iter().map(|x| *x as f32).collect::<Vec<_>>()
        };
        let (q, k, v) = (rows(&x.q), rows(&x.k), rows(&x.v));
        let extras = x.head_extras(sizes.heads, batch, head);
        let tokens = Tokens {
            q: Rows::new(&q, sizes.tokens, sizes.head_dim, sizes.head_dim),
            k: Rows::new(&k, sizes.keys, sizes.head_dim, sizes.head_dim),
            v: Rows::new(&v, sizes.keys, sizes.head_dim_v, sizes.head_dim_v),
            head,
            heads: sizes.heads,
            extras: &extras,
        };
        let (mut matrices, carry) = memory.split_at_mut(plan.matrices_len());
        let (mut reads, mut chunk) = (Vec::new(), Chunk::default());
        for (stage, options) in plan.stages.iter().enumerate() {
            let first = std::mem::replace(&mut chunk, Chunk::new(options, sizes.tokens));
            if stage == 0 {
                variant.fill(&tokens, carry, &mut chunk);
            } else {
                variant.refill(&tokens, &first, &reads, &mut chunk);
            }
            let (matrix, rest) = std::mem::take(&mut matrices).split_at_mut(options.state_len());
            let initial: Vec<f64> = matrix.iter().map(|s| f64::from(*s)).collect();
            matrices = rest;
            let wide = match variant.recurrence() {
                None => naive::recurrence(options, &chunk, &initial).out,
                Some(recurrence) => {
                    let (mut state, mut reads) = (initial, Vec::new());
                    recurrence.run(Isa::Portable, options, &chunk, &mut state, &mut reads);
                    reads.iter().map(|read| f64::from(options.scale) * read).collect()
                }
            };
            reads = wide.iter().map(|x| *x as f32).collect();
        }
        let mut done = vec![0.0; sizes.tokens * sizes.head_dim_v];
        variant.finish(&tokens, &chunk, &reads, &mut done);
        out.extend(done.into_iter().map(f64::from));
    }
    Ok(Reference { out, lse: None })
}
