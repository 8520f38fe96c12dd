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

use super::fading::{Fading, weigh};
use super::lanes::{across, dot, sum};
use super::scores::{BLOCK, Columns, Readers, Triangle, scores};
use super::{Decay, Erase, EraseAt, Options, Piece, Read};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, all_finite, product};

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
    ones: Vec<f32>,
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
}

impl SimdOp for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, scratch } = self;
        prepare(simd, &chunk, scratch);
        if scratch.options.erase != Erase::None {
            solve(simd, &chunk, state, scratch);
        }
        read(simd, &chunk, state, scratch);
        write(simd, &chunk, state, scratch);
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
        prepare(simd, &chunk, scratch);
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
pub(super) fn prepare<S: Simd>(simd: S, chunk: &Piece<'_>, x: &mut Scratch) {
    let o = x.options;
    let key_dim = o.key_dim;
    x.fading.set(simd, chunk);
    if x.fading.key_width > 1 {
        fade_queries(chunk, x);
    }
    if (chunk.len == 0 || chunk.writes == 0) && o.erase == Erase::None {
        return;
    }
    x.k.set(simd, chunk.k, &x.fading, &mut x.weighed);
    let queries = Readers {
        plain: chunk.q,
        faded: &x.q_faded,
        at: &|i| read_at(&o, i),
        seen: &|i| o.seen(i).min(chunk.writes),
        rows: chunk.len,
    };
    scores(simd, &queries, &x.k, &mut x.fading, &mut x.qk);
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
    scores(simd, &erasers, &x.k, &mut x.fading, &mut x.ak);
    if o.erase == Erase::Untied {
        x.b.set(simd, chunk.b, &x.fading, &mut x.weighed);
        scores(simd, &erasers, &x.b, &mut x.fading, &mut x.ab);
        scores(simd, &queries, &x.b, &mut x.fading, &mut x.qb);
    }
}

/// The erase: `U` or `Y` into `solved`.
#[inline(always)]
pub(super) fn solve<S: Simd>(simd: S, chunk: &Piece<'_>, state: &[f32], x: &mut Scratch) {
    let Options { key_dim, value_dim, erase, .. } = x.options;
    let (writes, stride, tied) = (chunk.writes, x.stride, erase == Erase::Tied);
    // A strength multiplies what is read, hence the values come after it, row by row.
    let weak = !chunk.strength.is_empty();
    if tied && !weak {
        x.solved[..writes * value_dim].copy_from_slice(chunk.v);
    }
    product(
        simd,
        [writes, value_dim, key_dim],
        Lhs { data: &x.a_faded, row_stride: key_dim, col_stride: 1 },
        Rhs { data: state, stride: value_dim },
        TileMut { data: &mut x.solved, stride: value_dim },
        if tied && !weak { Start::Keep } else { Start::Zero },
    );
    let own = Triangle { data: &x.ak, stride, seen: &|w| w };
    if !tied {
        let finite = all_finite(chunk.v);
        own.multiply(simd, 0..writes, chunk.v, value_dim, finite, &mut x.solved);
    }
    let matrix = Triangle { data: if tied { &x.ak } else { &x.ab }, ..own };
    for first in (0..writes).step_by(BLOCK) {
        let rows = BLOCK.min(writes - first);
        let (before, these) = x.solved.split_at_mut(first * value_dim);
        product(
            simd,
            [rows, value_dim, first],
            Lhs { data: &matrix.data[first * stride..], row_stride: stride, col_stride: 1 },
            Rhs { data: before, stride: value_dim },
            TileMut { data: these, stride: value_dim },
            Start::Keep,
        );
        let p = &matrix.data[first * stride + first..];
        let own = first * value_dim..(first + rows) * value_dim;
        let weak = weak.then(|| (&chunk.strength[own.clone()], &chunk.v[own]));
        substitute(simd, p, stride, [rows, value_dim], weak, these);
    }
}

/// `x <- (I - P)^-1 x` for one block of rows; with strengths and values, `x_i <- v_i + strength_i o (x_i + ..)`.
#[inline(always)]
fn substitute<S: Simd>(
    simd: S,
    p: &[f32],
    stride: usize,
    [rows, width]: [usize; 2],
    weak: Option<(&[f32], &[f32])>,
    x: &mut [f32],
) {
    for i in 0..rows {
        let (before, row) = x.split_at_mut(i * width);
        product(
            simd,
            [1, width, i],
            Lhs { data: &p[(i * stride).min(p.len())..], row_stride: stride, col_stride: 1 },
            Rhs { data: before, stride: width },
            TileMut { data: row, stride: width },
            Start::Keep,
        );
        if let Some((strength, v)) = weak {
            let rows = row[..width].iter_mut().zip(&strength[i * width..]).zip(&v[i * width..]);
            rows.for_each(|((x, strength), v)| *x = v + strength * *x);
        }
    }
}

/// What is written: `U` of the tied erase, else the values.
pub(super) fn written<'a>(chunk: &Piece<'a>, solved: &'a [f32], erase: Erase) -> &'a [f32] {
    if erase == Erase::Tied { &solved[..chunk.v.len()] } else { chunk.v }
}

/// `reads`.
#[inline(always)]
pub(super) fn read<S: Simd>(simd: S, chunk: &Piece<'_>, state: &[f32], x: &mut Scratch) {
    let o = x.options;
    let Options { key_dim, value_dim, .. } = o;
    product(
        simd,
        [chunk.len, value_dim, key_dim],
        Lhs {
            data: if x.fading.key_width > 1 { &x.q_faded } else { chunk.q },
            row_stride: key_dim,
            col_stride: 1,
        },
        Rhs { data: state, stride: value_dim },
        TileMut { data: &mut x.reads, stride: value_dim },
        Start::Zero,
    );
    if x.fading.key_width == 1 {
        for (i, row) in x.reads.chunks_exact_mut(value_dim).enumerate().take(chunk.len) {
            let down = read_at(&o, i).map_or(1.0, |at| x.fading.down[at]);
            row.iter_mut().for_each(|read| *read *= down);
        }
    }
    if o.norm {
        norms(simd, chunk, &state[o.matrix_len()..], x);
    }
    if chunk.writes == 0 {
        return;
    }
    let own = usize::from(o.read == Read::Pre);
    let seen = |i: usize| (o.seen(i) + own).min(chunk.writes);
    let qk = Triangle { data: &x.qk, stride: x.stride, seen: &seen };
    if o.decay == Decay::Value {
        return fade_values(simd, chunk, &qk, &o, &mut x.fading, &mut x.weighed, &mut x.reads);
    }
    let values = written(chunk, &x.solved, o.erase);
    let finite = all_finite(values);
    let blocks = (0..chunk.len).step_by(BLOCK).map(|first| first..(first + BLOCK).min(chunk.len));
    for rows in blocks.clone() {
        qk.multiply(simd, rows, values, value_dim, finite, &mut x.reads);
    }
    if o.erase == Erase::Untied {
        let finite = all_finite(&x.solved);
        let qb = Triangle { data: &x.qb, ..qk };
        for rows in blocks {
            qb.multiply(simd, rows, &x.solved, value_dim, finite, &mut x.reads);
        }
    }
}

/// `norms = (q o down) z + A 1`.
#[inline(always)]
fn norms<S: Simd>(simd: S, chunk: &Piece<'_>, z: &[f32], x: &mut Scratch) {
    let (o, key_dim) = (x.options, x.options.key_dim);
    let all = x.fading.key_width > 1;
    let rows = if all { &x.q_faded[..chunk.len * key_dim] } else { chunk.q };
    for (i, (q, norm)) in rows.chunks_exact(key_dim).zip(&mut x.norms).enumerate() {
        let at = read_at(&o, i).filter(|_| x.fading.key_width == 1);
        let past = across(simd, dot(simd, q, z)) * at.map_or(1.0, |at| x.fading.down[at]);
        let seen = o.seen(i).min(chunk.writes).next_multiple_of(MAX_LANES);
        *norm = past + across(simd, sum(simd, &x.qk[i * x.stride..][..seen]));
    }
}

/// `q o down`, where every query stands.
#[inline(always)]
pub(super) fn fade_queries(chunk: &Piece<'_>, x: &mut Scratch) {
    let (o, key_dim) = (x.options, x.options.key_dim);
    let rows = chunk.q.chunks_exact(key_dim).zip(x.q_faded.chunks_exact_mut(key_dim));
    rows.enumerate().for_each(|(i, (row, out))| x.fading.fade(row, read_at(&o, i), out));
}

/// What the chunk itself gives where values decay: `reads = down o (reads + A (V o up))`, or pair by pair.
#[inline(always)]
fn fade_values<S: Simd>(
    simd: S,
    chunk: &Piece<'_>,
    qk: &Triangle<'_>,
    o: &Options,
    fading: &mut Fading,
    weighed: &mut [f32],
    reads: &mut [f32],
) {
    let width = o.value_dim;
    let near = (0..chunk.len).take_while(|i| read_at(o, *i).is_none_or(|at| at < fading.near)).count();
    weigh(chunk.v, width, &fading.up, width, weighed);
    let weighed = &mut weighed[..chunk.v.len()];
    let finite = all_finite(weighed);
    for first in (0..near).step_by(BLOCK) {
        qk.multiply(simd, first..(first + BLOCK).min(near), weighed, width, finite, reads);
    }
    for (i, row) in reads.chunks_exact_mut(width).enumerate().take(chunk.len) {
        let at = read_at(o, i);
        if let Some(at) = at {
            row.iter_mut().zip(&fading.down[at * width..]).for_each(|(x, down)| *x *= down);
        }
        if i < near {
            continue;
        }
        let weights = &mut weighed[..width];
        for j in 0..(qk.seen)(i) {
            fading.pair_weights(simd, at, j, weights);
            let (score, v) = (qk.data[i * qk.stride + j], &chunk.v[j * width..]);
            row.iter_mut().zip(&*weights).zip(v).for_each(|((x, weight), v)| *x += score * weight * v);
        }
    }
}

/// The state after the chunk.
#[inline(always)]
pub(super) fn write<S: Simd>(simd: S, chunk: &Piece<'_>, state: &mut [f32], x: &mut Scratch) {
    let Options { key_dim, value_dim, decay, erase, .. } = x.options;
    let writes = chunk.writes;
    if writes == 0 {
        return;
    }
    let (state, z) = state.split_at_mut(x.options.matrix_len());
    let loss = &x.fading.loss;
    let rows = state.chunks_exact_mut(value_dim);
    match decay {
        Decay::None => {}
        Decay::Scalar => state.iter_mut().for_each(|s| *s += loss[0] * *s),
        Decay::Key => rows.zip(loss).for_each(|(row, loss)| row.iter_mut().for_each(|s| *s += loss * *s)),
        Decay::Value => {
            rows.for_each(|row| row.iter_mut().zip(loss).for_each(|(s, loss)| *s += loss * *s));
        }
    }
    match (z.is_empty(), decay) {
        (true, _) | (_, Decay::None | Decay::Value) => {}
        (_, Decay::Scalar) => z.iter_mut().for_each(|z| *z += loss[0] * *z),
        (_, Decay::Key) => z.iter_mut().zip(loss).for_each(|(z, loss)| *z += loss * *z),
    }
    let mut add = |keys: &[f32], values: &[f32]| {
        product(
            simd,
            [key_dim, value_dim, writes],
            Lhs { data: keys, row_stride: 1, col_stride: key_dim },
            Rhs { data: values, stride: value_dim },
            TileMut { data: &mut *state, stride: value_dim },
            Start::Keep,
        );
    };
    if decay == Decay::Value {
        weigh(chunk.v, value_dim, &x.fading.end, value_dim, &mut x.weighed);
        return add(chunk.k, &x.weighed);
    }
    let mut ending = |keys: &[f32], values: &[f32]| {
        if decay == Decay::None {
            return add(keys, values);
        }
        weigh(keys, key_dim, &x.fading.end, x.fading.width, &mut x.weighed);
        add(&x.weighed, values);
    };
    ending(chunk.k, written(chunk, &x.solved, erase));
    if erase == Erase::Untied {
        ending(chunk.b, &x.solved);
    }
    if !z.is_empty() {
        let (weights, keys) = match decay {
            Decay::None | Decay::Value => (&x.ones, chunk.k),
            Decay::Scalar => (&x.fading.end, chunk.k),
            Decay::Key => (&x.ones, &x.weighed[..chunk.k.len()]),
        };
        product(
            simd,
            [1, key_dim, writes],
            Lhs { data: weights, row_stride: 0, col_stride: 1 },
            Rhs { data: keys, stride: key_dim },
            TileMut { data: z, stride: key_dim },
            Start::Keep,
        );
    }
}
