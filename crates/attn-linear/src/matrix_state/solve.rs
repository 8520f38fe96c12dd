//! The erase of a chunk: a triangular system, solved forwards; and its gradient, solved backwards.
//!
//! A block of [`BLOCK`] rows gets what the blocks before it give as one product. Within it the rows are solved in registers,
//! some columns at a time: `x_j` is done once all earlier rows are, and goes to all later ones at once.

use super::attend::{On, rows_finite};
use super::chunk::Values;
use super::scores::{BLOCK, Triangle};
use super::scratch::Working;
use super::{Erase, Options};
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};

/// The erase: `U` or `Y` into `solved`.
#[inline(always)]
pub(super) fn solve<S: Simd>(simd: S, on: &On<'_>, state: &[f32], x: &mut Working) {
    let On { o, chunk, values, prepared: p } = *on;
    let Options { key_dim, value_dim, erase, .. } = *o;
    let (writes, stride, tied) = (chunk.writes, p.stride, erase == Erase::Tied);
    // A strength multiplies what is read, hence the values come after it, row by row.
    let weak = !values.strength.is_empty();
    if tied && !weak {
        let rows = x.solved.chunks_exact_mut(value_dim).zip(values.v.chunks(values.stride)).take(writes);
        rows.for_each(|(row, v)| row.copy_from_slice(&v[..value_dim]));
    }
    product(
        simd,
        [writes, value_dim, key_dim],
        Lhs { data: &p.a_faded, row_stride: key_dim, col_stride: 1 },
        Rhs { data: state, stride: value_dim },
        TileMut { data: &mut x.solved, stride: value_dim },
        if tied && !weak { Start::Keep } else { Start::Zero },
    );
    let own = Triangle { data: &p.ak, stride, seen: &|w| w };
    if !tied {
        let v = Rhs { data: values.v, stride: values.stride };
        let finite = rows_finite(v, value_dim);
        own.multiply(simd, 0..writes, v, value_dim, finite, &mut x.solved);
    }
    let matrix = Triangle { data: if tied { &p.ak } else { &p.ab }, ..own };
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
        let weak = weak.then(|| values.rows_after(first));
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
    weak: Option<Values<'_>>,
    x: &mut [f32],
) {
    let mut done = 0;
    if rows == BLOCK && weak.is_none() {
        let block = Block { p: &p[..(BLOCK - 1) * stride + BLOCK], stride, width };
        while done + S::f32s::LEN <= width {
            block.forwards(simd, &mut x[done..]);
            done += S::f32s::LEN;
        }
    }
    if done == width {
        return;
    }
    for i in 0..rows {
        let (before, row) = x.split_at_mut(i * width);
        product(
            simd,
            [1, width - done, i],
            Lhs { data: &p[(i * stride).min(p.len())..], row_stride: stride, col_stride: 1 },
            Rhs { data: &before[done.min(before.len())..], stride: width },
            TileMut { data: &mut row[done..], stride: width },
            Start::Keep,
        );
        if let Some(Values { v, strength, stride }) = weak {
            let rows = row[..width].iter_mut().zip(&strength[i * stride..]).zip(&v[i * stride..]);
            rows.for_each(|((x, strength), v)| *x = v + strength * *x);
        }
    }
}

/// `x <- (I - P)^-T x` with `x [writes, width]`; with strengths, `x_j <- strength_j o (x_j + ..)`, where what is multiplied
/// goes to `full`.
#[inline(always)]
pub(super) fn solve_back<S: Simd>(
    simd: S,
    p: &[f32],
    stride: usize,
    [writes, width]: [usize; 2],
    strength: &[f32],
    x: &mut [f32],
    full: &mut [f32],
) {
    for first in (0..writes).step_by(BLOCK).rev() {
        let rows = BLOCK.min(writes - first);
        let own = &p[first * stride + first..];
        let these = &mut x[first * width..(first + rows) * width];
        let mut done = 0;
        if rows == BLOCK && strength.is_empty() {
            let block = Block { p: &own[..(BLOCK - 1) * stride + BLOCK], stride, width };
            while done + S::f32s::LEN <= width {
                block.backwards(simd, &mut these[done..]);
                done += S::f32s::LEN;
            }
        }
        for i in (0..rows).rev().filter(|_| done < width) {
            let (before, row) = these.split_at_mut(i * width);
            if !strength.is_empty() {
                let at = (first + i) * width..(first + i + 1) * width;
                full[at.clone()].copy_from_slice(&row[..width]);
                row.iter_mut().zip(&strength[at]).for_each(|(x, strength)| *x *= strength);
            }
            product(
                simd,
                [i, width - done, 1],
                Lhs { data: &own[i * stride..], row_stride: 1, col_stride: 1 },
                Rhs { data: &row[done..], stride: width },
                TileMut { data: &mut before[done.min(i * width)..], stride: width },
                Start::Keep,
            );
        }
        let (before, these) = x.split_at_mut(first * width);
        product(
            simd,
            [first, width, rows],
            Lhs { data: &p[first * stride..], row_stride: 1, col_stride: stride },
            Rhs { data: these, stride: width },
            TileMut { data: before, stride: width },
            Start::Keep,
        );
    }
}

/// The triangle of one block of rows.
struct Block<'a> {
    p: &'a [f32],
    stride: usize,
    /// From one row of what is solved to the next.
    width: usize,
}

// Indexed by constants once unrolled; iterators over arrays of vectors go through memory.
#[allow(clippy::needless_range_loop)]
impl Block<'_> {
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, x: &[f32]) -> [S::f32s; BLOCK] {
        let mut rows = [S::f32s::splat(simd, 0.0); BLOCK];
        for i in 0..BLOCK {
            rows[i] = S::f32s::from_slice(simd, &x[i * self.width..][..S::f32s::LEN]);
        }
        rows
    }

    #[inline(always)]
    fn store<S: Simd>(&self, _: S, rows: &[S::f32s; BLOCK], x: &mut [f32]) {
        for i in 0..BLOCK {
            rows[i].store_slice(&mut x[i * self.width..][..S::f32s::LEN]);
        }
    }

    /// `x_i += P_ij x_j` for the rows `i > j`.
    #[inline(always)]
    fn down<S: Simd, const J: usize>(&self, simd: S, x: &mut [S::f32s; BLOCK]) {
        let known = x[J];
        for i in J + 1..BLOCK {
            x[i] = S::f32s::splat(simd, self.p[i * self.stride + J]).mul_add(known, x[i]);
        }
    }

    /// `x_j += P_ij x_i` for the rows `j < i`.
    #[inline(always)]
    fn up<S: Simd, const I: usize>(&self, simd: S, x: &mut [S::f32s; BLOCK]) {
        let known = x[I];
        let p = &self.p[I * self.stride..][..BLOCK];
        // A fixed number of steps is unrolled.
        for j in 0..BLOCK - 1 {
            if j < I {
                x[j] = S::f32s::splat(simd, p[j]).mul_add(known, x[j]);
            }
        }
    }

    /// One vector of columns of `x <- (I - P)^-1 x`. Row by row by name: in a loop the rows would leave the registers.
    #[inline(always)]
    fn forwards<S: Simd>(&self, simd: S, x: &mut [f32]) {
        let mut rows = self.load(simd, x);
        self.down::<S, 0>(simd, &mut rows);
        self.down::<S, 1>(simd, &mut rows);
        self.down::<S, 2>(simd, &mut rows);
        self.down::<S, 3>(simd, &mut rows);
        self.down::<S, 4>(simd, &mut rows);
        self.down::<S, 5>(simd, &mut rows);
        self.down::<S, 6>(simd, &mut rows);
        self.down::<S, 7>(simd, &mut rows);
        self.down::<S, 8>(simd, &mut rows);
        self.down::<S, 9>(simd, &mut rows);
        self.down::<S, 10>(simd, &mut rows);
        self.down::<S, 11>(simd, &mut rows);
        self.down::<S, 12>(simd, &mut rows);
        self.down::<S, 13>(simd, &mut rows);
        self.down::<S, 14>(simd, &mut rows);
        self.store(simd, &rows, x);
    }

    /// One vector of columns of `x <- (I - P)^-T x`.
    #[inline(always)]
    fn backwards<S: Simd>(&self, simd: S, x: &mut [f32]) {
        let mut rows = self.load(simd, x);
        self.up::<S, 15>(simd, &mut rows);
        self.up::<S, 14>(simd, &mut rows);
        self.up::<S, 13>(simd, &mut rows);
        self.up::<S, 12>(simd, &mut rows);
        self.up::<S, 11>(simd, &mut rows);
        self.up::<S, 10>(simd, &mut rows);
        self.up::<S, 9>(simd, &mut rows);
        self.up::<S, 8>(simd, &mut rows);
        self.up::<S, 7>(simd, &mut rows);
        self.up::<S, 6>(simd, &mut rows);
        self.up::<S, 5>(simd, &mut rows);
        self.up::<S, 4>(simd, &mut rows);
        self.up::<S, 3>(simd, &mut rows);
        self.up::<S, 2>(simd, &mut rows);
        self.up::<S, 1>(simd, &mut rows);
        self.store(simd, &rows, x);
    }
}

const _: () = assert!(BLOCK == 16, "the rows of a block are solved by name");
