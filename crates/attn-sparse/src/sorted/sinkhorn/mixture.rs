//! Weights of mixtures, and rows mixed with them.
//!
//! Rows of sources lie slot by slot, `[size, sources, width]`, so that mixing is one product a slot:
//! `mixed_e [rows, width] = R [rows, sources] source_e [sources, width]`.

use crate::sorted::rows::BLOCK;
use crate::sorted::scores::Product;
use attn_core::simd::Isa;
use attn_core::tile::Start;
use rayon::prelude::*;

/// Weights `R [rows, sources]`.
#[derive(Debug, Clone)]
pub(super) struct Weights {
    pub(super) rows: usize,
    pub(super) sources: usize,
    of: Of,
}

#[derive(Debug, Clone)]
enum Of {
    Dense(Vec<f32>),
    /// The entries of row `r` are `entries[starts[r]..starts[r + 1]]`.
    Listed {
        starts: Vec<u32>,
        entries: Vec<(u32, f32)>,
    },
}

impl Weights {
    /// All weights; listed if most are zero.
    pub(super) fn from_dense(rows: usize, sources: usize, weights: Vec<f32>) -> Self {
        let n_entries = weights.iter().filter(|w| **w != 0.0).count();
        if 4 * n_entries > weights.len() {
            return Self { rows, sources, of: Of::Dense(weights) };
        }
        let (mut starts, mut entries) = (vec![0], Vec::with_capacity(n_entries));
        for row in weights.chunks_exact(sources.max(1)) {
            entries.extend(row.iter().enumerate().filter(|(_, w)| **w != 0.0).map(|(s, w)| (s as u32, *w)));
            starts.push(entries.len() as u32);
        }
        starts.resize(rows + 1, 0);
        Self { rows, sources, of: Of::Listed { starts, entries } }
    }

    /// One source a row.
    pub(super) fn one_each(sources: usize, entries: Vec<(u32, f32)>) -> Self {
        let starts = (0..=entries.len() as u32).collect();
        Self { rows: entries.len(), sources, of: Of::Listed { starts, entries } }
    }

    /// All weights, `[rows, sources]`.
    pub(super) fn dense(&self) -> Vec<f32> {
        match &self.of {
            Of::Dense(weights) => weights.clone(),
            Of::Listed { .. } => {
                let mut weights = vec![0.0; self.rows * self.sources];
                for row in 0..self.rows {
                    self.row(row).for_each(|(source, weight)| weights[row * self.sources + source] = weight);
                }
                weights
            }
        }
    }

    /// Weights of a row that are not zero, with their sources.
    pub(super) fn row(&self, row: usize) -> Box<dyn Iterator<Item = (usize, f32)> + '_> {
        match &self.of {
            Of::Dense(weights) => {
                let row = weights[row * self.sources..][..self.sources].iter().copied().enumerate();
                Box::new(row.filter(|(_, w)| *w != 0.0))
            }
            Of::Listed { starts, entries } => {
                let row = &entries[starts[row] as usize..starts[row + 1] as usize];
                Box::new(row.iter().map(|(source, weight)| (*source as usize, *weight)))
            }
        }
    }

    /// Mixes `sources [size, sources, width]` to `[size, rows, width]`.
    pub(super) fn mix(&self, sources: &[f32], width: usize) -> Vec<f32> {
        let size = sources.len() / (self.sources * width).max(1);
        let mut mixed = vec![0.0; size * self.rows * width];
        let isa = Isa::current();
        let slots = mixed.par_chunks_mut((self.rows * width).max(1));
        slots.zip(sources.par_chunks((self.sources * width).max(1))).for_each(|(mixed, sources)| match &self
            .of
        {
            Of::Dense(weights) => {
                isa.run(Product::new([self.rows, width, self.sources], weights, sources, mixed));
            }
            Of::Listed { .. } => {
                for (row, mixed) in mixed.chunks_exact_mut(width).enumerate() {
                    for (source, weight) in self.row(row) {
                        let from = &sources[source * width..][..width];
                        mixed.iter_mut().zip(from).for_each(|(to, x)| *to += weight * x);
                    }
                }
            }
        });
        mixed
    }

    /// Gradients of sources, `[size, sources, width]`, of those of mixtures, `[size, rows, width]`.
    pub(super) fn source_gradients(&self, mixed: &[f32], width: usize) -> Vec<f32> {
        let size = mixed.len() / (self.rows * width).max(1);
        let mut grads = vec![0.0; size * self.sources * width];
        let isa = Isa::current();
        let slots = grads.par_chunks_mut((self.sources * width).max(1));
        slots.zip(mixed.par_chunks((self.rows * width).max(1))).for_each(|(grads, mixed)| match &self.of {
            Of::Dense(weights) => {
                let sizes = [self.sources, width, self.rows];
                isa.run(Product { a_transposed: true, ..Product::new(sizes, weights, mixed, grads) });
            }
            Of::Listed { .. } => {
                for (row, mixed) in mixed.chunks_exact(width).enumerate() {
                    for (source, weight) in self.row(row) {
                        let to = &mut grads[source * width..][..width];
                        to.iter_mut().zip(mixed).for_each(|(to, x)| *to += weight * x);
                    }
                }
            }
        });
        grads
    }

    /// Adds the gradients of all weights, `[rows, sources]`, of those of mixtures.
    pub(super) fn add_gradients(&self, mixed: &[f32], sources: &[f32], width: usize, grads: &mut [f32]) {
        if mixed.is_empty() || grads.is_empty() {
            return;
        }
        let mut columns = vec![0.0; sources.len()];
        let slots =
            columns.par_chunks_mut(self.sources * width).zip(sources.par_chunks(self.sources * width));
        slots.for_each(|(columns, sources)| {
            for (source, row) in sources.chunks_exact(width).enumerate() {
                row.iter().enumerate().for_each(|(p, x)| columns[p * self.sources + source] = *x);
            }
        });
        let isa = Isa::current();
        grads.par_chunks_mut(BLOCK * self.sources).enumerate().for_each(|(block, grads)| {
            let n_rows = grads.len() / self.sources;
            let slots = mixed.chunks_exact(self.rows * width).zip(columns.chunks_exact(self.sources * width));
            for (mixed, columns) in slots {
                let rows = &mixed[block * BLOCK * width..][..n_rows * width];
                let product = Product::new([n_rows, self.sources, width], rows, columns, &mut *grads);
                isa.run(Product { start: Start::Keep, ..product });
            }
        });
    }

    /// As [`Weights::add_gradients`], of the one entry of each row alone, `[rows]`.
    pub(super) fn add_entry_gradients(
        &self,
        mixed: &[f32],
        sources: &[f32],
        width: usize,
        grads: &mut [f32],
    ) {
        grads.par_iter_mut().enumerate().for_each(|(row, grad)| {
            let Some((source, _)) = self.row(row).next() else { return };
            let slots = mixed.chunks_exact(self.rows * width).zip(sources.chunks_exact(self.sources * width));
            for (mixed, sources) in slots {
                let pairs = mixed[row * width..][..width].iter().zip(&sources[source * width..]);
                *grad += pairs.map(|(g, x)| g * x).sum::<f32>();
            }
        });
    }
}
