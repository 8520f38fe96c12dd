//! What a recurrence over tokens has to say to be run.

use attn_core::simd::{Isa, Simd, SimdOp};

/// Rows of f32 on their way through a kernel: row `i` is `data[i * stride..][..stride]`, whole vectors wide. What lies behind a
/// row's own width is zero on the way in and not looked at on the way out.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
}

impl<'a> Panel<'a> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.stride]
    }
}

/// A [`Panel`] to be written.
#[derive(Debug)]
pub struct PanelMut<'a> {
    /// The numbers.
    pub data: &'a mut [f32],
    /// From one row to the next.
    pub stride: usize,
}

impl PanelMut<'_> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.stride]
    }

    /// The same panel, to be read.
    #[inline(always)]
    pub fn as_panel(&self) -> Panel<'_> {
        Panel { data: self.data, stride: self.stride }
    }
}

/// Some consecutive tokens of one head.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Which problem: the batch entry or, of packed sequences, which of all.
    pub batch: usize,
    /// Which head of the output.
    pub head: usize,
    /// Position of the first token since the state was empty. No piece reaches over a multiple of [`Cell::piece_len`].
    pub first: usize,
    /// Tokens.
    pub len: usize,
    /// The inputs, `[len, width]` each.
    pub inputs: &'a [Panel<'a>],
}

/// Gradients on their way backwards through one piece.
#[derive(Debug)]
pub struct PieceGrads<'a, 'b> {
    /// By the outputs, `[len, out_width]`.
    pub out: Panel<'a>,
    /// By each part of the state: after the piece when called, before it on return.
    pub state: &'a mut [&'b mut [f32]],
    /// By the inputs, `[len, width]` each, to be written.
    pub inputs: &'a mut [PanelMut<'b>],
    /// By the parameters of the head, to be added to.
    pub params: &'a mut [f32],
}

/// A causal map of token rows with a state of fixed size: forwards and backwards through some tokens of one head, in f32.
///
/// The [driver](super) cuts sequences into pieces, converts storage types, keeps states, spreads heads over threads, and
/// remembers for the backward pass the state before each piece.
pub trait Cell: Send + Sync {
    /// Widths of the inputs' rows.
    fn inputs(&self) -> Vec<usize>;

    /// Width of the outputs' rows.
    fn out_width(&self) -> usize;

    /// Parts of a head's state: rows, and the width of a row. In memory rows are padded to whole vectors.
    fn state(&self) -> Vec<[usize; 2]>;

    /// What part `part` of the state holds before the first token.
    fn initial(&self, part: usize) -> f32 {
        let _ = part;
        0.0
    }

    /// What the gradient by part `part` of the last state holds if nothing reads that state.
    fn initial_grad(&self, part: usize) -> f32 {
        let _ = part;
        0.0
    }

    /// Floats of a head's gradient by parameters.
    fn params(&self) -> usize {
        0
    }

    /// Most tokens of a piece; the backward pass keeps a state for each.
    fn piece_len(&self) -> usize {
        64
    }

    /// Floats of scratch for pieces of `len` tokens.
    fn scratch(&self, len: usize) -> usize;

    /// Writes `out` and moves `state` from before the piece to after it. Mark it `#[inline(always)]`.
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        scratch: &mut [f32],
    );

    /// The gradients of a piece, given the state before it. Mark it `#[inline(always)]`.
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    );
}

/// A [`Cell`] behind a pointer, so that what drives it is compiled once for all of them.
pub(super) trait AnyCell: Send + Sync {
    fn inputs(&self) -> Vec<usize>;
    fn out_width(&self) -> usize;
    fn params(&self) -> usize;
    fn piece_len(&self) -> usize;
    fn scratch(&self, len: usize) -> usize;
    fn state(&self) -> Vec<[usize; 2]>;

    /// [`Cell::forward`] on an instruction set.
    fn run(
        &self,
        isa: Isa,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        scratch: &mut [f32],
    );

    /// [`Cell::backward`] on an instruction set.
    fn run_back(
        &self,
        isa: Isa,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    );
}

impl<C: Cell> AnyCell for C {
    fn inputs(&self) -> Vec<usize> {
        Cell::inputs(self)
    }

    fn out_width(&self) -> usize {
        Cell::out_width(self)
    }

    fn params(&self) -> usize {
        Cell::params(self)
    }

    fn piece_len(&self) -> usize {
        Cell::piece_len(self)
    }

    fn scratch(&self, len: usize) -> usize {
        Cell::scratch(self, len)
    }

    fn state(&self) -> Vec<[usize; 2]> {
        Cell::state(self)
    }

    fn run(
        &self,
        isa: Isa,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        isa.run(Forward { cell: self, piece, state, out, scratch });
    }

    fn run_back(
        &self,
        isa: Isa,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        isa.run(Backward { cell: self, piece, state, grads, scratch });
    }
}

struct Forward<'a, 's, C> {
    cell: &'a C,
    piece: Piece<'a>,
    state: &'a mut [&'s mut [f32]],
    out: PanelMut<'a>,
    scratch: &'a mut [f32],
}

impl<C: Cell> SimdOp for Forward<'_, '_, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        self.cell.forward(simd, self.piece, self.state, self.out, self.scratch);
    }
}

struct Backward<'a, 'g, 'h, C> {
    cell: &'a C,
    piece: Piece<'a>,
    state: &'a [&'a [f32]],
    grads: PieceGrads<'g, 'h>,
    scratch: &'a mut [f32],
}

impl<C: Cell> SimdOp for Backward<'_, '_, '_, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        self.cell.backward(simd, self.piece, self.state, self.grads, self.scratch);
    }
}
