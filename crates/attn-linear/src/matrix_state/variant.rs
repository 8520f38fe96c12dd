//! What a variant of the matrix-state engine decides: its options, its front end and its back end.

use super::inputs::{Extra, Sizes};
use super::memory::Part;
use super::{Chunk, Options, Recurrence};
use attn_core::Result;
use attn_core::registry::OptionSpec;
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
}

impl Plan {
    /// One stage whose memory is its matrix, called `initial_state` before and `sT` after.
    pub fn new(options: Options) -> Self {
        let state = Part::matrix("initial_state", "sT", 0, options.key_dim, options.value_dim);
        Self { stages: vec![options], keys_per_token: 1, parts: vec![state] }
    }

    /// With `len` more numbers of a head's memory, `start` at first.
    #[must_use]
    pub fn carrying(mut self, initial: &'static str, after: &'static str, len: usize, start: f32) -> Self {
        let offset = self.memory_len();
        self.parts.push(Part::row(initial, after, offset, len).starting_at(start));
        self
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
    pub(super) extras: &'a [(&'static str, Rows<'a, f32>)],
}

impl<'a> Tokens<'a> {
    /// Tokens.
    pub fn len(&self) -> usize {
        self.q.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.q.is_empty()
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

/// Gradients of some tokens' inputs, all zero at first.
#[derive(Debug)]
pub struct Pull<'a> {
    /// `[len, head_dim]`.
    pub q: &'a mut [f32],
    /// `[keys, head_dim]`.
    pub k: &'a mut [f32],
    /// `[keys, head_dim_v]`.
    pub v: &'a mut [f32],
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

    /// The front end: fills `chunk` from the tokens; `carry` is the head's memory behind the matrices.
    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk);

    /// What the second stage is given once the first has read `reads [len, value_dim]`, scaled, of the chunk `first`.
    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        let _ = (x, first, reads, chunk);
    }

    /// The back end: what becomes of the last stage's reads `[len, value_dim]`, scaled; `out [len, head_dim_v]`.
    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: &[f32], out: &mut [f32]) {
        let _ = (x, chunk);
        out.copy_from_slice(reads);
    }

    /// What takes the place of the engine's recurrence in a plan of one stage, where the engine has no option for it.
    fn recurrence(&self) -> Option<Recurrence> {
        None
    }

    /// Whether [`StateVariant::pull`] gives the gradients of all inputs.
    const DIFFERENTIABLE: bool = false;

    /// The front end and the back end backwards: from the gradients of the chunk's rows and of the output to those of
    /// the inputs.
    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        let _ = (x, chunk, grads, d_out, to);
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
    fn plan(&self, sizes: &Sizes) -> Result<Plan>;
    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk);
    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk);
    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: &[f32], out: &mut [f32]);
    fn recurrence(&self) -> Option<Recurrence>;
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

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        StateVariant::plan(self, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk) {
        StateVariant::fill(self, x, carry, chunk);
    }

    fn refill(&self, x: &Tokens<'_>, first: &Chunk, reads: &[f32], chunk: &mut Chunk) {
        StateVariant::refill(self, x, first, reads, chunk);
    }

    fn finish(&self, x: &Tokens<'_>, chunk: &Chunk, reads: &[f32], out: &mut [f32]) {
        StateVariant::finish(self, x, chunk, reads, out);
    }

    fn recurrence(&self) -> Option<Recurrence> {
        StateVariant::recurrence(self)
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        StateVariant::pull(self, x, chunk, grads, d_out, to);
    }
}
