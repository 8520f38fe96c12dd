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

use super::chunk::Values;
use super::head::Wanted;
use super::read::{at_once, read};
use super::scores::{BLOCK, Readers, scores};
use super::scratch::{Prepared, Scratch, Working};
use super::solve::solve;
use super::write::write;
use super::{Erase, EraseAt, Options, Piece, Read};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{MAX_LANES, Rhs, Start, all_finite};
use attn_core::view::RowsMut;

/// What a chunk does between its products: it asks for memory that is needed later. A burst of such requests would hold up
/// the loads behind it.
pub(super) type Ahead<'a> = &'a mut dyn FnMut();

/// A chunk: reads, and writes the state `[key_dim, value_dim]`.
pub(super) struct Attend<'a> {
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
    pub(super) wanted: Wanted,
    pub(super) direct: Option<Direct<'a>>,
    pub(super) ahead: Ahead<'a>,
}

/// Rows that take what is read as it is stored, in the place of the scratch: for options that [`Direct::takes`].
pub(super) struct Direct<'a> {
    pub(super) rows: RowsMut<'a, f32>,
    pub(super) scale: f32,
}

impl Direct<'_> {
    /// Whether what is read needs nothing but the scale.
    pub(super) fn takes(o: &Options) -> bool {
        at_once(o) && !o.norm && o.recurrence.is_none()
    }
}

/// How often [`Attend`] calls `ahead` for a chunk of `len` tokens, at least.
pub(super) fn pauses(o: &Options, len: usize) -> usize {
    2 * len.div_ceil(BLOCK) + o.key_dim.div_ceil(BLOCK)
}

impl SimdOp for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, scratch, wanted, direct, ahead } = self;
        let zeros = !at_once(&scratch.options) || scratch.options.norm;
        prepare(simd, &chunk, scratch, wanted, zeros, ahead);
        if wanted == Wanted::Nothing {
            return;
        }
        let Scratch { options, prepared, work, read, .. } = scratch;
        let on = On { o: options, chunk: &chunk, values: chunk.values(options.value_dim), prepared };
        on.run(simd, state, work, [&mut read.rows, &mut read.norms], direct, wanted, ahead);
    }
}

/// A chunk and its scores, on all columns of values or some: those of the options.
pub(super) struct On<'a> {
    pub(super) o: &'a Options,
    pub(super) chunk: &'a Piece<'a>,
    pub(super) values: Values<'a>,
    pub(super) prepared: &'a Prepared,
}

impl On<'_> {
    /// Reads rows and norms, and writes the state `[key_dim, value_dim]`.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    pub(super) fn run<S: Simd>(
        &self,
        simd: S,
        state: &mut [f32],
        work: &mut Working,
        to: [&mut [f32]; 2],
        direct: Option<Direct<'_>>,
        wanted: Wanted,
        ahead: Ahead<'_>,
    ) {
        if self.o.erase != Erase::None {
            solve(simd, self, state, work);
        }
        if wanted.reads() {
            read(simd, self, state, work, to, direct, ahead);
        }
        write(simd, self, state, work, Start::Keep, ahead);
    }

    /// What is written: `U` of the tied erase, else the values.
    #[inline(always)]
    pub(super) fn written<'b>(&self, solved: &'b [f32]) -> Rhs<'b>
    where
        Self: 'b,
    {
        let Values { v, stride, .. } = self.values;
        if self.o.erase == Erase::Tied {
            Rhs { data: &solved[..self.chunk.writes * self.o.value_dim], stride: self.o.value_dim }
        } else {
            Rhs { data: v, stride }
        }
    }
}

/// Whether all of these rows `[.., width]` are finite.
#[inline(always)]
pub(super) fn rows_finite(rows: Rhs<'_>, width: usize) -> bool {
    if rows.stride == width {
        return all_finite(rows.data);
    }
    // Without the sign, bit patterns order like the numbers. A largest one a lane: no row waits for the one before.
    let mut largest = [0; MAX_LANES];
    for row in rows.data.chunks(rows.stride) {
        for piece in row[..width.min(row.len())].chunks(MAX_LANES) {
            largest.iter_mut().zip(piece).for_each(|(max, x)| *max = (x.to_bits() << 1).max(*max));
        }
    }
    largest.into_iter().all(|bits| bits < f32::INFINITY.to_bits() << 1)
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
        prepare(simd, &chunk, scratch, Wanted::State, true, &mut || {});
        let Scratch { options, prepared, work, .. } = scratch;
        let on = On { o: options, chunk: &chunk, values: chunk.values(options.value_dim), prepared };
        solve(simd, &on, state, work);
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

/// Factors and scores; those with what is not seen are made 0 if somebody looks at them.
#[inline(always)]
pub(super) fn prepare<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    x: &mut Scratch,
    wanted: Wanted,
    zeros: bool,
    ahead: Ahead<'_>,
) {
    let o = x.options;
    let key_dim = o.key_dim;
    let reads = wanted.reads();
    x.prepared.fading.set(simd, chunk);
    if x.prepared.fading.key_width > 1 && reads {
        fade_queries(chunk, x);
    }
    if x.prepared.fading.key_width == 1 {
        let Prepared { fading, factors, .. } = &mut x.prepared;
        for (i, factor) in factors[..chunk.len].iter_mut().enumerate() {
            *factor = read_at(&o, i).filter(|at| *at < chunk.writes).map_or(1.0, |at| fading.down[at]);
        }
    }
    if (chunk.len == 0 || chunk.writes == 0 || !reads) && o.erase == Erase::None {
        return;
    }
    x.prepared.clear_for([chunk.len, chunk.writes]);
    let Scratch { prepared: p, work, k, b, .. } = x;
    k.set(simd, chunk.k, &p.fading, &mut work.weighed);
    let queries = Readers {
        plain: chunk.q,
        faded: &p.q_faded,
        at: &|i| read_at(&o, i),
        seen: &|i| o.seen(i).min(chunk.writes),
        rows: chunk.len,
        zeros,
    };
    if reads {
        scores(simd, &queries, k, &p.fading, &mut p.qk, ahead);
    }
    if o.read == Read::Pre {
        for i in 0..chunk.len {
            let (q, k) = (&chunk.q[i * key_dim..][..key_dim], &chunk.k[i * key_dim..][..key_dim]);
            p.qk[i * p.stride + i] = q.iter().zip(k).zip(chunk.bonus).map(|((q, k), u)| q * k * u).sum();
        }
    }
    if o.erase == Erase::None {
        return;
    }
    let rows = chunk.a.chunks_exact(key_dim).zip(p.a_faded.chunks_exact_mut(key_dim));
    rows.enumerate().for_each(|(w, (row, out))| p.fading.fade(row, erase_at(&o, w), out));
    let erasers = Readers {
        plain: chunk.a,
        faded: &p.a_faded,
        at: &|w| erase_at(&o, w),
        seen: &|w| w,
        rows: chunk.writes,
        zeros: true,
    };
    scores(simd, &erasers, k, &p.fading, &mut p.ak, ahead);
    if o.erase == Erase::Untied {
        b.set(simd, chunk.b, &p.fading, &mut work.weighed);
        scores(simd, &erasers, b, &p.fading, &mut p.ab, ahead);
        if reads {
            scores(simd, &queries, b, &p.fading, &mut p.qb, ahead);
        }
    }
}

/// What is written, of all columns: `U` of the tied erase, else the values.
pub(super) fn written<'a>(chunk: &Piece<'a>, solved: &'a [f32], erase: Erase) -> &'a [f32] {
    if erase == Erase::Tied { &solved[..chunk.v.len()] } else { chunk.v }
}

/// `q o down`, where every query stands.
#[inline(always)]
pub(super) fn fade_queries(chunk: &Piece<'_>, x: &mut Scratch) {
    let (o, key_dim) = (x.options, x.options.key_dim);
    let Prepared { fading, q_faded, .. } = &mut x.prepared;
    let rows = chunk.q.chunks_exact(key_dim).zip(q_faded.chunks_exact_mut(key_dim));
    rows.enumerate().for_each(|(i, (row, out))| fading.fade(row, read_at(&o, i), out));
}
