//! Runs a [`Cell`] over all heads, forwards and backwards.
//!
//! A task is one (batch, head): its arithmetic depends on nothing else, so results do not depend on the number of threads.
//! Pieces end at multiples of [`Cell::piece_len`] since the state was empty. The backward pass runs forward once more, keeps
//! the state before every piece, and goes through the pieces from the last to the first.

use super::cell::{AnyCell, Panel, PanelMut, Piece, PieceGrads};
use super::{Cell, ScanState, Tokens};
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::tile::MAX_LANES;
use attn_core::{AttnError, OutMut, OutRows, Result, TensorView};
use std::ops::Range;

/// Below this many input floats waking other threads costs more than it gives.
const SERIAL_FLOATS: usize = 1 << 14;

/// A thread's buffers for one piece.
struct Workspace {
    inputs: Vec<Buffer>,
    out: Buffer,
    scratch: Vec<f32>,
}

/// Rows padded to whole vectors.
struct Buffer {
    width: usize,
    stride: usize,
    data: Vec<f32>,
}

impl Buffer {
    fn new(width: usize, len: usize) -> Self {
        let stride = width.next_multiple_of(MAX_LANES);
        Self { width, stride, data: vec![0.0; stride * len] }
    }

    fn panel(&self) -> Panel<'_> {
        Panel { data: &self.data, stride: self.stride }
    }

    fn panel_mut(&mut self) -> PanelMut<'_> {
        PanelMut { data: &mut self.data, stride: self.stride }
    }
}

impl Workspace {
    fn new(cell: &dyn AnyCell, len: usize) -> Self {
        let len = len.min(cell.piece_len());
        Self {
            inputs: cell.inputs().into_iter().map(|width| Buffer::new(width, len)).collect(),
            out: Buffer::new(cell.out_width(), len),
            scratch: vec![0.0; cell.scratch(len)],
        }
    }
}

/// Bytes that a thread of [`forward`] allocates, its state included.
pub(crate) fn workspace_bytes<C: Cell>(cell: &C, len: usize) -> u64 {
    let cell: &dyn AnyCell = cell;
    let len = len.min(cell.piece_len());
    let rows = cell.inputs().into_iter().chain([cell.out_width()]);
    let panels: usize = rows.map(|width| width.next_multiple_of(MAX_LANES) * len).sum();
    let state: usize =
        cell.state().iter().map(|[rows, width]| rows * width.next_multiple_of(MAX_LANES)).sum();
    4 * (panels + cell.scratch(len) + state) as u64
}

/// Writes `out (batch, heads, length, out_width)`. With a `state`, it is the one before the first token, and afterwards the
/// one after the last.
///
/// # Errors
/// [`AttnError`] if `out` or `state` do not fit; nothing has then been written.
pub fn forward<C: Cell>(
    cell: &C,
    tokens: &Tokens<'_>,
    out: OutMut<'_>,
    state: Option<&mut ScanState>,
) -> Result<()> {
    let (heads, len) = (tokens.heads(), tokens.len());
    check_rows("out", out.shape(), [tokens.batch(), heads, len, Cell::out_width(cell)])?;
    let mut own = None;
    let state = match state {
        Some(state) => state,
        None => own.insert(ScanState::new(cell, tokens.sequences(), heads)),
    };
    run(cell, tokens, Some(out), state)
}

/// Moves `state` from before the first token to after the last; the outputs are not kept.
///
/// # Errors
/// [`AttnError`] if `state` does not fit.
pub(crate) fn absorb<C: Cell>(cell: &C, tokens: &Tokens<'_>, state: &mut ScanState) -> Result<()> {
    run(cell, tokens, None, state)
}

fn run(
    cell: &dyn AnyCell,
    tokens: &Tokens<'_>,
    out: Option<OutMut<'_>>,
    state: &mut ScanState,
) -> Result<()> {
    let (heads, cuts) = (tokens.heads(), tokens.cuts());
    state.check(&cell.state(), tokens.sequences(), heads)?;
    let len = cuts.iter().map(Range::len).max().unwrap_or(0);
    if len == 0 || state.positions().is_empty() || heads == 0 {
        return Ok(());
    }
    let isa = Isa::current();
    let firsts = state.positions().to_vec();
    // Outputs come batch by batch, head by head, sequence by sequence; states sequence by sequence, head by head.
    let n = cuts.len();
    let outs = out.map_or_else(Vec::new, |out| out.into_cuts(cuts.to_vec()));
    let mut outs: Vec<Option<OutRows<'_>>> = outs.into_iter().map(Some).collect();
    let tasks = state.heads_mut().into_iter().enumerate().map(|(at, state)| {
        let (sequence, head) = (at / heads, at % heads);
        Head {
            cell,
            tokens,
            at: (sequence, head),
            first: firsts[sequence],
            state,
            out: outs.get_mut((sequence / n * heads + head) * n + sequence % n).and_then(Option::take),
            snapshots: None,
        }
    });
    let tasks: Vec<_> = tasks.collect();
    let workspace = || Workspace::new(cell, len);
    if is_small(cell, tokens) {
        let mut workspace = workspace();
        tasks.into_iter().for_each(|head| head.run(isa, &mut workspace));
    } else {
        for_each_task(tasks.into_iter(), workspace, |workspace, head| head.run(isa, workspace));
    }
    state.absorbed(cuts.iter().map(Range::len));
    Ok(())
}

fn is_small(cell: &dyn AnyCell, tokens: &Tokens<'_>) -> bool {
    let row: usize = cell.inputs().iter().sum();
    tokens.batch() * tokens.heads() * tokens.len() * row < SERIAL_FLOATS
}

fn check_rows(name: &str, found: [usize; 4], expected: [usize; 4]) -> Result<()> {
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if found[a] != expected[a] {
            return Err(AttnError::shape(name, axis, found[a], expected[a]));
        }
    }
    Ok(())
}

/// The tokens `range` cut at multiples of `piece_len`, counted from `first` tokens earlier.
fn pieces(len: usize, first: usize, piece_len: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let (from, to) = (first / piece_len, (first + len).div_ceil(piece_len));
    (from..to)
        .map(move |at| (at * piece_len).max(first) - first..((at + 1) * piece_len).min(first + len) - first)
        .filter(|piece| !piece.is_empty())
}

/// One head forwards.
struct Head<'a, 's> {
    cell: &'a dyn AnyCell,
    tokens: &'a Tokens<'a>,
    /// Which sequence, which head.
    at: (usize, usize),
    /// Position of its first token.
    first: usize,
    state: Vec<&'s mut [f32]>,
    out: Option<OutRows<'s>>,
    /// Where the states before the pieces are kept.
    snapshots: Option<&'s mut Vec<f32>>,
}

impl Head<'_, '_> {
    /// The batch entry and its tokens.
    fn place(&self) -> (usize, Range<usize>) {
        let cuts = self.tokens.cuts();
        (self.at.0 / cuts.len(), cuts[self.at.0 % cuts.len()].clone())
    }

    fn run(self, isa: Isa, workspace: &mut Workspace) {
        let mut head = self;
        let (batch, tokens) = head.place();
        for rows in pieces(tokens.len(), head.first, head.cell.piece_len()) {
            if let Some(snapshots) = &mut head.snapshots {
                head.state.iter().for_each(|part| snapshots.extend_from_slice(part));
            }
            for (at, buffer) in workspace.inputs.iter_mut().enumerate() {
                let sizes = (buffer.width, buffer.stride);
                let from = tokens.start + rows.start..tokens.start + rows.end;
                head.tokens.load(at, (batch, head.at.1), from, sizes, &mut buffer.data);
            }
            let inputs: Vec<Panel<'_>> = workspace.inputs.iter().map(Buffer::panel).collect();
            let piece = Piece {
                batch: head.at.0,
                head: head.at.1,
                first: head.first + rows.start,
                len: rows.len(),
                inputs: &inputs,
            };
            let (cell, state) = (head.cell, &mut head.state);
            let (out, scratch) = (workspace.out.panel_mut(), &mut workspace.scratch);
            cell.run(isa, piece, state, out, scratch);
            if let Some(out) = &mut head.out {
                let panel = workspace.out.panel();
                for (i, to) in rows.enumerate() {
                    out.store(to, panel.row(i).iter().copied());
                }
            }
        }
    }
}

/// Gradients of a scalar by everything a cell reads.
#[derive(Debug)]
pub struct Gradients {
    /// By each input, `[batch, its heads, length, its width]`.
    pub inputs: Vec<Vec<f32>>,
    /// By the state before the first token.
    pub state: ScanState,
    /// By the parameters of each head, `[sequences * heads][params]`.
    pub params: Vec<Vec<f32>>,
}

/// Gradients, given those by the output, `(batch, heads, length, out_width)`, and by the state after the last token if it is
/// used. `state` is the one before the first token, if it was not empty. Memory: a state for every [`Cell::piece_len`] tokens.
///
/// # Errors
/// [`AttnError`] naming the argument that does not fit.
pub fn backward<C: Cell>(
    cell: &C,
    tokens: &Tokens<'_>,
    state: Option<&ScanState>,
    grad_out: &TensorView<'_>,
    grad_state: Option<&ScanState>,
) -> Result<Gradients> {
    let (sequences, heads) = (tokens.sequences(), tokens.heads());
    let last = state.map_or_else(|| ScanState::new(cell, sequences, heads), ScanState::clone);
    let grads = grad_state.map_or_else(|| ScanState::no_grad(cell, sequences, heads), ScanState::clone);
    run_back(cell, tokens, last, grad_out, grads)
}

fn run_back(
    cell: &dyn AnyCell,
    tokens: &Tokens<'_>,
    mut last: ScanState,
    grad_out: &TensorView<'_>,
    mut grads: ScanState,
) -> Result<Gradients> {
    let (batch, heads, len) = (tokens.batch(), tokens.heads(), tokens.len());
    check_rows("grad_out", grad_out.shape(), [batch, heads, len, cell.out_width()])?;
    let (sequences, cuts) = (tokens.sequences(), tokens.cuts());
    last.check(&cell.state(), sequences, heads)?;
    grads.check(&cell.state(), sequences, heads)?;
    let firsts = last.positions().to_vec();
    let widths = cell.inputs();
    let mut inputs: Vec<Vec<f32>> = widths.iter().map(|w| vec![0.0; batch * heads * len * w]).collect();
    let mut params = vec![vec![0.0; cell.params()]; sequences * heads];
    if len > 0 && batch * heads > 0 {
        let isa = Isa::current();
        let grad_tokens = Tokens::of_any_width(&[("grad_out", *grad_out)])?;
        let mut rows: Vec<Vec<&mut [f32]>> = (0..sequences * heads).map(|_| Vec::new()).collect();
        let n = cuts.len();
        for (all, width) in inputs.iter_mut().zip(&widths) {
            for (at, mut rest) in all.chunks_exact_mut(len * width).enumerate() {
                for (sequence, cut) in cuts.iter().enumerate() {
                    let (own, after) = rest.split_at_mut(cut.len() * width);
                    rows[(at / heads * n + sequence) * heads + at % heads].push(own);
                    rest = after;
                }
            }
        }
        let states = last.heads_mut().into_iter().zip(grads.heads_mut());
        let tasks = states.zip(rows).zip(&mut params).enumerate();
        let tasks = tasks.map(|(at, (((state, grad_state), rows), params))| BackHead {
            head: Head {
                cell,
                tokens,
                at: (at / heads, at % heads),
                first: firsts[at / heads],
                state,
                out: None,
                snapshots: None,
            },
            grad_out: &grad_tokens,
            grad_state,
            rows,
            params,
        });
        let tasks: Vec<_> = tasks.collect();
        let workspace = || (Workspace::new(cell, len), Workspace::new(cell, len), Vec::new());
        for_each_task(tasks.into_iter(), workspace, |workspace, task| task.run(isa, workspace));
    }
    let gathered = inputs.into_iter().zip(&widths).enumerate();
    let inputs = gathered.map(|(at, (grads, width))| tokens.gather(at, *width, grads)).collect();
    Ok(Gradients { inputs, state: grads, params })
}

/// One head backwards.
struct BackHead<'a, 's> {
    head: Head<'a, 's>,
    grad_out: &'a Tokens<'a>,
    grad_state: Vec<&'s mut [f32]>,
    rows: Vec<&'s mut [f32]>,
    params: &'s mut [f32],
}

/// Inputs and output, their gradients, snapshots.
type BackWorkspace = (Workspace, Workspace, Vec<f32>);

impl BackHead<'_, '_> {
    fn run(self, isa: Isa, (ahead, back, snapshots): &mut BackWorkspace) {
        let Self { head, grad_out, mut grad_state, mut rows, params } = self;
        let (cell, tokens, at, first) = (head.cell, head.tokens, head.at, head.first);
        let (batch, own) = head.place();
        let place = (batch, at.1);
        snapshots.clear();
        let sizes: Vec<usize> = head.state.iter().map(|part| part.len()).collect();
        Head { snapshots: Some(snapshots), ..head }.run(isa, ahead);
        let floats: usize = sizes.iter().sum();
        for (n, range) in
            pieces(own.len(), first, cell.piece_len()).enumerate().collect::<Vec<_>>().into_iter().rev()
        {
            let from = own.start + range.start..own.start + range.end;
            for (at_input, buffer) in ahead.inputs.iter_mut().enumerate() {
                let sizes = (buffer.width, buffer.stride);
                tokens.load(at_input, place, from.clone(), sizes, &mut buffer.data);
            }
            let sizes_out = (back.out.width, back.out.stride);
            grad_out.load(0, place, from, sizes_out, &mut back.out.data);
            let inputs: Vec<Panel<'_>> = ahead.inputs.iter().map(Buffer::panel).collect();
            let piece = Piece {
                batch: at.0,
                head: at.1,
                first: first + range.start,
                len: range.len(),
                inputs: &inputs,
            };
            let mut rest = &snapshots[n * floats..(n + 1) * floats];
            let mut state = Vec::with_capacity(sizes.len());
            for &size in &sizes {
                let (part, after) = rest.split_at(size);
                state.push(part);
                rest = after;
            }
            {
                let mut input_grads: Vec<PanelMut<'_>> =
                    back.inputs.iter_mut().map(Buffer::panel_mut).collect();
                let mut grad_parts: Vec<&mut [f32]> = grad_state.iter_mut().map(|part| &mut **part).collect();
                let grads = PieceGrads {
                    out: back.out.panel(),
                    state: &mut grad_parts,
                    inputs: &mut input_grads,
                    params,
                };
                cell.run_back(isa, piece, &state, grads, &mut ahead.scratch);
            }
            for (buffer, rows) in back.inputs.iter().zip(&mut rows) {
                let to = rows.chunks_exact_mut(buffer.width).skip(range.start).take(range.len());
                let panel = buffer.panel();
                to.enumerate().for_each(|(i, to)| to.copy_from_slice(&panel.row(i)[..buffer.width]));
            }
        }
    }
}
