//! All heads of a problem: each a task of its own, chunk by chunk.

use super::attend::{Direct, pauses};
use super::columns::{self, Left, Track};
use super::head::{HeadRows, Stages, Step, Wanted, Widened, blind, chunk_len, extra_range, steps};
use super::inputs::{Inputs, Sizes};
use super::memory::Memory;
use super::sums;
use super::variant::{AnyVariant, Plan, Reads, Tokens};
use super::{Chunk, RECURRENT_LEN};
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::prefetch;
use attn_core::view::RowsMut;
use attn_core::{AttnError, DType, Element, OutMut, Result, ViewMut};
use std::ops::Range;

/// Below this many FLOPs waking other threads costs more than it gives.
const SERIAL_FLOPS: u64 = 1 << 20;

/// Sizes and plan of a call, checked.
pub(super) fn prepare(variant: &dyn AnyVariant, x: &Inputs<'_>) -> Result<(Sizes, Plan)> {
    let sizes = x.sizes(variant.name(), variant.extras())?;
    let plan = variant.plan(&sizes)?;
    plan.stages.iter().try_for_each(super::Options::check)?;
    variant.check_inputs(x)?;
    if !variant.crosses() && sizes.keys != sizes.tokens * plan.keys_per_token {
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
pub(crate) fn sequences(cu_seqlens: Option<&[usize]>, tokens: usize) -> Result<Vec<Range<usize>>> {
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

/// Refuses a memory together with queries that stand before it.
pub(super) fn check_blind(variant: &dyn AnyVariant, plan: &Plan, sizes: &Sizes) -> Result<()> {
    if blind(plan, sizes.tokens, sizes.keys) == 0 {
        return Ok(());
    }
    let what = format!("a state with {} queries for {} keys", sizes.tokens, sizes.keys);
    Err(AttnError::unsupported(variant.name(), what))
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
    if cuts.len() != 1 && sizes.keys != sizes.tokens * plan.keys_per_token {
        let expected = format!("{} (as many as queries) in packed sequences", sizes.tokens);
        return Err(AttnError::shape("k", "n_kv", sizes.keys, expected));
    }
    if let Some(memory) = &memory {
        memory.check(&plan, &packed)?;
        check_blind(variant, &plan, &sizes)?;
    }
    let call = Call { variant, x, sizes: &sizes, packed: &packed, plan: &plan, cuts: &cuts };
    match out {
        OutMut::F32(out) => call.run(out, memory),
        OutMut::Bf16(out) => call.run(out, memory),
        OutMut::F16(out) => call.run(out, memory),
    }
}

pub(super) struct Call<'a> {
    pub(super) variant: &'a dyn AnyVariant,
    x: &'a Inputs<'a>,
    pub(super) sizes: &'a Sizes,
    /// The memory's.
    packed: &'a Sizes,
    pub(super) plan: &'a Plan,
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
        // An output without rows has no blocks, yet keys change the memory.
        let apart = self.apart();
        let pieces = if apart.steps.is_empty() { self.cuts.to_vec() } else { apart.groups() };
        let outs = pieces.len() / n;
        let mut blocks = out.into_cuts(pieces);
        let tasks = (0..sizes.batch * sizes.heads * n).map(|at| {
            let (batch, head, sequence) = (at / n / sizes.heads, at / n % sizes.heads, at % n);
            let tokens = self.cuts[sequence].clone();
            let per = plan.keys_per_token;
            let keys = if n == 1 { 0..sizes.keys } else { tokens.start * per..tokens.end * per };
            let rows = [&q, &k, &v].map(|view| view.head(batch, head / (sizes.heads / view.shape()[1])));
            let whole = Step { tokens: tokens.clone(), keys: keys.clone() };
            let mut extras = self.x.head_extras(sizes.heads, batch, head);
            for (name, rows) in &mut extras {
                *rows = rows.slice(extra_range(self.variant.extras(), name, rows.len(), &whole));
            }
            let memory = memories[(batch * n + sequence) * sizes.heads + head].take().unwrap_or_default();
            let [q, k, v] = rows;
            let rows =
                HeadRows { q: q.slice(tokens), k: k.slice(keys.clone()), v: v.slice(keys), head, extras };
            Head { rows, memory, outs: blocks.by_ref().take(outs).map(|block| block.out).collect() }
        });
        let mut tasks: Vec<Head<'_, E>> = tasks.collect();
        let isa = Isa::current();
        let start = || self.workspace(E::DTYPE);
        let mut left = tasks.split_off(tasks.len() - apart.left.heads.min(tasks.len()));
        if tasks.is_empty() {
        } else if tasks.len() as u64 * plan.flops(sizes) < SERIAL_FLOPS {
            let mut workspace = start();
            tasks.into_iter().for_each(|task| task.run(self, isa, &mut workspace));
        } else {
            for_each_task(tasks.into_iter(), start, |workspace, task| task.run(self, isa, workspace));
        }
        if !left.is_empty() {
            apart.run(self, isa, &mut left);
        }
        Ok(())
    }
}

impl Call<'_> {
    /// The heads that are left over, if their chunks or columns are to be done apart.
    fn apart(&self) -> Apart {
        let Self { sizes, plan, .. } = *self;
        let len = chunk_len(plan, sizes);
        let (heads, threads) = (sizes.batch * sizes.heads, rayon::current_num_threads());
        let fit = columns::fit(plan) && self.cuts.len() == 1 && blind(plan, sizes.tokens, sizes.keys) == 0;
        let left = columns::left_over(&plan.stages[0], heads, sizes.tokens / len, threads);
        match left.filter(|_| fit && len > RECURRENT_LEN) {
            Some(left) => Apart { steps: steps(plan, len, sizes.tokens, sizes.keys).collect(), left },
            None => Apart { steps: Vec::new(), left: Left { heads: 0, parts: None } },
        }
    }

    /// Rows that may take what is read as it is: without a back end, and where they are f32.
    pub(super) fn direct<'o, E: Element>(&self, rows: &'o mut RowsMut<'_, E>) -> Option<Direct<'o>> {
        let o = self.plan.stages.last()?;
        let rows = rows.as_f32().filter(|_| Direct::takes(o) && !self.variant.finishes())?;
        Some(Direct { rows, scale: o.scale })
    }

    pub(super) fn workspace<'w>(&self, dtype: DType) -> Workspace<'w> {
        Workspace::new(self.plan, self.sizes, dtype)
    }
}

/// Heads whose chunks or columns are done apart, the last ones.
struct Apart {
    steps: Vec<Step>,
    left: Left,
}

impl Apart {
    /// The steps that are done by products, and the last one if it is too short for them.
    fn long(&self) -> (&[Step], &[Step]) {
        let short = self.steps.last().is_some_and(|last| last.tokens.len() <= RECURRENT_LEN);
        self.steps.split_at(self.steps.len() - usize::from(short))
    }

    /// The tokens of groups of steps, and those of a last step that is too short.
    fn groups(&self) -> Vec<Range<usize>> {
        let (long, short) = self.long();
        long.chunks(self.left.group())
            .chain(short.chunks(1))
            .map(|steps| steps[0].tokens.start..steps[steps.len() - 1].tokens.end)
            .collect()
    }

    fn run<'a, E: Element>(&self, call: &Call<'_>, isa: Isa, heads: &mut [Head<'a, E>]) {
        let (long, short) = self.long();
        let groups = long.len().div_ceil(self.left.group());
        let heads_and_outs = heads.iter_mut().map(|head| {
            let outs: Vec<_> = head.outs.drain(..groups.min(head.outs.len())).collect();
            (&head.rows, outs, &mut *head.memory)
        });
        match self.left.parts {
            Some(parts) => {
                let track = |(rows, outs, memory)| Track::new(call, rows, outs, memory, parts);
                columns::run(call, isa, long, heads_and_outs.map(track).collect());
            }
            None => {
                let track = |(rows, outs, memory)| (sums::Track::new(rows, memory), outs);
                sums::run(call, isa, long, heads_and_outs.map(track).collect());
            }
        }
        for head in heads {
            for (step, out) in short.iter().zip(&mut head.outs) {
                let mut w = call.workspace(E::DTYPE);
                let x = head.rows.tokens(isa, call.variant, call.sizes, step, &mut w.wide);
                let wanted = Wanted::Reads;
                let (reads, chunk) =
                    w.stages.run(call.variant, call.plan, &x, head.memory, wanted, None, &mut || {});
                store(call, isa, &x, chunk, reads, &mut w.out, 0..step.tokens.len(), out);
            }
        }
    }
}

/// A thread's buffers.
pub(super) struct Workspace<'a> {
    pub(super) stages: Stages,
    pub(super) wide: Widened<'a>,
    pub(super) out: Vec<f32>,
    /// What has been read, where columns are done apart.
    pub(super) state: Vec<f32>,
}

impl Workspace<'_> {
    fn new(plan: &Plan, sizes: &Sizes, dtype: DType) -> Self {
        let mut stages = Stages::new(plan, sizes);
        if let [engine] = &mut stages.engines[..] {
            // Threads take the heads in turn.
            let turns = rayon::current_num_threads().min(sizes.batch * sizes.heads);
            engine.to_next = turns * plan.memory_len();
        }
        Self {
            stages,
            wide: Widened::new(plan, sizes, dtype != DType::F32),
            out: vec![0.0; chunk_len(plan, sizes) * sizes.head_dim_v],
            state: Vec::new(),
        }
    }

    /// Bytes of [`Workspace::new`].
    pub(super) fn bytes(plan: &Plan, sizes: &Sizes, dtype: DType) -> u64 {
        let len = chunk_len(plan, sizes);
        let keys = len * plan.keys_per_token;
        let wide = len * sizes.head_dim + keys * (sizes.head_dim + sizes.head_dim_v);
        let wide = if dtype == DType::F32 { 0 } else { wide };
        (Stages::bytes(plan, sizes) + 4 * (wide + len * sizes.head_dim_v)) as u64
    }
}

/// One head's task.
struct Head<'a, E> {
    rows: HeadRows<'a, E>,
    memory: &'a mut [f32],
    /// The whole output, or its groups of steps; none without rows.
    outs: Vec<RowsMut<'a, E>>,
}

impl<'a, E: Element> Head<'a, E> {
    fn run(self, call: &Call<'_>, isa: Isa, w: &mut Workspace<'a>) {
        let Self { rows, memory, outs } = self;
        let Call { variant, sizes, plan, .. } = *call;
        let mut outs = outs.into_iter();
        let (mut out, mut first) = (outs.next(), 0);
        let (tokens, keys) = (rows.q.len(), rows.k.len());
        if let Some(out) = &mut out {
            (0..blind(plan, tokens, keys)).for_each(|i| out.row_mut(i).fill(E::ZERO));
        }
        let len = chunk_len(plan, sizes);
        let parts = plan.stages.last().map_or(1, |o| pauses(o, len));
        let mut steps = steps(plan, len, tokens, keys).peekable();
        while let Some(step) = steps.next() {
            let x = rows.tokens(isa, variant, sizes, &step, &mut w.wide);
            let mut next = steps.peek().map(|next| rows.ahead(next, parts));
            while let Some(done) =
                out.take_if(|out| step.tokens.start - first >= out.len() && !outs.as_slice().is_empty())
            {
                first += done.len();
                out = outs.next();
            }
            let tokens = step.tokens.start - first..step.tokens.end - first;
            let (mut these, mut later) = match &mut out {
                Some(out) => {
                    let rows = out.len();
                    let (these, later) = out.rows_mut(tokens.start.min(rows)..rows).split_at(tokens.len());
                    (Some(these), Some(later))
                }
                None => (None, None),
            };
            let mut coming = 0..later.as_ref().map_or(0, |later| later.len().min(len));
            let mut ahead = || {
                if let Some(next) = &mut next {
                    next.fetch();
                }
                if let Some(later) = &mut later {
                    coming.by_ref().take(len.div_ceil(parts)).for_each(|i| prefetch(later.row_mut(i)));
                }
            };
            let direct = these.as_mut().and_then(|these| call.direct(these));
            let (reads, chunk) = w.stages.run(variant, plan, &x, memory, Wanted::Reads, direct, &mut ahead);
            if let Some(out) = these.as_mut().filter(|_| !reads.rows.is_empty()) {
                store(call, isa, &x, chunk, reads, &mut w.out, 0..tokens.len(), out);
            }
        }
    }
}

/// Stores what the tokens of a step have read, behind the back end, to these rows of the output.
#[allow(clippy::too_many_arguments)]
pub(super) fn store<E: Element>(
    call: &Call<'_>,
    isa: Isa,
    x: &Tokens<'_>,
    chunk: &Chunk,
    reads: Reads<'_>,
    finished: &mut [f32],
    rows: Range<usize>,
    out: &mut RowsMut<'_, E>,
) {
    if !call.variant.finishes() {
        return isa.run(Store { reads, rows, out });
    }
    let done = &mut finished[..rows.len() * call.sizes.head_dim_v];
    call.variant.finish(x, chunk, reads, done);
    isa.run(Store { reads: Reads { rows: done, norms: &[], scale: 1.0 }, rows, out });
}

/// Scales, rounds and stores what some rows have read.
pub(super) struct Store<'a, 'o, E> {
    pub(super) reads: Reads<'a>,
    pub(super) rows: Range<usize>,
    pub(super) out: &'a mut RowsMut<'o, E>,
}

impl<E: Element> SimdOp for Store<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { reads, rows, out } = self;
        for (i, read) in rows.zip(reads.rows.chunks_exact(out.width().max(1))) {
            out.row_mut(i).iter_mut().zip(read).for_each(|(o, x)| *o = E::store(reads.scale * x));
        }
    }
}
