//! A thread's buffers for one chunk.

use super::fading::Fading;
use super::scores::Columns;
use super::{Decay, Erase, Options};
use attn_core::tile::MAX_LANES;

/// What the tokens of a chunk are to one another, and how they fade: nothing of it knows the state or a value.
pub(super) struct Prepared {
    pub(super) fading: Fading,
    pub(super) stride: usize,
    pub(super) q_faded: Vec<f32>,
    /// With one decay a token: what a query's read of the state before the chunk has faded to, `[len]`.
    pub(super) factors: Vec<f32>,
    pub(super) a_faded: Vec<f32>,
    /// `A`, `B [len, stride]`; `P`, `R [writes, stride]`. Tied, `P` is in `ak`; untied, it is in `ab`.
    pub(super) qk: Vec<f32>,
    pub(super) qb: Vec<f32>,
    pub(super) ak: Vec<f32>,
    pub(super) ab: Vec<f32>,
    /// Queries and writes that the scores were filled for.
    filled: [usize; 2],
}

/// What becomes of the values, of all their columns or of some.
pub(super) struct Working {
    /// Rows on their way somewhere, weighted.
    pub(super) weighed: Vec<f32>,
    /// What the erase's solve gives: `U`, or untied `Y`, `[writes, value_dim]`.
    pub(super) solved: Vec<f32>,
    /// `[writes]` ones to sum keys with.
    pub(super) ones: Vec<f32>,
}

/// What the tokens read.
pub(super) struct Read {
    /// `O / scale [len, value_dim]`.
    pub(super) rows: Vec<f32>,
    /// `q . z [len]`, if there are norms.
    pub(super) norms: Vec<f32>,
}

/// All of a thread's buffers.
pub(super) struct Scratch {
    pub(super) options: Options,
    pub(super) prepared: Prepared,
    pub(super) work: Working,
    pub(super) read: Read,
    pub(super) k: Columns,
    pub(super) b: Columns,
}

fn buffer(needed: bool, len: usize) -> Vec<f32> {
    vec![0.0; if needed { len } else { 0 }]
}

impl Prepared {
    /// For chunks of up to `len` tokens.
    pub(super) fn new(options: &Options, len: usize) -> Self {
        let (key_dim, writes) = (options.key_dim, len * options.writes);
        let stride = writes.next_multiple_of(MAX_LANES);
        let (erases, untied) = (options.erase != Erase::None, options.erase == Erase::Untied);
        Self {
            fading: Fading::new(options, writes),
            stride,
            q_faded: buffer(true, len * key_dim),
            factors: buffer(options.decay != Decay::None, len),
            a_faded: buffer(erases, writes * key_dim),
            qk: buffer(true, len * stride),
            qb: buffer(untied, len * stride),
            ak: buffer(erases, writes * stride),
            ab: buffer(untied, writes * stride),
            filled: [len, writes],
        }
    }

    /// Bytes of [`Prepared::new`].
    pub(super) fn bytes(options: &Options, len: usize) -> usize {
        let (key_dim, writes) = (options.key_dim, len * options.writes);
        let stride = writes.next_multiple_of(MAX_LANES);
        let (erases, untied) = match options.erase {
            Erase::None => (0, 0),
            Erase::Tied => (1, 0),
            Erase::Untied => (1, 1),
        };
        let scores = (1 + untied) * stride * (len + writes * erases);
        let factors = if options.decay == Decay::None { 0 } else { len };
        4 * (len * key_dim + factors + writes * erases * key_dim + scores) + Fading::bytes(options, writes)
    }

    /// Makes the scores zero where a chunk of these sizes leaves them alone: beyond the columns that a block of rows sees.
    #[inline(always)]
    pub(super) fn clear_for(&mut self, filled: [usize; 2]) {
        if self.filled != filled {
            let all = [&mut self.qk, &mut self.qb, &mut self.ak, &mut self.ab];
            all.into_iter().for_each(|scores| scores.fill(0.0));
            self.filled = filled;
        }
    }
}

impl Working {
    /// For chunks of up to `len` tokens.
    pub(super) fn new(options: &Options, len: usize) -> Self {
        let Options { key_dim, value_dim, .. } = *options;
        let writes = len * options.writes;
        Self {
            weighed: buffer(true, writes * key_dim.max(value_dim)),
            solved: buffer(options.erase != Erase::None, writes * value_dim),
            ones: vec![1.0; if options.norm { writes } else { 0 }],
        }
    }

    /// Bytes of [`Working::new`].
    pub(super) fn bytes(options: &Options, len: usize) -> usize {
        let Options { key_dim, value_dim, .. } = *options;
        let writes = len * options.writes;
        let erased = if options.erase == Erase::None { 0 } else { value_dim };
        let norm = if options.norm { writes } else { 0 };
        4 * (writes * (key_dim.max(value_dim) + erased) + norm)
    }
}

impl Read {
    /// For up to `len` tokens.
    pub(super) fn new(options: &Options, len: usize) -> Self {
        Self { rows: buffer(true, len * options.value_dim), norms: buffer(options.norm, len) }
    }

    /// Bytes of [`Read::new`].
    pub(super) fn bytes(options: &Options, len: usize) -> usize {
        4 * len * (options.value_dim + usize::from(options.norm))
    }
}

impl Scratch {
    /// For chunks of up to `len` tokens.
    pub(super) fn new(options: &Options, len: usize) -> Self {
        let (key_dim, writes) = (options.key_dim, len * options.writes);
        let untied = options.erase == Erase::Untied;
        let keys_decay = options.decay == Decay::Key && key_dim > 1;
        Self {
            options: *options,
            prepared: Prepared::new(options, len),
            work: Working::new(options, len),
            read: Read::new(options, len),
            k: Columns::new(key_dim, writes, keys_decay),
            b: Columns::new(key_dim, if untied { writes } else { 0 }, keys_decay),
        }
    }

    /// Bytes of [`Scratch::new`].
    pub(super) fn bytes(options: &Options, len: usize) -> usize {
        let (key_dim, writes) = (options.key_dim, len * options.writes);
        let keys_decay = options.decay == Decay::Key && key_dim > 1;
        let turned = if options.erase == Erase::Untied { 2 } else { 1 };
        let columns = 4 * turned * Columns::floats(key_dim, writes, keys_decay);
        Prepared::bytes(options, len) + Working::bytes(options, len) + Read::bytes(options, len) + columns
    }
}
