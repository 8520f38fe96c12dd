//! What is kept of the keys: their codes in hash tables, and the lengths of the centred ones.

use super::hashing::{SimHash, Workspace};
use super::tables::{HashTables, SEGMENT};
use crate::routed::rows::rows_f32;
use attn_core::parallel::for_each_task;
use attn_core::{AttnShape, TensorView};
use std::ops::Range;
use std::sync::Arc;

/// Keys that are looked at together.
const PIECE: usize = 4096;

/// Hashed keys of all heads.
#[derive(Debug, Clone)]
pub struct HashedKeys {
    pub(super) hash: SimHash,
    /// One a batch entry and key/value head.
    pub(super) heads: Vec<HeadKeys>,
    pub(super) n_heads_kv: usize,
}

/// What is kept of one key/value head.
#[derive(Debug, Clone)]
pub(super) struct HeadKeys {
    /// What is subtracted from keys, once it is known.
    centre: Option<Vec<f32>>,
    pub(super) tables: HashTables,
    /// Of the centred keys. Shared with the weights of a call.
    pub(super) norms: Arc<Vec<f32>>,
    /// Keys from which the centre will be found.
    waiting: Vec<f32>,
}

impl HeadKeys {
    pub(super) fn new(centre: Option<Vec<f32>>, tables: HashTables) -> Self {
        Self { centre, tables, norms: Arc::default(), waiting: Vec::new() }
    }

    /// Hashes `rows [n, width]`, or keeps them until the keys `calibration` are there.
    fn push(
        &mut self,
        hash: &SimHash,
        mut rows: Vec<f32>,
        width: usize,
        calibration: &Range<usize>,
        scratch: &mut Workspace,
    ) {
        if self.centre.is_none() {
            self.waiting.append(&mut rows);
            if self.waiting.len() < calibration.end * width {
                return;
            }
            rows = std::mem::take(&mut self.waiting);
            self.centre = Some(mean(&rows[calibration.start * width..calibration.end * width], width));
        }
        let centre = self.centre.as_deref().unwrap_or_default();
        for row in rows.chunks_exact_mut(width) {
            row.iter_mut().zip(centre).for_each(|(x, m)| *x -= m);
        }
        let n = rows.len() / width;
        Arc::make_mut(&mut self.norms).extend(rows.chunks_exact(width).map(norm));
        let codes = hash.codes(&rows, n, scratch);
        codes.chunks_exact(codes.len() / n.max(1)).for_each(|codes| self.tables.push(codes));
    }
}

/// The mean of the rows that are finite.
fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let (mut sums, mut count) = (vec![0.0f64; width], 0.0f64);
    for row in rows.chunks_exact(width).filter(|row| row.iter().all(|x| x.is_finite())) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        count += 1.0;
    }
    sums.into_iter().map(|sum| (sum / count.max(1.0)) as f32).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn norm(row: &[f32]) -> f32 {
    dot(row, row).sqrt() as f32
}

impl HashedKeys {
    /// Appends keys `(batch, n_heads_kv, n, head_dim)`; the centre is that of the keys `calibration`.
    pub(super) fn append(&mut self, k: &TensorView<'_>, calibration: Range<usize>) {
        let (n_heads, [_, _, n, width]) = (self.n_heads_kv, k.shape());
        if width == 0 {
            // All are at the origin, and none is sampled.
            return self
                .heads
                .iter_mut()
                .for_each(|head| Arc::make_mut(&mut head.norms).extend(vec![0.0; n]));
        }
        let hash = &self.hash;
        for_each_task(self.heads.iter_mut().enumerate(), Workspace::default, |scratch, (at, head)| {
            for first in (0..n).step_by(PIECE) {
                let rows = rows_f32(k, at / n_heads, at % n_heads, first..(first + PIECE).min(n));
                head.push(hash, rows, width, &calibration, scratch);
            }
        });
    }

    /// Of each query, `[batch, n_heads_q, n_q]`: its norm, and its product with the centre of its keys.
    pub(super) fn queries(&self, q: &TensorView<'_>, s: &AttnShape) -> Vec<[f32; 2]> {
        let mut all = vec![[0.0; 2]; s.rows()];
        let of_head = |(list, numbers): (usize, &mut [[f32; 2]])| {
            let (batch, head) = (list / s.n_heads_q, list % s.n_heads_q);
            let centre = self.heads[batch * s.n_heads_kv + s.kv_head(head)].centre.as_deref();
            let rows = rows_f32(q, batch, head, 0..s.n_q);
            for (row, numbers) in rows.chunks_exact(s.head_dim.max(1)).zip(numbers) {
                *numbers = [norm(row), dot(row, centre.unwrap_or_default()) as f32];
            }
        };
        let heads = all.chunks_mut(s.n_q.max(1)).enumerate();
        match s.n_q {
            // Less than it takes to wake a thread.
            ..32 => heads.for_each(of_head),
            _ => for_each_task(heads, || (), |(), head| of_head(head)),
        }
        all
    }

    pub(super) fn bytes(&self) -> usize {
        let head = |head: &HeadKeys| {
            let centre = head.centre.as_ref().map_or(0, Vec::capacity);
            head.tables.bytes() + 4 * (centre + head.norms.capacity() + head.waiting.capacity())
        };
        self.hash.bytes() + self.heads.iter().map(head).sum::<usize>()
    }
}

/// Bytes of a hashed key: its places in the tables with the starts of their buckets, and its length.
pub(super) fn bytes_a_key(tables: usize, bits: usize) -> u64 {
    (2 * tables + 2 * tables * ((1 << bits) + 1) / SEGMENT + 4) as u64
}
