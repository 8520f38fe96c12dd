//! What a scan remembers.

use super::Cell;
use attn_core::tile::MAX_LANES;
use attn_core::{AttnError, Result};

/// The states of all heads: parts of `rows x width` floats each, in f32 whatever the inputs' dtype.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanState {
    batch: usize,
    heads: usize,
    parts: Vec<Part>,
    /// Tokens that each batch entry has absorbed.
    positions: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Part {
    rows: usize,
    width: usize,
    /// `[batch, heads, rows, width rounded up to whole vectors]`.
    data: Vec<f32>,
}

impl Part {
    fn padded(&self) -> usize {
        self.width.next_multiple_of(MAX_LANES)
    }

    fn floats(&self) -> usize {
        self.rows * self.padded()
    }
}

impl ScanState {
    /// The state before the first token.
    pub fn new<C: Cell>(cell: &C, batch: usize, heads: usize) -> Self {
        let part = |(at, [rows, width]): (usize, [usize; 2])| {
            let len = batch * heads * rows * width.next_multiple_of(MAX_LANES);
            Part { rows, width, data: vec![cell.initial(at); len] }
        };
        let parts = cell.state().into_iter().enumerate().map(part).collect();
        Self { batch, heads, parts, positions: vec![0; batch] }
    }

    /// The gradient by a last state that nothing reads.
    pub fn no_grad<C: Cell>(cell: &C, batch: usize, heads: usize) -> Self {
        let mut grad = Self::new(cell, batch, heads);
        grad.parts.iter_mut().enumerate().for_each(|(at, part)| part.data.fill(cell.initial_grad(at)));
        grad
    }

    /// Tokens absorbed by the first batch entry; without packed sequences by all.
    pub fn position(&self) -> usize {
        self.positions.first().copied().unwrap_or(0)
    }

    /// Tokens absorbed by each batch entry.
    pub(super) fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Counts `tokens` more as absorbed, as one whose state was [set](ScanState::set_part) has to.
    pub fn advance(&mut self, tokens: usize) {
        self.positions.iter_mut().for_each(|position| *position += tokens);
    }

    /// Counts the sequences of tokens as absorbed, one after another for each batch entry of `n` of them.
    pub(super) fn absorbed(&mut self, lengths: impl Iterator<Item = usize> + Clone) {
        self.positions.iter_mut().zip(lengths.cycle()).for_each(|(position, len)| *position += len);
    }

    /// Part `at` as `[batch, heads, rows, width]`, row-major.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn part(&self, at: usize) -> Vec<f32> {
        let part = &self.parts[at];
        part.data.chunks_exact(part.padded().max(1)).flat_map(|row| &row[..part.width]).copied().collect()
    }

    /// Width of the rows of part `at`.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn width(&self, at: usize) -> usize {
        self.parts[at].width
    }

    /// Replaces part `at` by `data [batch, heads, rows, width]`; `name` is for the error.
    ///
    /// # Errors
    /// [`AttnError::Shape`] if it has another length.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn set_part(&mut self, at: usize, name: &str, data: &[f32]) -> Result<()> {
        let memories = self.batch * self.heads;
        let part = &mut self.parts[at];
        let expected = memories * part.rows * part.width;
        if data.len() != expected {
            return Err(AttnError::shape(name, "elements", data.len(), expected));
        }
        let padded = part.padded().max(1);
        let rows = part.data.chunks_exact_mut(padded).zip(data.chunks_exact(part.width.max(1)));
        rows.for_each(|(to, from)| to[..from.len()].copy_from_slice(from));
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| size_of_val(&part.data[..])).sum()
    }

    /// Checks that the state is of these parts and heads.
    pub(super) fn check(&self, expected: &[[usize; 2]], batch: usize, heads: usize) -> Result<()> {
        for (axis, found, expected) in [("batch", self.batch, batch), ("heads", self.heads, heads)] {
            if found != expected {
                return Err(AttnError::shape("state", axis, found, expected));
            }
        }
        let found: Vec<[usize; 2]> = self.parts.iter().map(|part| [part.rows, part.width]).collect();
        if found != expected {
            return Err(AttnError::value(
                "state",
                format!("of parts {found:?}"),
                format!("parts {expected:?}"),
            ));
        }
        Ok(())
    }

    /// The parts of each head, batch by batch.
    pub(super) fn heads_mut(&mut self) -> Vec<Vec<&mut [f32]>> {
        let mut heads: Vec<Vec<&mut [f32]>> = (0..self.batch * self.heads).map(|_| Vec::new()).collect();
        for part in &mut self.parts {
            let floats = part.floats().max(1);
            heads.iter_mut().zip(part.data.chunks_exact_mut(floats)).for_each(|(head, p)| head.push(p));
        }
        heads
    }
}
