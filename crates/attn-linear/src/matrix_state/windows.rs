//! Few heads on many threads: the chunks of one head at the same time.
//!
//! Without an erase a chunk changes the state by what it forgets and what it writes, neither of which needs the state:
//!
//! ```text
//! S_(c+1) = S_c + loss_c o S_c + D_c        D_c = (k o end)^T V of chunk c
//! ```
//!
//! A window of chunks takes three passes, each on all threads: every `D_c`; the sums, rows of the state apart; every chunk's
//! reads from its `S_c`. These are the operations of one chunk after another in their order: the bits are the same, whichever
//! way is taken. The keys and values of a window are read twice, out of the cache the second time.

use super::Options;
use super::attend::pauses;
use super::head::{Coming, HeadRows, Step, Wanted};
use super::lanes::add;
use super::options::{Decay, Erase};
use super::run::{Call, Workspace, store};
use super::scores::BLOCK;
use super::variant::Plan;
use super::write::fade;
use attn_core::Element;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::prefetch;
use attn_core::view::RowsMut;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Chunks of one task.
pub(super) const GROUP: usize = 8;
/// Numbers that a window's changes of the state may hold, about.
const NUMBERS: usize = 1 << 19;
/// Parts of the state that are summed apart.
const PARTS: usize = 16;
/// From so many chunks a thread on it is worth while.
const MIN_CHUNKS: usize = 2 * GROUP;

/// Whether this plan's chunks change the state without knowing it.
pub(super) fn fit(plan: &Plan) -> bool {
    let o = &plan.stages[0];
    plan.causal
        && plan.stages.len() == 1
        && plan.memory_len() == plan.matrices_len()
        && o.erase == Erase::None
        && o.recurrence.is_none()
        && o.chunk_len > super::RECURRENT_LEN
        // What a chunk changes is written and read again: not more numbers than it has itself.
        && o.key_dim.min(o.value_dim) <= o.chunk_len * o.writes
}

/// Whether so many heads leave threads without work that their chunks have.
pub(super) fn pay(heads: usize, chunks: usize, threads: usize) -> bool {
    heads > 0 && heads < 4 * threads && !heads.is_multiple_of(threads) && chunks >= MIN_CHUNKS * threads
}

/// Groups of a window.
fn groups(o: &Options) -> usize {
    (NUMBERS / (o.state_len() * GROUP)).clamp(2, 32)
}

/// Bytes of a window.
pub(super) fn bytes(plan: &Plan) -> u64 {
    let o = &plan.stages[0];
    (4 * groups(o) * GROUP * (o.state_len() + o.decay_width())) as u64
}

/// One head, its output cut into groups of [`GROUP`] steps.
pub(super) struct Windows<'a, 'b, E> {
    pub(super) call: &'b Call<'b>,
    pub(super) rows: &'b HeadRows<'a, E>,
    pub(super) steps: &'b [Step],
    pub(super) outs: Vec<RowsMut<'a, E>>,
    pub(super) state: &'b mut [f32],
    pub(super) workspaces: &'b Pool<Workspace<'a>>,
}

/// Workspaces that threads take and give back.
pub(super) struct Pool<W>(Mutex<Vec<W>>);

impl<W> Pool<W> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn take(&self, make: impl Fn() -> W) -> Taken<'_, W> {
        let had = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Taken { one: Some(had.unwrap_or_else(make)), pool: self }
    }
}

struct Taken<'p, W> {
    one: Option<W>,
    pool: &'p Pool<W>,
}

impl<W> Drop for Taken<'_, W> {
    fn drop(&mut self) {
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).extend(self.one.take());
    }
}

/// The rows of the state that a part has.
fn part_rows(o: &Options, part: usize) -> Range<usize> {
    let per = o.key_dim.div_ceil(PARTS);
    (part * per).min(o.key_dim)..((part + 1) * per).min(o.key_dim)
}

/// Where the numbers of these rows stand in a state: those of the matrix, and their sums.
fn part_numbers(o: &Options, rows: &Range<usize>) -> [Range<usize>; 2] {
    let (width, sums) = (o.value_dim, o.matrix_len());
    let norm = if o.norm { sums + rows.start..sums + rows.end } else { 0..0 };
    [rows.start * width..rows.end * width, norm]
}

impl<'a, E: Element> Windows<'a, '_, E> {
    pub(super) fn run(self, isa: Isa) {
        let Self { call, rows, steps, outs, state, workspaces } = self;
        let o = call.plan.stages[0];
        let (numbers, width) = (o.state_len(), o.decay_width());
        let window = groups(&o) * GROUP;
        let chunks = window.min(steps.len());
        // `[part, chunk, its rows]`, so that every part is summed by itself.
        let parts: Vec<_> =
            (0..PARTS).map(|part| part_rows(&o, part)).filter(|rows| !rows.is_empty()).collect();
        let each = |rows: &Range<usize>| rows.len() * numbers / o.key_dim;
        let mut changes: Vec<Vec<f32>> = parts.iter().map(|rows| vec![0.0; chunks * each(rows)]).collect();
        let mut losses = vec![0.0; chunks * width];
        let start = || workspaces.take(|| call.workspace(E::DTYPE));
        let mut outs = outs.into_iter();
        for steps in steps.chunks(window) {
            let mut of_parts: Vec<_> = changes
                .iter_mut()
                .zip(&parts)
                .map(|(all, rows)| all.chunks_mut(GROUP * each(rows)))
                .collect();
            let mut of_losses = losses.chunks_mut((GROUP * width).max(1));
            let tasks = steps.chunks(GROUP).map(|steps| Changes {
                steps,
                changes: of_parts.iter_mut().map(|groups| groups.next().unwrap_or_default()).collect(),
                losses: of_losses.next().unwrap_or_default(),
            });
            let tasks: Vec<_> = tasks.collect();
            for_each_task(tasks.into_iter(), start, |workspace, task| {
                let Some(w) = &mut workspace.one else { return };
                task.run(call, rows, isa, &parts, w);
            });

            let mut rest = &mut *state;
            let (mut matrix, mut sums) = (Vec::new(), Vec::new());
            for (numbers, to) in [(o.value_dim, &mut matrix), (usize::from(o.norm), &mut sums)] {
                for rows in &parts {
                    let (these, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * numbers);
                    to.push(these);
                    rest = others;
                }
            }
            let tasks = changes.iter_mut().zip(&parts).zip(matrix.into_iter().zip(sums));
            let tasks = tasks.map(|((changes, rows), (matrix, sums))| Sum {
                o: &o,
                rows: rows.clone(),
                changes: &mut changes[..steps.len() * each(rows)],
                losses: &losses,
                matrix,
                sums,
            });
            let tasks: Vec<_> = tasks.collect();
            for_each_task(tasks.into_iter(), || (), |(), task| isa.run(task));

            let tasks: Vec<_> = steps.chunks(GROUP).enumerate().zip(outs.by_ref()).collect();
            for_each_task(tasks.into_iter(), start, |workspace, ((group, steps), mut out)| {
                let Some(w) = &mut workspace.one else { return };
                for (at, step) in steps.iter().enumerate() {
                    w.state.resize(numbers, 0.0);
                    for (all, rows) in changes.iter().zip(&parts) {
                        let mut from = &all[(group * GROUP + at) * each(rows)..][..each(rows)];
                        for to in part_numbers(&o, rows) {
                            let (these, others) = from.split_at(to.len());
                            w.state[to].copy_from_slice(these);
                            from = others;
                        }
                    }
                    let mut state = std::mem::take(&mut w.state);
                    let tokens =
                        step.tokens.start - steps[0].tokens.start..step.tokens.end - steps[0].tokens.start;
                    let x = rows.tokens(isa, call.variant, call.sizes, step, &mut w.wide);
                    let pauses = pauses(&o, tokens.len()) - o.key_dim.div_ceil(BLOCK);
                    let mut next = steps.get(at + 1).map(|next| rows.ahead(next, pauses));
                    let mut these = tokens.clone();
                    let mut ahead = || {
                        next.iter_mut().for_each(Coming::fetch);
                        let some = these.by_ref().take(tokens.len().div_ceil(pauses.max(1)));
                        some.for_each(|i| prefetch(out.row_mut(i)));
                    };
                    let wanted = Wanted::ReadsAlone;
                    let (reads, chunk) =
                        w.stages.run(call.variant, call.plan, &x, &mut state, wanted, &mut ahead);
                    if !tokens.is_empty() {
                        store(call, isa, &x, chunk, reads, &mut w.out, tokens, &mut out);
                    }
                    w.state = state;
                }
            });
        }
    }
}

/// What the chunks of a group change.
struct Changes<'a> {
    steps: &'a [Step],
    /// A slice of every part.
    changes: Vec<&'a mut [f32]>,
    losses: &'a mut [f32],
}

impl Changes<'_> {
    fn run<'r, E: Element>(
        self,
        call: &Call<'_>,
        rows: &HeadRows<'r, E>,
        isa: Isa,
        parts: &[Range<usize>],
        w: &mut Workspace<'r>,
    ) {
        let Self { steps, mut changes, losses } = self;
        let o = call.plan.stages[0];
        let mut change = std::mem::take(&mut w.state);
        change.resize(o.state_len(), 0.0);
        let width = o.decay_width();
        for (at, step) in steps.iter().enumerate() {
            let x = rows.tokens(isa, call.variant, call.sizes, step, &mut w.wide);
            let pauses = o.key_dim.div_ceil(BLOCK);
            let mut next = steps.get(at + 1).map(|next| rows.ahead(next, pauses).without_queries());
            let mut ahead = || next.iter_mut().for_each(Coming::fetch);
            w.stages.run(call.variant, call.plan, &x, &mut change, Wanted::Change, &mut ahead);
            losses[at * width..][..width].copy_from_slice(w.stages.engines[0].loss());
            for (all, rows) in changes.iter_mut().zip(parts) {
                let each = rows.len() * o.state_len() / o.key_dim;
                let mut to = &mut all[at * each..][..each];
                for from in part_numbers(&o, rows) {
                    let (these, others) = to.split_at_mut(from.len());
                    these.copy_from_slice(&change[from]);
                    to = others;
                }
            }
        }
        w.state = change;
    }
}

/// The states before every chunk, of some rows, from what the chunks change; the state becomes that after them.
struct Sum<'a> {
    o: &'a Options,
    rows: Range<usize>,
    changes: &'a mut [f32],
    losses: &'a [f32],
    matrix: &'a mut [f32],
    sums: &'a mut [f32],
}

impl SimdOp for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, rows, changes, losses, matrix, sums } = self;
        let width = o.decay_width();
        let mut before = vec![0.0; o.value_dim.max(sums.len())];
        for (at, change) in changes.chunks_exact_mut(matrix.len() + sums.len()).enumerate() {
            let loss = &losses[at * width..][..width];
            let (of_matrix, of_sums) = change.split_at_mut(matrix.len());
            let lines = matrix.chunks_exact_mut(o.value_dim).zip(of_matrix.chunks_exact_mut(o.value_dim));
            for (c, (row, change)) in rows.clone().zip(lines) {
                let loss = if o.decay == Decay::Key { &loss[c..c + 1] } else { loss };
                step(simd, loss, row, change, &mut before);
            }
            if !sums.is_empty() {
                let loss = if o.decay == Decay::Key { &loss[rows.clone()] } else { loss };
                step(simd, loss, sums, of_sums, &mut before);
            }
        }
    }
}

/// `row <- row + loss o row + change`, and `change` becomes the row before that.
#[inline(always)]
fn step<S: Simd>(simd: S, loss: &[f32], row: &mut [f32], change: &mut [f32], before: &mut [f32]) {
    let before = &mut before[..row.len()];
    before.copy_from_slice(row);
    fade(simd, loss, row);
    add(simd, change, row);
    change.copy_from_slice(before);
}
