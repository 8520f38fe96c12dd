//! What the engine is given: some tokens of one head, as f32 rows.

use super::{Erase, Options, Read};

/// Consecutive tokens of one head in the engine's terms, row-major. A variant's front end fills it; rows of `k`, `v`,
/// `log_decay`, `a` and `b` are writes, [`Options::writes`] a token.
#[derive(Debug, Clone, Default)]
pub struct Chunk {
    /// Tokens.
    pub len: usize,
    /// Queries `[len, key_dim]`.
    pub q: Vec<f32>,
    /// Write keys `[writes, key_dim]`.
    pub k: Vec<f32>,
    /// Written values `[writes, value_dim]`.
    pub v: Vec<f32>,
    /// Natural logs of the decay before each write `[writes, decay_width]`; at most 0, -inf forgets all.
    pub log_decay: Vec<f32>,
    /// Directions the erase reads along `[writes, key_dim]`, its sign and strength included.
    pub a: Vec<f32>,
    /// Directions the erase writes along `[writes, key_dim]`, if not the write key.
    pub b: Vec<f32>,
    /// How strongly each value channel takes part in a tied erase `[writes, value_dim]`: `u = v + strength o (S^T a)`;
    /// empty is 1.
    pub strength: Vec<f32>,
    /// What a variant's front end tells its back end.
    pub notes: Vec<f32>,
    /// What a token's own write weighs under [`Read::Pre`], `[key_dim]`.
    pub bonus: Vec<f32>,
}

/// A [`Chunk`] as the engine reads it: its own rows, or those of the inputs where they are what the engine wants. Without
/// queries the writes are only absorbed, without writes the state is only read.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Queries.
    pub len: usize,
    /// Writes.
    pub writes: usize,
    /// As in [`Chunk`], and so on.
    pub q: &'a [f32],
    /// Write keys.
    pub k: &'a [f32],
    /// Written values.
    pub v: &'a [f32],
    /// Decays.
    pub log_decay: &'a [f32],
    /// What the erase reads along.
    pub a: &'a [f32],
    /// What it writes along.
    pub b: &'a [f32],
    /// How strongly it does.
    pub strength: &'a [f32],
    /// What a token's own write weighs.
    pub bonus: &'a [f32],
    /// What a recurrence of its own is told.
    pub notes: &'a [f32],
}

/// Rows of values, of all their columns or of some.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    pub(super) v: &'a [f32],
    /// As [`Chunk::strength`].
    pub(super) strength: &'a [f32],
    /// From one row to the next, of both.
    pub(super) stride: usize,
}

impl<'a> Piece<'a> {
    /// All columns of its values.
    pub(super) fn values(&self, value_dim: usize) -> Values<'a> {
        Values { v: self.v, strength: self.strength, stride: value_dim }
    }
}

impl Values<'_> {
    /// The rows from `first` on.
    pub(super) fn rows_after(self, first: usize) -> Self {
        let at = first * self.stride;
        Self { v: &self.v[at..], strength: &self.strength[at..], ..self }
    }

    /// The columns from `first` on.
    pub(super) fn columns_after(self, first: usize) -> Self {
        let cut = |rows: &'_ [f32]| first.min(rows.len());
        Self { v: &self.v[cut(self.v)..], strength: &self.strength[cut(self.strength)..], ..self }
    }
}

impl Chunk {
    /// All of it, with as many tokens to read as to write.
    pub fn piece(&self, options: &Options) -> Piece<'_> {
        Piece {
            len: self.len,
            writes: self.len * options.writes,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            log_decay: &self.log_decay,
            a: &self.a,
            b: &self.b,
            strength: &self.strength,
            bonus: &self.bonus,
            notes: &self.notes,
        }
    }

    /// Buffers for up to `len` tokens, all zero; the bonus is 1.
    pub fn new(options: &Options, len: usize) -> Self {
        let mut chunk = Self::default();
        chunk.resize(options, len);
        chunk.bonus = vec![1.0; if options.read == Read::Pre { options.key_dim } else { 0 }];
        chunk
    }

    /// Gives every row buffer the size of `len` tokens; what they held is left or lost.
    pub fn resize(&mut self, options: &Options, len: usize) {
        let writes = len * options.writes;
        let erased = if options.erase == Erase::None { 0 } else { writes * options.key_dim };
        let untied = if options.erase == Erase::Untied { erased } else { 0 };
        self.len = len;
        self.q.resize(len * options.key_dim, 0.0);
        self.k.resize(writes * options.key_dim, 0.0);
        self.v.resize(writes * options.value_dim, 0.0);
        self.log_decay.resize(writes * options.decay_width(), 0.0);
        self.a.resize(erased, 0.0);
        self.b.resize(untied, 0.0);
    }

    /// Floats of [`Chunk::new`].
    pub(super) fn floats(options: &Options, len: usize) -> usize {
        let writes = len * options.writes;
        let keys = match options.erase {
            Erase::None => 1,
            Erase::Tied => 2,
            Erase::Untied => 3,
        };
        len * options.key_dim
            + writes * (keys * options.key_dim + options.value_dim + options.decay_width())
            + options.key_dim
    }

    /// Tokens `range` as a chunk of their own.
    pub fn slice(&self, options: &Options, range: std::ops::Range<usize>) -> Self {
        let cut = |data: &[f32], rows: usize| {
            if self.len == 0 {
                return Vec::new();
            }
            let token = data.len() / self.len;
            debug_assert!(rows == 0 || token.is_multiple_of(rows));
            data[range.start * token..range.end * token].to_vec()
        };
        Self {
            len: range.len(),
            q: cut(&self.q, 1),
            k: cut(&self.k, options.writes),
            v: cut(&self.v, options.writes),
            log_decay: cut(&self.log_decay, options.writes),
            a: cut(&self.a, options.writes),
            b: cut(&self.b, options.writes),
            strength: cut(&self.strength, options.writes),
            notes: cut(&self.notes, 1),
            bonus: self.bonus.clone(),
        }
    }
}
