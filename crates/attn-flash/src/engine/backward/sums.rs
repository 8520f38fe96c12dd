//! Gradients of some rows of a head, summed in f32: in the output where it is f32, else beside it and rounded once.

use attn_core::{Element, OutRows};

/// See the module.
pub(super) struct Sums<'a> {
    out: OutRows<'a>,
    width: usize,
    /// `[rows, width]` for half types, from the first sum on.
    wide: Vec<f32>,
    started: bool,
}

impl<'a> Sums<'a> {
    pub(super) fn new(out: OutRows<'a>) -> Self {
        let width = match &out {
            OutRows::F32(out) => out.width(),
            OutRows::Bf16(out) => out.width(),
            OutRows::F16(out) => out.width(),
        };
        Self { out, width, wide: Vec::new(), started: false }
    }

    fn len(&self) -> usize {
        match &self.out {
            OutRows::F32(out) => out.len(),
            OutRows::Bf16(out) => out.len(),
            OutRows::F16(out) => out.len(),
        }
    }

    fn start(&mut self) {
        self.started = true;
        match &mut self.out {
            OutRows::F32(out) => (0..out.len()).for_each(|i| out.row_mut(i).fill(0.0)),
            _ => self.wide = vec![0.0; self.len() * self.width],
        }
    }

    /// Adds `rows [_, width]` to the rows from `first` on.
    #[inline(always)]
    pub(super) fn add(&mut self, first: usize, rows: &[f32]) {
        if !self.started {
            self.start();
        }
        let width = self.width;
        match &mut self.out {
            OutRows::F32(out) => {
                for (i, row) in (first..).zip(rows.chunks_exact(width)) {
                    out.row_mut(i).iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
            _ => self.wide[first * width..][..rows.len()].iter_mut().zip(rows).for_each(|(sum, x)| *sum += x),
        }
    }

    /// The sums are complete: rounds them, or writes zeros if there are none. `change` may first replace each row, given its
    /// number.
    pub(super) fn finish(&mut self, mut change: impl FnMut(usize, &mut [f32])) {
        if !self.started {
            self.start();
        }
        fn round<E: Element>(out: &mut [E], row: &[f32]) {
            out.iter_mut().zip(row).for_each(|(o, x)| *o = E::store(*x));
        }
        let wide = std::mem::take(&mut self.wide);
        let mut rows = wide.chunks_exact(self.width);
        let mut buffer = vec![0.0; self.width];
        for i in 0..self.len() {
            if let OutRows::F32(out) = &mut self.out {
                change(i, out.row_mut(i));
                continue;
            }
            let Some(row) = rows.next() else { return };
            buffer.copy_from_slice(row);
            change(i, &mut buffer);
            match &mut self.out {
                OutRows::F32(_) => {}
                OutRows::Bf16(out) => round(out.row_mut(i), &buffer),
                OutRows::F16(out) => round(out.row_mut(i), &buffer),
            }
        }
    }
}
