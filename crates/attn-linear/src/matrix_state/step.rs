//! One token at a time: the recurrence as it is written.
//!
//! ```text
//! S~ = S + (e^g - 1) o S      y = S^T a or S~^T a      S <- S~ + b y^T + k v^T      o = q^T S
//! ```
//!
//! The state is read and written once a write, and read once more first by an erase; bound by memory traffic. While one head's
//! state is written, out of a cache by then if there was an erase, the next one is on its way.

use super::attend::written;
use super::lanes::{across, dot};
use super::scratch::Scratch;
use super::weights::{cumulate, losses};
use super::{Decay, Erase, EraseAt, Options, Piece, Read};
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdOp};
use attn_core::tile::{MAX_LANES, prefetch_behind};

/// Some tokens, one after another.
pub(super) struct Steps<'a> {
    pub(super) chunk: Piece<'a>,
    pub(super) state: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
    /// From the state to the one that this thread takes next, or 0: it is asked for while this one is written.
    pub(super) to_next: usize,
}

impl SimdOp for Steps<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, state, scratch: x, to_next } = self;
        let (o, chunk) = (x.options, &chunk);
        let (state, z) = state.split_at_mut(o.matrix_len());
        let Options { key_dim, value_dim, .. } = o;
        for i in 0..chunk.len {
            let q = &chunk.q[i * key_dim..][..key_dim];
            for w in i * o.writes..(i + 1) * o.writes {
                let last = w == o.last_write(i);
                fade_losses(simd, chunk, w, x);
                if o.erase != Erase::None {
                    erase(simd, chunk, w, state, x);
                }
                let reads = &mut x.read.rows[i * value_dim..][..value_dim];
                let own = (o.read == Read::Pre).then(|| {
                    let k = &chunk.k[w * key_dim..];
                    let own: f32 = q.iter().zip(k).zip(chunk.bonus).map(|((q, k), u)| q * k * u).sum();
                    read_state(simd, &o, q, state, reads);
                    own
                });
                let key = |rows: &'_ [f32]| -> std::ops::Range<usize> {
                    w * key_dim..((w + 1) * key_dim).min(rows.len())
                };
                let value = w * value_dim..(w + 1) * value_dim;
                let write = Write {
                    o: &o,
                    loss: &x.prepared.fading.loss,
                    k: &chunk.k[key(chunk.k)],
                    v: &written(chunk, &x.work.solved, o.erase)[value.clone()],
                    by: (o.erase == Erase::Untied)
                        .then(|| (&chunk.b[key(chunk.b)], &x.work.solved[value.clone()])),
                    q: (last && o.read == Read::Post).then_some(q),
                    to_next: if last && i + 1 == chunk.len { to_next } else { 0 },
                };
                write.run(simd, state, reads);
                if !z.is_empty() {
                    for (c, (z, k)) in z.iter_mut().zip(write.k).enumerate() {
                        *z += write.row_loss(c) * *z + k;
                    }
                    x.read.norms[i] = across(simd, dot(simd, q, z));
                }
                if let Some(own) = own {
                    reads.iter_mut().zip(&chunk.v[value]).for_each(|(x, v)| *x += own * v);
                }
            }
        }
    }
}

/// `e^g - 1` of write `w` into the fading's `loss`.
#[inline(always)]
fn fade_losses<S: Simd>(simd: S, chunk: &Piece<'_>, w: usize, x: &mut Scratch) {
    let fading = &mut x.prepared.fading;
    let width = fading.width;
    if width > 0 {
        cumulate(&chunk.log_decay[w * width..][..width], width, &mut fading.sums);
        losses(simd, &fading.sums[..width], &mut fading.loss);
    }
}

/// `out = row^T state`, row after row of the state.
#[inline(always)]
fn read_state<S: Simd>(simd: S, o: &Options, row: &[f32], state: &[f32], out: &mut [f32]) {
    let (width, lanes) = (o.value_dim, S::f32s::LEN);
    let mut j = 0;
    while j + 8 * lanes <= width {
        read_columns::<S, 8>(simd, row, &state[j..], width, &mut out[j..]);
        j += 8 * lanes;
    }
    while j + 4 * lanes <= width {
        read_columns::<S, 4>(simd, row, &state[j..], width, &mut out[j..]);
        j += 4 * lanes;
    }
    while j + lanes <= width {
        read_columns::<S, 1>(simd, row, &state[j..], width, &mut out[j..]);
        j += lanes;
    }
    for j in j..width {
        out[j] = row.iter().zip(state[j..].iter().step_by(width)).map(|(x, s)| x * s).sum();
    }
}

/// `N` vectors of columns of [`read_state`].
#[inline(always)]
fn read_columns<S: Simd, const N: usize>(simd: S, row: &[f32], state: &[f32], width: usize, out: &mut [f32]) {
    let lanes = S::f32s::LEN;
    let mut sums = [S::f32s::splat(simd, 0.0); N];
    for (x, s) in row.iter().zip(state.chunks(width)) {
        let (x, s) = (S::f32s::splat(simd, *x), &s[..N * lanes]);
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = x.mul_add(S::f32s::from_slice(simd, &s[n * lanes..][..lanes]), *sum);
        }
    }
    sums.iter().zip(out.chunks_exact_mut(lanes)).for_each(|(sum, out)| sum.store_slice(out));
}

/// What the erase of write `w` reads, into its row of `solved`; tied, with the value added.
#[inline(always)]
fn erase<S: Simd>(simd: S, chunk: &Piece<'_>, w: usize, state: &[f32], x: &mut Scratch) {
    let o = x.options;
    let Options { key_dim, value_dim, .. } = o;
    let a = &chunk.a[w * key_dim..][..key_dim];
    let faded = &mut x.prepared.a_faded[..key_dim];
    faded.copy_from_slice(a);
    if o.erase_at == EraseAt::After {
        match o.decay {
            Decay::Scalar => faded.iter_mut().for_each(|a| *a += x.prepared.fading.loss[0] * *a),
            Decay::Key => faded.iter_mut().zip(&x.prepared.fading.loss).for_each(|(a, loss)| *a += loss * *a),
            Decay::None | Decay::Value => {}
        }
    }
    let solved = &mut x.work.solved[w * value_dim..][..value_dim];
    read_state(simd, &o, faded, state, solved);
    if o.erase == Erase::Tied {
        solved
            .iter_mut()
            .zip(chunk.strength.get(w * value_dim..).unwrap_or_default())
            .for_each(|(u, s)| *u *= s);
        solved.iter_mut().zip(&chunk.v[w * value_dim..]).for_each(|(u, v)| *u += v);
    }
}

/// One write, and the read after it.
struct Write<'a> {
    o: &'a Options,
    loss: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// The untied erase's direction and row.
    by: Option<(&'a [f32], &'a [f32])>,
    q: Option<&'a [f32]>,
    to_next: usize,
}

impl Write<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, state: &mut [f32], reads: &mut [f32]) {
        let width = self.o.value_dim;
        let mut j = 0;
        // Whole rows, where there are registers enough.
        while S::f32s::LEN == MAX_LANES && j + 8 * S::f32s::LEN <= width {
            self.columns::<S, 8>(simd, j, state, reads);
            j += 8 * S::f32s::LEN;
        }
        while j + 4 * S::f32s::LEN <= width {
            self.columns::<S, 4>(simd, j, state, reads);
            j += 4 * S::f32s::LEN;
        }
        while j + S::f32s::LEN <= width {
            self.columns::<S, 1>(simd, j, state, reads);
            j += S::f32s::LEN;
        }
        (j..width).for_each(|j| self.column(j, state, reads));
    }

    /// Loss of row `c`; that of columns is added by the caller.
    #[inline(always)]
    fn row_loss(&self, c: usize) -> f32 {
        match self.o.decay {
            Decay::None | Decay::Value => 0.0,
            Decay::Scalar => self.loss[0],
            Decay::Key => self.loss[c],
        }
    }

    #[inline(always)]
    fn columns<S: Simd, const N: usize>(&self, simd: S, j: usize, state: &mut [f32], reads: &mut [f32]) {
        let lanes = S::f32s::LEN;
        let load = |row: &[f32], n: usize| S::f32s::from_slice(simd, &row[j + n * lanes..][..lanes]);
        let zero = [S::f32s::splat(simd, 0.0); N];
        let vector = |row: &[f32]| -> [S::f32s; N] { std::array::from_fn(|n| load(row, n)) };
        let v = vector(self.v);
        let y = self.by.map_or(zero, |(_, y)| vector(y));
        let column_loss = if self.o.decay == Decay::Value { vector(self.loss) } else { zero };
        let mut read = zero;
        for (c, row) in state.chunks_exact_mut(self.o.value_dim).enumerate() {
            let row_loss = S::f32s::splat(simd, self.row_loss(c));
            let k = S::f32s::splat(simd, self.k[c]);
            if self.to_next > 0 {
                prefetch_behind(&row[j..j + N * lanes], self.to_next);
            }
            for n in 0..N {
                let old = load(row, n);
                let mut new = (row_loss + column_loss[n]).mul_add(old, old);
                if let Some((b, _)) = self.by {
                    new = S::f32s::splat(simd, b[c]).mul_add(y[n], new);
                }
                new = k.mul_add(v[n], new);
                new.store_slice(&mut row[j + n * lanes..][..lanes]);
                if let Some(q) = self.q {
                    read[n] = S::f32s::splat(simd, q[c]).mul_add(new, read[n]);
                }
            }
        }
        if self.q.is_some() {
            let out = reads[j..].chunks_exact_mut(lanes);
            read.iter().zip(out).for_each(|(read, out)| read.store_slice(out));
        }
    }

    #[inline(always)]
    fn column(&self, j: usize, state: &mut [f32], reads: &mut [f32]) {
        let mut read = 0.0;
        let column_loss = if self.o.decay == Decay::Value { self.loss[j] } else { 0.0 };
        for (c, row) in state.chunks_exact_mut(self.o.value_dim).enumerate() {
            let mut new = row[j] + (self.row_loss(c) + column_loss) * row[j];
            if let Some((b, y)) = self.by {
                new += b[c] * y[j];
            }
            new += self.k[c] * self.v[j];
            row[j] = new;
            read += self.q.map_or(0.0, |q| q[c] * new);
        }
        if self.q.is_some() {
            reads[j] = read;
        }
    }
}
