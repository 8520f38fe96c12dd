//! The keys of one head, made ready: bytes, their scales and norms by group.

use super::{Stage, is_tame, norm, quads, round, scale_of};
use crate::scores::HeadRows;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Keys that share a scale and a bound.
pub(in super::super) const GROUP: usize = 64;
/// Keys of a task.
const CHUNK: usize = 8 * GROUP;
/// Unsigned bytes are signed ones plus 128.
const UNSIGNED: u32 = 0x8080_8080;

/// See the module.
pub(in super::super) struct Keys<'a> {
    pub(in super::super) rows: HeadRows<'a>,
    pub(super) stage: Stage,
    /// What the keys are shifted by; 0 in f32.
    mean: Vec<f32>,
    /// Unsigned bytes, `[n_kv, quads]`; nothing in f32.
    pub(super) codes: Vec<u32>,
    pub(super) groups: Vec<Group>,
    /// Ascending.
    wild: Vec<u32>,
    /// Largest norms of all that are not wild: as scored, and as given.
    pub(super) scored: f32,
    pub(super) given: f32,
}

/// Keys that follow each other; norms are the largest of those that are not wild.
#[derive(Debug, Default, Clone)]
pub(super) struct Group {
    pub(super) scale: f32,
    /// What is scored.
    pub(super) scored: f32,
    /// What rounding took away.
    pub(super) lost: f32,
    given: f32,
    wild: Vec<u32>,
}

impl<'a> Keys<'a> {
    pub(in super::super) fn new(isa: Isa, rows: HeadRows<'a>, stage: Stage) -> Self {
        let mean = match stage {
            Stage::F32 => vec![0.0; rows.width()],
            Stage::Bytes(_) => mean(isa, rows),
        };
        Self::shifted(isa, rows, stage, mean)
    }

    /// Every `step`-th key, with the same shift.
    pub(in super::super) fn every(&self, isa: Isa, step: usize) -> Self {
        Self::shifted(isa, self.rows.every(step), self.stage, self.mean.clone())
    }

    fn shifted(isa: Isa, rows: HeadRows<'a>, stage: Stage, mean: Vec<f32>) -> Self {
        let (n, width) = (rows.len(), rows.width());
        let n_quads = if matches!(stage, Stage::Bytes(_)) { quads(width) } else { 0 };
        let (mut codes, mut groups) = (vec![0; n * n_quads], vec![Group::default(); n.div_ceil(GROUP)]);
        let mut rest = codes.as_mut_slice();
        let tasks: Vec<_> = groups
            .chunks_mut(CHUNK / GROUP)
            .enumerate()
            .map(|(at, groups)| {
                let range = at * CHUNK..((at + 1) * CHUNK).min(n);
                let (codes, tail) = std::mem::take(&mut rest).split_at_mut(range.len() * n_quads);
                rest = tail;
                (range, codes, groups)
            })
            .collect();
        for_each_task(
            tasks.into_iter(),
            || (),
            |(), (range, codes, groups)| {
                isa.run(Chunk { rows, range, mean: &mean, codes, n_quads, groups });
            },
        );
        let largest = |norm: fn(&Group) -> f32| groups.iter().map(norm).fold(0.0, f32::max);
        let (scored, given) = (largest(|group| group.scored), largest(|group| group.given));
        let wild = groups.iter_mut().flat_map(|group| std::mem::take(&mut group.wild)).collect();
        Self { rows, stage, mean, codes, groups, wild, scored, given }
    }

    /// Wild keys below `end`.
    pub(in super::super) fn wild(&self, end: usize) -> &[u32] {
        &self.wild[..self.wild.partition_point(|key| (*key as usize) < end)]
    }

    pub(in super::super) fn is_wild(&self, key: usize) -> bool {
        !self.wild.is_empty() && self.wild.binary_search(&(key as u32)).is_ok()
    }
}

/// The mean of the rows that are not wild.
fn mean(isa: Isa, rows: HeadRows<'_>) -> Vec<f32> {
    let n_chunks = rows.len().div_ceil(CHUNK);
    let mut sums = vec![(vec![0.0f64; rows.width()], 0usize); n_chunks];
    for_each_task(
        sums.iter_mut().enumerate(),
        || (),
        |(), (at, (sum, count))| {
            *count = isa.run(ChunkSum { rows, range: at * CHUNK..((at + 1) * CHUNK).min(rows.len()), sum });
        },
    );
    let count = sums.iter().map(|(_, count)| *count).sum::<usize>().max(1) as f64;
    let of = |c: usize| (sums.iter().map(|(sum, _)| sum[c]).sum::<f64>() / count) as f32;
    (0..rows.width()).map(of).collect()
}

struct ChunkSum<'a, 'o> {
    rows: HeadRows<'a>,
    range: Range<usize>,
    sum: &'o mut [f64],
}

impl SimdOp for ChunkSum<'_, '_> {
    /// Rows in the sum.
    type Output = usize;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> usize {
        let mut row = vec![0.0; self.rows.width()];
        let mut count = 0;
        for i in self.range {
            self.rows.read(simd, i..i + 1, &mut row);
            if is_tame(norm(&row)) {
                self.sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(*x));
                count += 1;
            }
        }
        count
    }
}

/// Some groups.
struct Chunk<'a, 'o> {
    rows: HeadRows<'a>,
    range: Range<usize>,
    mean: &'o [f32],
    /// `[range.len(), n_quads]`.
    codes: &'o mut [u32],
    n_quads: usize,
    groups: &'o mut [Group],
}

impl SimdOp for Chunk<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, range, mean, codes, n_quads, groups } = self;
        let width = rows.width();
        let mut values = vec![0.0; GROUP * width];
        for (at, group) in groups.iter_mut().enumerate() {
            let first = range.start + at * GROUP;
            let keys = first..(first + GROUP).min(range.end);
            let values = &mut values[..keys.len() * width];
            rows.read(simd, keys.clone(), values);
            let mut largest = 0.0f32;
            for (key, row) in keys.zip(values.chunks_exact_mut(width)) {
                let given = norm(row);
                if is_tame(given) {
                    group.given = group.given.max(given);
                    row.iter_mut().zip(mean).for_each(|(x, mean)| *x -= mean);
                    largest = row.iter().fold(largest, |most, x| most.max(x.abs()));
                } else {
                    group.wild.push(key as u32);
                    row.fill(0.0);
                }
            }
            group.scale = scale_of(largest);
            for (key, row) in values.chunks_exact(width).enumerate() {
                let shifted = norm(row);
                group.scored = group.scored.max(shifted);
                if n_quads > 0 {
                    let codes = &mut codes[(at * GROUP + key) * n_quads..][..n_quads];
                    let rounded = round(row, group.scale, codes, 1);
                    codes.iter_mut().for_each(|quad| *quad ^= UNSIGNED);
                    group.scored = group.scored.max(rounded.kept);
                    // The shift itself was rounded, too.
                    group.lost = group.lost.max(rounded.lost + 4.0 * f32::EPSILON * shifted);
                }
            }
        }
    }
}
