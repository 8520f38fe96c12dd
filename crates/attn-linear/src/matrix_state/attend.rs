//! A chunk of tokens at a time: inside the chunk by the quadratic form, before it through the state.
//!
//! With the decay factors of [`super::fading`], `S` the state before the chunk, `i` a reader and `j` a write:
//!
//! ```text
//! A = tril <q, k>   P = stril <a, k or b>   R = stril <a, k>   B = tril <q, b>       decay-weighted
//! tied:     (I - P) U = V + (a o down) S                        U [writes, value_dim]
//! untied:   (I - P) Y = R V + (a o down) S                      Y [writes, value_dim], U = V
//! O = scale ((q o down) S + A U + B Y)
//! S <- down_last o S + (k o end)^T U + (b o end)^T Y
//! ```
//!
//! With a norm, the same with `V = 1` beside it: `D = (q o down) z + A 1`, `z <- down_last o z + (k o end)^T 1`.
//!
//! Value-channel decays leave the scores alone and weigh values and outputs instead. The triangular systems are solved
//! forwards, [`BLOCK`] rows at a time: what earlier blocks give is one product.
//!
//! Sources: Yang et al. 2024 (gated linear attention; the delta rule in chunks), Yang, Kautz, Hatamizadeh 2025 (gated),
//! Kimi Team 2025 (key-channel decays).

use super::fading::Fading;
use super::head::Wanted;
use super::read::read;
use super::scores::{BLOCK, Columns, Readers, scores};
use super::solve::solve;
use super::write::write;
use super::{Decay, Erase, EraseAt, Options, Piece, Read};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{MAX_LANES, Start};

/// What a chunk does between its products: it asks for memory that is needed later. A burst of such requests would hold up
/// the loads behind it.
pub(super) type Ahead<'a> = &'a mut dyn FnMut();

/// A thread's buffers for one chunk.
pub(super) struct Scratch {
    pub(super) options: Options,
    pub(super) fading: Fading,
    pub(super) stride: usize,
    pub(super) q_faded: Vec<f32>,
    pub(super) a_faded: Vec<f32>,
    /// Rows on their way somewhere, weighted.
    pub(super) weighed: Vec<f32>,
    pub(super) k: Columns,
    pub(super) b: Columns,
    /// `A`, `B [len, stride]`; `P`, `R [writes, stride]`. Tied, `P` is in `ak`; untied, it is in `ab`.
    pub(super) qk: Vec<f32>,
    pub(super) qb: Vec<f32>,
    pub(super) ak: Vec<f32>,
    pub(super) ab: Vec<f32>,
    /// What the erase's solve gives: `U`, or untied `Y`, `[writes, value_dim]`.
    pub(super) solved: Vec<f32>,
    /// `O / scale [len, value_dim]`.
    pub(super) reads: Vec<f32>,
    /// `q . z [len]`, and `[writes]` ones to sum keys with.
    pub(super) norms: Vec<f32>,
    pub(super) ones: Vec<f32>,
    /// Queries and writes that the scores were filled for.
    filled: [usize; 2],
}

impl Scratch {
    pub(super) fn new(options: &Options, len: usize) -> Self {
        let Options { key_dim, value_dim, .. } = *options;
        let writes = len * options.writes;
        let stride = writes.next_multiple_of(MAX_LANES);
        let (erases, untied) = (options.erase != Erase::None, options.erase == Erase::Untied);
        let buffer = |needed: bool, len: usize| vec![0.0; if needed { len } else { 0 }];
        let keys_decay = options.decay == Decay::Key && key_dim > 1;
        Self {
            options: *options,
            fading: Fading::new(options, writes),
            stride,
            q_faded: buffer(true, len * key_dim),
            a_faded: buffer(erases, writes * key_dim),
            weighed: buffer(true, writes * key_dim.max(value_dim)),
            k: Columns::new(key_dim, writes, keys_decay),
            b: Columns::new(key_dim, if untied { writes } else { 0 }, keys_decay),
            qk: buffer(true, len * stride),
            qb: buffer(untied, len * stride),
            ak: buffer(erases, writes * stride),
            ab: buffer(untied, writes * stride),
            solved: buffer(erases, writes * value_dim),
            reads: buffer(true, len * value_dim),
            norms: buffer(options.norm, len),
            ones: vec![1.0; if options.norm { writes } else { 0 }],
            filled: [len, writes],
        }
    }

    /// Bytes of [`Scratch::new`].
    pub(super) fn bytes(options: &Options, len: usize) -> usize {
        let Options { key_dim, value_dim, .. } = *options;
        let writes = len * options.writes;
        let stride = writes.next_multiple_of(MAX_LANES);
        let (erases, untied) = match options.erase {
            Erase::None => (0, 0),
            Erase::Tied => (1, 0),
            Erase::Untied => (1, 1),
        };
        let keys_decay = options.decay == Decay::Key && key_dim > 1;
        let floats = len * (key_dim + value_dim)
            + writes * (erases * (key_dim + value_dim) + key_dim.max(value_dim))
            + (1 + untied)
                * (Columns::floats(key_dim, writes, keys_decay) + stride * (len + writes * erases));
        let floats = floats + if options.norm { len + writes } else { 0 };
        4 * floats + Fading::bytes(options, writes)
    }
}

/// A chunk: reads, and writes the state `[key_dim, value_dim]`.
pub(super) struct Attend<'a> {
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
    pub(super) wanted: Wanted,
    pub(super) ahead: Ahead<'a>,
}

/// How often [`Attend`] calls `ahead` for a chunk of `len` tokens, at least.
pub(super) fn pauses(o: &Options, len: usize) -> usize {
    2 * len.div_ceil(BLOCK) + o.key_dim.div_ceil(BLOCK)
}

impl SimdOp for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, scratch, wanted, ahead } = self;
        prepare(simd, &chunk, scratch, wanted, ahead);
        if scratch.options.erase != Erase::None {
            solve(simd, &chunk, state, scratch);
        }
        if wanted.reads() {
            read(simd, &chunk, state, scratch, ahead);
        }
        match wanted {
            Wanted::Reads | Wanted::State => write(simd, &chunk, state, scratch, Start::Keep, ahead),
            Wanted::Change => write(simd, &chunk, state, scratch, Start::Zero, ahead),
            Wanted::ReadsAlone => {}
        }
    }
}

/// What the erase of a chunk writes, into `solved`.
pub(super) struct Solve<'a> {
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a [f32],
    pub(super) scratch: &'a mut Scratch,
}

impl SimdOp for Solve<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, scratch } = self;
        prepare(simd, &chunk, scratch, Wanted::State, &mut || {});
        solve(simd, &chunk, state, scratch);
    }
}

/// The write whose decay a query has behind it.
pub(super) fn read_at(o: &Options, i: usize) -> Option<usize> {
    match o.read {
        Read::Post => Some(o.last_write(i)),
        Read::Pre => i.checked_sub(1),
    }
}

/// The write whose decay an erase has behind it.
pub(super) fn erase_at(o: &Options, write: usize) -> Option<usize> {
    if o.erase_at == EraseAt::After { Some(write) } else { write.checked_sub(1) }
}

/// Factors and scores.
#[inline(always)]
pub(super) fn prepare<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    x: &mut Scratch,
    wanted: Wanted,
    ahead: Ahead<'_>,
) {
    let o = x.options;
    let key_dim = o.key_dim;
    x.fading.set(simd, chunk);
    let reads = wanted.reads();
    if x.fading.key_width > 1 && reads {
        fade_queries(chunk, x);
    }
    if (chunk.len == 0 || chunk.writes == 0 || !reads) && o.erase == Erase::None {
        return;
    }
    let filled = [chunk.len, chunk.writes];
    if x.filled != filled {
        // Beyond the columns that a block of rows sees, all is zero.
        [&mut x.qk, &mut x.qb, &mut x.ak, &mut x.ab].into_iter().for_each(|scores| scores.fill(0.0));
        x.filled = filled;
    }
    x.k.set(simd, chunk.k, &x.fading, &mut x.weighed);
    let queries = Readers {
        plain: chunk.q,
        faded: &x.q_faded,
        at: &|i| read_at(&o, i),
        seen: &|i| o.seen(i).min(chunk.writes),
        rows: chunk.len,
    };
    if reads {
        scores(simd, &queries, &x.k, &mut x.fading, &mut x.qk, ahead);
    }
    if o.read == Read::Pre {
        for i in 0..chunk.len {
            let (q, k) = (&chunk.q[i * key_dim..][..key_dim], &chunk.k[i * key_dim..][..key_dim]);
            x.qk[i * x.stride + i] = q.iter().zip(k).zip(chunk.bonus).map(|((q, k), u)| q * k * u).sum();
        }
    }
    if o.erase == Erase::None {
        return;
    }
    let rows = chunk.a.chunks_exact(key_dim).zip(x.a_faded.chunks_exact_mut(key_dim));
    rows.enumerate().for_each(|(w, (row, out))| x.fading.fade(row, erase_at(&o, w), out));
    let erasers = Readers {
        plain: chunk.a,
        faded: &x.a_faded,
        at: &|w| erase_at(&o, w),
        seen: &|w| w,
        rows: chunk.writes,
    };
    scores(simd, &erasers, &x.k, &mut x.fading, &mut x.ak, ahead);
    if o.erase == Erase::Untied {
        x.b.set(simd, chunk.b, &x.fading, &mut x.weighed);
        scores(simd, &erasers, &x.b, &mut x.fading, &mut x.ab, ahead);
        if reads {
            scores(simd, &queries, &x.b, &mut x.fading, &mut x.qb, ahead);
        }
    }
}

/// What is written: `U` of the tied erase, else the values.
pub(super) fn written<'a>(chunk: &Piece<'a>, solved: &'a [f32], erase: Erase) -> &'a [f32] {
    if erase == Erase::Tied { &solved[..chunk.v.len()] } else { chunk.v }
}

/// `q o down`, where every query stands.
#[inline(always)]
pub(super) fn fade_queries(chunk: &Piece<'_>, x: &mut Scratch) {
    let (o, key_dim) = (x.options, x.options.key_dim);
    let rows = chunk.q.chunks_exact(key_dim).zip(x.q_faded.chunks_exact_mut(key_dim));
    rows.enumerate().for_each(|(i, (row, out))| x.fading.fade(row, read_at(&o, i), out));
}
