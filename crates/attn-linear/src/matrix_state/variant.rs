//! What a variant of the matrix-state engine decides: its options, its front end and its back end.

use super::inputs::{Extra, Inputs, Sizes};
use super::memory::Part;
use super::{Chunk, Options};
use attn_core::Result;
use attn_core::registry::OptionSpec;
use attn_core::simd::Isa;
use attn_core::view::Rows;

/// What a problem of certain sizes becomes.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The engine's options; two of them run one after the other over the same tokens, the second on what the first
    /// one read.
    pub stages: Vec<Options>,
    /// Keys a query brings along.
    pub keys_per_token: usize,
    /// A head's memory: the stages' matrices first, then what the front end carries from chunk to chunk.
    pub parts: Vec<Part>,
    /// Whether a query sees no later key; otherwise all of them, through the state of all.
    pub causal: bool,
}

impl Plan {
    /// One stage whose memory is its matrix, called `initial_state` before and `sT` after.
    pub fn new(options: Options) -> Self {
        let state = Part::matrix("initial_state", "sT", 0, options.key_dim, options.value_dim);
        Self { stages: vec![options], keys_per_token: 1, parts: vec![state], causal: true }
    }

    /// With the norm's sums, the first stage's, as a part.
    #[must_use]
    pub fn with_norm(mut self, initial: &'static str, after: &'static str) -> Self {
        let o = &self.stages[0];
        let part = Part::row(initial, after, o.matrix_len(), o.key_dim);
        self.parts.push(part);
        self
    }

    /// With `len` more numbers of a head's memory, `start` at first.
    #[must_use]
    pub fn carrying(mut self, initial: &'static str, after: &'static str, len: usize, start: f32) -> Self {
        let offset = self.memory_len();
        self.parts.push(Part::row(initial, after, offset, len).starting_at(start));
        self
    }

    /// FLOPs of one head's products.
    pub fn flops(&self, sizes: &Sizes) -> u64 {
        let (tokens, writers) = (sizes.tokens, sizes.keys / self.keys_per_token);
        let seen = if self.causal { tokens.min(writers) } else { 0 };
        let alone = |o: &Options| ((tokens - seen) + (writers - seen) * o.writes) * o.matrix_len();
        self.stages.iter().map(|o| o.flops(seen) + 2 * alone(o) as u64).sum()
    }

    /// Numbers of a head's memory.
    pub fn memory_len(&self) -> usize {
        self.parts.iter().map(Part::end).max().unwrap_or(0).max(self.matrices_len())
    }

    /// Numbers of the stages' matrices, which come first.
    pub(super) fn matrices_len(&self) -> usize {
        self.stages.iter().map(Options::state_len).sum()
    }
}

/// Some tokens of one head as they are given, widened to f32.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// `[len, head_dim]`.
    pub q: Rows<'a, f32>,
    /// `[keys, head_dim]`.
    pub k: Rows<'a, f32>,
    /// `[keys, head_dim_v]`.
    pub v: Rows<'a, f32>,
    /// Which head of the output.
    pub head: usize,
    /// Heads of the output.
    pub heads: usize,
    /// What the CPU runs.
    pub isa: Isa,
    pub(super) extras: &'a [(&'static str, Rows<'a, f32>)],
}

impl<'a> Tokens<'a> {
    /// Tokens: as many as there are queries or, without queries, keys.
    pub fn len(&self) -> usize {
        if self.q.is_empty() { self.k.len() } else { self.q.len() }
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows of the extra input `name`, if it is given.
    pub fn extra(&self, name: &str) -> Option<Rows<'a, f32>> {
        self.extras.iter().find(|(known, _)| *known == name).map(|(_, rows)| *rows)
    }

    /// The number of row `i` of the extra input `name`, or `default` if it is not given.
    pub fn number(&self, name: &str, i: usize, default: f32) -> f32 {
        self.extra(name).map_or(default, |rows| rows.row(i)[0])
    }
}

/// What some tokens have read.
#[derive(Debug, Clone, Copy)]
pub struct Reads<'a> {
    /// `[len, value_dim]`, to be multiplied by the scale.
    pub rows: &'a [f32],
    /// With [`Options::norm`], `[len]`, likewise.
    pub norms: &'a [f32],
    /// [`Options::scale`].
    pub scale: f32,
}

/// Inputs that are the engine's rows as they are: they are not copied, and the front end leaves them alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Given {
    /// Queries.
    pub q: bool,
    /// Keys.
    pub k: bool,
    /// Values.
    pub v: bool,
}

impl Given {
    /// All three.
    pub const QKV: Self = Self { q: true, k: true, v: true };
}

/// Gradients of some tokens' inputs, all zero at first.
#[derive(Debug)]
pub struct Pull<'a> {
    /// `[len, head_dim]`.
    pub q: &'a mut [f32],
    /// `[keys, head_dim]`.
    pub k: &'a mut [f32],
    /// `[keys, head_dim_v]`.
    pub v: &'a mut [f32],
    /// What the front end carried to these tokens.
    pub carry: &'a [f32],
    /// Gradient of what it carries on; to become that of `carry`.
    pub d_carry: &'a mut [f32],
    /// What the back end leaves to the front end.
    pub notes: Vec<f32>,
    pub(super) extras: Vec<(&'static str, &'a mut [f32])>,
}

impl Pull<'_> {
    /// The rows of the extra input `name`, if it is given.
    pub fn extra(&mut self, name: &str) -> Option<&mut [f32]> {
        self.extras.iter_mut().find(|(known, _)| *known == name).map(|(_, rows)| &mut **rows)
    }

    /// Adds `by` to the number of row `i` of the extra input `name`, if it is given.
    pub fn add(&mut self, name: &str, i: usize, by: f32) {
        if let Some(rows) = self.extra(name) {
            rows[i] += by;
        }
    }
}

/// Copies rows into `out`.
pub(crate) fn copy(rows: Rows<'_, f32>, out: &mut [f32]) {
    let width = rows.width();
    if rows.stride() == width && !rows.is_empty() {
        out[..rows.len() * width].copy_from_slice(&rows.data()[..rows.len() * width]);
    } else {
        rows.iter().zip(out.chunks_exact_mut(width)).for_each(|(row, out)| out.copy_from_slice(row));
    }
}

/// Copies rows into `out`, or fills it where there are none.
pub(crate) fn copy_or(rows: Option<Rows<'_, f32>>, default: f32, out: &mut [f32]) {
    match rows {
        Some(rows) => copy(rows, out),
        None => out.fill(default),
    }
}

/// A variant: a row of the engine's table with the front end and the back end around it.
pub trait StateVariant: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;
    /// The inputs it reads beside q, k and v. Those that are not given are constants of the configuration.
    const EXTRAS: &'static [Extra];
    /// One line: what it does, and from which paper.
    const SUMMARY: &'static str;
    /// The options of its configuration.
    const OPTIONS: &'static [OptionSpec];

    /// The configuration of `key=value` options.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] naming an option that cannot be read or makes no sense.
    fn from_options(options: &attn_core::registry::Options) -> Result<Self>;

    /// The engine's options and the memory for such a problem.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for an option that makes no sense or inputs that do not go together.
    fn plan(&self, sizes: &Sizes) -> Result<Plan>;

    /// Refuses numbers that make no sense.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] naming the input.
    fn check_inputs(&self, x: &Inputs<'_>) -> Result<()> {
        let _ = x;
        Ok(())
    }

    /// The front end: fills `chunk` from the tokens; `carry` is the head's memory behind the matrices.
    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk);

    /// What the engine takes from the inputs as it is.
    const GIVEN: Given = Given { q: false, k: false, v: false };

    /// Whether there may be more or fewer keys than queries: then the last of both stand together, and the front end may
    /// see tokens without queries, or without keys.
    const CROSS: bool = false;

    /// What the second stage is given once the first has read `reads [len, value_dim]`, scaled, of the chunk `first`.
    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        let _ = (x, first, reads, chunk);
    }

    /// Whether there is a back end, [`StateVariant::finish`]; else what is read, scaled, is the output.
    const FINISHES: bool = false;

    /// The back end: what becomes of the last stage's reads; `out [len, head_dim_v]`.
    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        let _ = (x, chunk, reads, out);
    }

    /// Whether [`StateVariant::pull`] gives the gradients of all inputs.
    const DIFFERENTIABLE: bool = false;

    /// The front end and the back end backwards: from the gradients of the chunk's rows and of the output to those of
    /// the inputs.
    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        let _ = (x, chunk, grads, d_out, to);
    }

    /// The back end backwards: from `d_out [len, head_dim_v]` to the gradients of the reads' rows and norms, before they are
    /// scaled. It may leave [`Pull::notes`] to [`StateVariant::pull`].
    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        chunk: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        [d_rows, d_norms]: [&mut [f32]; 2],
        to: &mut Pull<'_>,
    ) {
        let _ = (x, chunk, d_norms, to);
        d_rows.iter_mut().zip(d_out).for_each(|(d_row, d)| *d_row = reads.scale * d);
    }

    /// [`StateVariant::refill`] backwards: from the gradients of the second chunk's rows to those of what the first stage
    /// read, scaled, in `d_reads`, and of inputs; what the first chunk's `v` and `log_decay` gain is `gained`, 0 at first.
    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    ) {
        let _ = (second, grads, d_reads, gained, to);
    }

    /// Whether no query sees a later key.
    fn is_causal(&self) -> bool {
        true
    }

    /// Whether outputs are averages of values.
    fn is_convex(&self) -> bool {
        false
    }

    /// Largest error of f32 outputs against the definition, as a share of the largest.
    fn max_error(&self) -> f64 {
        4e-6
    }
}

/// A [`StateVariant`] behind a pointer, so that what drives it is compiled once for all of them.
pub(super) trait AnyVariant: Send + Sync {
    fn name(&self) -> &'static str;
    fn extras(&self) -> &'static [Extra];
    fn differentiable(&self) -> bool;
    fn given(&self) -> Given;
    fn crosses(&self) -> bool;
    fn finishes(&self) -> bool;
    fn plan(&self, sizes: &Sizes) -> Result<Plan>;
    fn check_inputs(&self, x: &Inputs<'_>) -> Result<()>;
    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk);
    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk);
    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: Reads<'_>, out: &mut [f32]);
    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        chunk: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        d_reads: [&mut [f32]; 2],
        to: &mut Pull<'_>,
    );
    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    );
    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>);
}

impl<V: StateVariant> AnyVariant for V {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn extras(&self) -> &'static [Extra] {
        V::EXTRAS
    }

    fn differentiable(&self) -> bool {
        V::DIFFERENTIABLE
    }

    fn given(&self) -> Given {
        V::GIVEN
    }

    fn crosses(&self) -> bool {
        V::CROSS
    }

    fn finishes(&self) -> bool {
        V::FINISHES
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        StateVariant::plan(self, sizes)
    }

    fn check_inputs(&self, x: &Inputs<'_>) -> Result<()> {
        StateVariant::check_inputs(self, x)
    }

    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk) {
        StateVariant::fill(self, x, carry, chunk);
    }

    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        StateVariant::refill(self, x, first, reads, chunk);
    }

    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        StateVariant::finish(self, x, chunk, reads, out);
    }

    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        chunk: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        d_reads: [&mut [f32]; 2],
        to: &mut Pull<'_>,
    ) {
        StateVariant::pull_finish(self, x, chunk, reads, d_out, d_reads, to);
    }

    fn pull_refill(
        &self,
        second: &Chunk,
        grads: &Chunk,
        d_reads: &mut [f32],
        gained: &mut Chunk,
        to: &mut Pull<'_>,
    ) {
        StateVariant::pull_refill(self, second, grads, d_reads, gained, to);
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        StateVariant::pull(self, x, chunk, grads, d_out, to);
    }
}
