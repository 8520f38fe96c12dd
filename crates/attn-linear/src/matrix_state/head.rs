//! One head, step by step: which tokens and keys go together, and the stages they pass.

use super::attend::{Ahead, Direct};
use super::inputs::{Extra, Per, Sizes};
use super::scratch::Prepared;
use super::variant::{AnyVariant, Given, Plan, Reads, Tokens, copy};
use super::{Chunk, Engine, Options, Piece};
use attn_core::Element;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{prefetch, widen};
use attn_core::view::Rows;
use std::ops::Range;

/// Some queries and the keys that come with them. Without queries the keys are absorbed, without keys the state is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) tokens: Range<usize>,
    pub(super) keys: Range<usize>,
}

/// Tokens that the chunks of a problem hold at most.
pub(super) fn chunk_len(plan: &Plan, sizes: &Sizes) -> usize {
    let most = sizes.tokens.max(sizes.keys / plan.keys_per_token).max(1);
    plan.stages.iter().map(|o| o.chunk_len).min().unwrap_or(1).min(most)
}

/// Queries that stand before every key, and see nothing.
pub(super) fn blind(plan: &Plan, tokens: usize, keys: usize) -> usize {
    if plan.causal { tokens.saturating_sub(keys / plan.keys_per_token) } else { 0 }
}

/// The steps of a head in chunks of up to `len` tokens: keys before the first query, or all of them if queries see all,
/// are absorbed first.
pub(super) fn steps(
    plan: &Plan,
    len: usize,
    tokens: usize,
    keys: usize,
) -> impl Iterator<Item = Step> + use<> {
    let per = plan.keys_per_token;
    let (causal, writers) = (plan.causal, keys / per);
    let first_query = blind(plan, tokens, keys);
    let absorbed = if causal { writers.saturating_sub(tokens) } else { writers };
    let before = pieces(0..absorbed, len).map(move |writers| Step {
        tokens: first_query..first_query,
        keys: writers.start * per..writers.end * per,
    });
    let after = pieces(first_query..tokens, len).map(move |tokens| {
        let key = |token: usize| if causal { (token - first_query + absorbed) * per } else { keys };
        Step { keys: key(tokens.start)..key(tokens.end), tokens }
    });
    before.chain(after)
}

/// `range` cut into pieces of `len`; the last may be shorter.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..(start + len).min(end))
}

/// The rows of one head's inputs.
pub(super) struct HeadRows<'a, E> {
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    pub(super) head: usize,
    pub(super) extras: Vec<(&'static str, Rows<'a, f32>)>,
}

/// Where the rows of a step go on their way to f32.
pub(super) struct Widened<'a> {
    rows: [Vec<f32>; 3],
    extras: Vec<(&'static str, Rows<'a, f32>)>,
}

impl Widened<'_> {
    pub(super) fn new(plan: &Plan, sizes: &Sizes, halves: bool) -> Self {
        let len = if halves { chunk_len(plan, sizes) } else { 0 };
        let keys = len * plan.keys_per_token;
        let rows = [len * sizes.head_dim, keys * sizes.head_dim, keys * sizes.head_dim_v];
        Self { rows: rows.map(|len| vec![0.0; len]), extras: Vec::new() }
    }
}

impl<'a, E: Element> HeadRows<'a, E> {
    /// The rows of a step, asked for in so many parts.
    pub(super) fn ahead(&self, step: &Step, parts: usize) -> Coming<'a, E> {
        let (tokens, keys) = (step.tokens.clone(), step.keys.clone());
        let at_once = tokens.len().max(keys.len()).div_ceil(parts.max(1));
        Coming {
            rows: [self.q.slice(tokens), self.k.slice(keys.clone()), self.v.slice(keys)],
            from: 0,
            at_once,
        }
    }

    /// The tokens of a step that [`HeadRows::tokens`] has put into `from`.
    pub(super) fn loaded<'b>(&self, sizes: &Sizes, isa: Isa, step: &Step, from: &'b Widened<'a>) -> Tokens<'b>
    where
        'a: 'b,
    {
        let [q, k, v] = &from.rows;
        Tokens {
            q: loaded(self.q.slice(step.tokens.clone()), q),
            k: loaded(self.k.slice(step.keys.clone()), k),
            v: loaded(self.v.slice(step.keys.clone()), v),
            head: self.head,
            heads: sizes.heads,
            isa,
            extras: &from.extras,
        }
    }

    /// The tokens of a step.
    pub(super) fn tokens<'b>(
        &self,
        isa: Isa,
        variant: &dyn AnyVariant,
        sizes: &Sizes,
        step: &Step,
        to: &'b mut Widened<'a>,
    ) -> Tokens<'b>
    where
        'a: 'b,
    {
        to.extras.clear();
        for (name, rows) in &self.extras {
            let range = extra_range(variant.extras(), name, rows.len(), step);
            to.extras.push((name, rows.slice(range)));
        }
        let [q, k, v] = &mut to.rows;
        Tokens {
            q: load(isa, self.q.slice(step.tokens.clone()), q),
            k: load(isa, self.k.slice(step.keys.clone()), k),
            v: load(isa, self.v.slice(step.keys.clone()), v),
            head: self.head,
            heads: sizes.heads,
            isa,
            extras: &to.extras,
        }
    }
}

/// Rows that are needed soon, asked for a few at a time.
pub(super) struct Coming<'a, E> {
    rows: [Rows<'a, E>; 3],
    from: usize,
    at_once: usize,
}

impl<E: Element> Coming<'_, E> {
    /// With these columns of the values alone.
    pub(super) fn with_values(mut self, columns: Range<usize>) -> Self {
        let v = self.rows[2];
        let data = v.data().get(columns.start..).unwrap_or_default();
        self.rows[2] = if columns.is_empty() {
            v.slice(0..0)
        } else {
            Rows::new(data, v.len(), columns.len(), v.stride())
        };
        self
    }

    /// Asks for some more of them.
    pub(super) fn fetch(&mut self) {
        for rows in &self.rows {
            let to = (self.from + self.at_once).min(rows.len());
            (self.from.min(to)..to).for_each(|i| prefetch(rows.row(i)));
        }
        self.from += self.at_once;
    }
}

/// The rows of the extra input `name`, of `len` rows, that belong to a step.
pub(super) fn extra_range(extras: &[Extra], name: &str, len: usize, step: &Step) -> Range<usize> {
    match extras.iter().find(|extra| extra.name == name).map(|extra| extra.per) {
        Some(Per::Key) => step.keys.clone(),
        // All rows are the same: one is there even for keys without queries.
        Some(Per::Head) if step.tokens.is_empty() => 0..len.min(1),
        _ => step.tokens.clone(),
    }
}

/// Rows as f32: in place where they are that already.
fn load<'a, E: Element>(isa: Isa, rows: Rows<'a, E>, wide: &'a mut [f32]) -> Rows<'a, f32> {
    struct Widen<'a, E>(Rows<'a, E>, &'a mut [f32]);
    impl<E: Element> SimdOp for Widen<'_, E> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, _: S) {
            widen(self.0, self.1);
        }
    }
    if E::as_f32(rows.data()).is_none() {
        isa.run(Widen(rows, &mut wide[..rows.len() * rows.width()]));
    }
    loaded(rows, wide)
}

/// Rows that are f32 already, or have been put into `wide`.
fn loaded<'a, E: Element>(rows: Rows<'a, E>, wide: &'a [f32]) -> Rows<'a, f32> {
    let (len, width) = (rows.len(), rows.width());
    match E::as_f32(rows.data()) {
        Some(data) => Rows::new(data, len, width, rows.stride()),
        None => Rows::new(wide, len, width, width),
    }
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// What the tokens read, and the state after them.
    Reads,
    /// That state alone: what is told as read is left over from before.
    State,
    /// What they are to one another, for somebody else to go on with.
    Nothing,
}

impl Wanted {
    /// Whether what the tokens read is, or will be.
    pub(super) fn reads(self) -> bool {
        matches!(self, Self::Reads | Self::Nothing)
    }
}

/// A thread's engines, and what they are given.
pub(super) struct Stages {
    pub(super) engines: Vec<Engine>,
    pub(super) chunks: Vec<Chunk>,
    /// What the first of two stages has read, scaled.
    pub(super) reads: Vec<f32>,
}

impl Stages {
    pub(super) fn new(plan: &Plan, sizes: &Sizes) -> Self {
        let len = chunk_len(plan, sizes);
        Self {
            engines: plan.stages.iter().map(|o| Engine::new(o, len)).collect(),
            chunks: plan.stages.iter().map(|o| Chunk::new(o, len)).collect(),
            reads: Vec::new(),
        }
    }

    /// Bytes of [`Stages::new`].
    pub(super) fn bytes(plan: &Plan, sizes: &Sizes) -> usize {
        let len = chunk_len(plan, sizes);
        plan.stages.iter().map(|o| Engine::bytes(o, len) + 4 * len * o.value_dim).sum()
    }

    /// Prepares a step of a plan with one stage and nothing to carry: its chunk, and what its tokens are to one another.
    pub(super) fn prepare(
        &mut self,
        variant: &dyn AnyVariant,
        plan: &Plan,
        x: &Tokens<'_>,
        chunk: &mut Chunk,
        prepared: &mut Prepared,
        ahead: Ahead<'_>,
    ) {
        fill(variant, plan, x, &mut [], chunk);
        let piece = piece(chunk, plan, x, variant.given());
        self.engines[0].prepare(x.isa, piece, prepared, ahead);
    }

    /// Runs a step: `memory` becomes that after it; the last stage calls `ahead`. Gives what the last stage reads, if it has not
    /// been stored directly, and its chunk.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run(
        &mut self,
        variant: &dyn AnyVariant,
        plan: &Plan,
        x: &Tokens<'_>,
        memory: &mut [f32],
        wanted: Wanted,
        direct: Option<Direct<'_>>,
        ahead: Ahead<'_>,
    ) -> (Reads<'_>, &Chunk) {
        let Self { engines, chunks, reads } = self;
        let (mut matrices, carry) = memory.split_at_mut(plan.matrices_len());
        for (stage, options) in plan.stages.iter().enumerate() {
            let (before, these) = chunks.split_at_mut(stage);
            let chunk = &mut these[0];
            match before.last() {
                None => fill(variant, plan, x, carry, chunk),
                Some(first) => {
                    chunk.resize(options, x.len());
                    variant.refill(x, first, reads, chunk);
                }
            }
            let (matrix, rest) = std::mem::take(&mut matrices).split_at_mut(options.state_len());
            matrices = rest;
            if stage + 1 < plan.stages.len() {
                let piece = piece(chunk, plan, x, variant.given());
                let read = engines[stage].run(x.isa, piece, matrix);
                reads.clear();
                reads.extend(read.rows.iter().map(|row| read.scale * row));
                continue;
            }
            let given = if stage == 0 { variant.given() } else { Given::default() };
            let piece = piece_of(&chunks[stage], options, plan.keys_per_token, x, given);
            return (engines[stage].run_wanted(x.isa, piece, matrix, wanted, direct, ahead), &chunks[stage]);
        }
        unreachable!("a plan has stages")
    }
}

/// Rows of a chunk of these tokens.
pub(super) fn rows(variant: &dyn AnyVariant, x: &Tokens<'_>) -> usize {
    if variant.crosses() { x.q.len().max(x.k.len()) } else { x.len() }
}

/// The first stage's chunk.
pub(super) fn fill(
    variant: &dyn AnyVariant,
    plan: &Plan,
    x: &Tokens<'_>,
    carry: &mut [f32],
    chunk: &mut Chunk,
) {
    chunk.resize(&plan.stages[0], rows(variant, x));
    let given = variant.given();
    for (given, rows, out) in
        [(given.q, x.q, &mut chunk.q), (given.k, x.k, &mut chunk.k), (given.v, x.v, &mut chunk.v)]
    {
        if given && !is_dense(rows) {
            copy(rows, out);
        }
    }
    variant.fill(x, carry, chunk);
}

fn is_dense(rows: Rows<'_, f32>) -> bool {
    rows.stride() == rows.width()
}

/// The first stage's chunk, or the inputs themselves, as the engine's rows.
pub(super) fn piece<'a>(chunk: &'a Chunk, plan: &Plan, x: &Tokens<'a>, given: Given) -> Piece<'a> {
    piece_of(chunk, &plan.stages[0], plan.keys_per_token, x, given)
}

fn piece_of<'a>(chunk: &'a Chunk, o: &Options, per: usize, x: &Tokens<'a>, given: Given) -> Piece<'a> {
    let (len, writes) = (x.q.len(), x.k.len() / per * o.writes);
    let choose = |given: bool, rows: Rows<'a, f32>, own: &'a [f32], numbers: usize| {
        if given && is_dense(rows) { &rows.data()[..numbers] } else { &own[..numbers] }
    };
    let whole = chunk.piece(o);
    Piece {
        len,
        writes,
        q: choose(given.q, x.q, &chunk.q, len * o.key_dim),
        k: choose(given.k, x.k, &chunk.k, writes * o.key_dim),
        v: choose(given.v, x.v, &chunk.v, writes * o.value_dim),
        log_decay: &chunk.log_decay[..writes * o.decay_width()],
        ..whole
    }
}
