//! Few heads on many threads: columns of the state apart.
//!
//! Neither the front end nor the scores of a chunk need the state, so chunks can be prepared at the same time. What is read,
//! erased and written needs it, one chunk after another, but no column of it needs another one:
//!
//! ```text
//! O[:, c] = scale ((q o down) S[:, c] + A U[:, c])       U[:, c] = (I - P)^-1 (V[:, c] + (a o down) S[:, c])       and so on
//! ```
//!
//! A head goes through a ring of places for groups of chunks. At any time some threads prepare groups, others take some
//! columns each through the next group that is ready, see [`super::turns`]. Columns store what they have read, unless a back
//! end wants all of it: then the last columns to pass a group do. Every number is computed by the operations of one thread in their order: the bits are the same, whichever way is taken.

use super::Piece;
use super::attend::{Ahead, Direct, On, pauses};
use super::chunk::Chunk;
use super::head::{self, Coming, HeadRows, Step};
use super::options::{Decay, Erase, Options};
use super::run::{Call, Store, Workspace, store};
use super::scratch::{Prepared, Read, Working};
use super::sums::{self, Slot};
use super::turns::{Job, Turns};
use super::variant::{Plan, Reads};
use attn_core::Element;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{MAX_LANES, prefetch};
use attn_core::view::RowsMut;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// Chunks that are prepared together, and whose output is one piece.
const GROUP: usize = 8;
/// From so many chunks a thread on it is worth while.
const MIN_CHUNKS: usize = 16;

/// How heads that are left over are done.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) heads: usize,
    /// Parts of the columns; none where groups of chunks are done apart, see [`super::sums`].
    pub(super) parts: Option<usize>,
}

impl Left {
    /// Chunks whose output is one piece.
    pub(super) fn group(self) -> usize {
        if self.parts.is_some() { GROUP } else { sums::GROUP }
    }

    /// Bytes that this takes.
    pub(super) fn bytes(self, o: &Options, threads: usize) -> u64 {
        match self.parts {
            Some(_) => self.heads as u64 * bytes(o, threads),
            None => threads as u64 * sums::bytes(o),
        }
    }
}

/// Whether this plan's chunks can be prepared without what is remembered, and columns done apart.
pub(super) fn fit(plan: &Plan) -> bool {
    let o = &plan.stages[0];
    plan.stages.len() == 1
        && plan.memory_len() == plan.matrices_len()
        && o.recurrence.is_none()
        && o.decay != Decay::Value
        && o.chunk_len > super::RECURRENT_LEN
}

/// The heads that are left over once every thread has had as many as the others, if their chunks or columns are to be done
/// apart.
pub(super) fn left_over(o: &Options, heads: usize, chunks: usize, threads: usize) -> Option<Left> {
    let left = heads.checked_rem(threads)?;
    if left == 0 || heads >= 4 * threads || chunks < MIN_CHUNKS * threads {
        return None;
    }
    if o.erase == Erase::None {
        return Some(Left { heads: left, parts: None });
    }
    let most = o.value_dim.div_ceil(MAX_LANES).min(threads);
    // The rounds that the parts take, as a share of what as many whole heads would take.
    let rounds = |parts: usize| (left * parts).div_ceil(threads) as f64 / parts as f64;
    let parts = (1..=most).min_by(|a, b| rounds(*a).total_cmp(&rounds(*b)))?;
    (parts > 1).then_some(Left { heads: left, parts: Some(parts) })
}

/// Places of a head's ring.
fn places(threads: usize) -> usize {
    2 * threads + 2
}

/// Bytes of a head's ring and parts.
fn bytes(o: &Options, threads: usize) -> u64 {
    let len = o.chunk_len;
    let chunk = Prepared::bytes(o, len) + 4 * Chunk::floats(o, len) + Read::bytes(o, len);
    (places(threads) * GROUP * chunk + Working::bytes(o, len) + 4 * o.state_len()) as u64
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place for a group of chunks, and what every part reads of it.
struct Place<'a> {
    slots: RwLock<Vec<Slot<'a>>>,
    reads: Vec<Mutex<Read>>,
}

/// Some columns of a head's state.
struct Part {
    columns: Range<usize>,
    /// Of the columns; the first part has the norm.
    options: Options,
    state: Vec<f32>,
    work: Working,
}

/// A head on its way.
pub(super) struct Track<'a, 'b, E> {
    rows: &'b HeadRows<'a, E>,
    /// The output's pieces, a group each: every part's columns, or all of them for a back end.
    outs: Vec<Vec<Mutex<RowsMut<'a, E>>>>,
    memory: Mutex<&'b mut [f32]>,
    parts: Vec<Mutex<Part>>,
    columns: Vec<Range<usize>>,
    places: Vec<Place<'a>>,
}

impl<'a, 'b, E: Element> Track<'a, 'b, E> {
    /// A head whose output is cut into groups of [`GROUP`] steps.
    pub(super) fn new(
        call: &Call<'_>,
        rows: &'b HeadRows<'a, E>,
        outs: Vec<RowsMut<'a, E>>,
        memory: &'b mut [f32],
        parts: usize,
    ) -> Self {
        let o = call.plan.stages[0];
        let len = head::chunk_len(call.plan, call.sizes);
        let vectors = o.value_dim.div_ceil(MAX_LANES);
        let edge = |part: usize| (vectors * part / parts * MAX_LANES).min(o.value_dim);
        let part = |part: usize| {
            let columns = edge(part)..edge(part + 1);
            let options = Options { value_dim: columns.len(), norm: o.norm && part == 0, ..o };
            let (matrix, sums) = memory.split_at(o.matrix_len());
            let own = matrix.chunks_exact(o.value_dim).flat_map(|row| &row[columns.clone()]);
            let sums = if options.norm { sums } else { &[] };
            let state = own.chain(sums).copied().collect();
            Part { columns, options, state, work: Working::new(&options, len) }
        };
        let parts: Vec<Part> = (0..parts).map(part).collect();
        let place = |_| Place {
            slots: RwLock::new((0..GROUP).map(|_| Slot::new::<E>(call, len)).collect()),
            reads: parts.iter().map(|part| Mutex::new(Read::new(&part.options, GROUP * len))).collect(),
        };
        let columns: Vec<_> = parts.iter().map(|part| part.columns.clone()).collect();
        let whole = 0..o.value_dim;
        let whole = std::slice::from_ref(&whole);
        let cuts = if call.variant.finishes() { whole } else { &columns[..] };
        Self {
            rows,
            outs: outs.into_iter().map(|out| out.into_columns(cuts).map(Mutex::new).collect()).collect(),
            memory: Mutex::new(memory),
            places: (0..places(rayon::current_num_threads())).map(place).collect(),
            columns,
            parts: parts.into_iter().map(Mutex::new).collect(),
        }
    }

    /// Puts a group of `steps` into a place.
    fn prepare(&self, call: &Call<'_>, isa: Isa, place: usize, steps: &[Step], w: &mut Workspace<'a>) {
        let mut slots = self.places[place].slots.write().unwrap_or_else(PoisonError::into_inner);
        for (at, (step, slot)) in steps.iter().zip(&mut *slots).enumerate() {
            let x = self.rows.tokens(isa, call.variant, call.sizes, step, &mut slot.wide);
            let pauses = step.tokens.len().div_ceil(MAX_LANES);
            let next = steps.get(at + 1);
            let mut next = next.map(|next| self.rows.ahead(next, pauses).with_values(0..0));
            let mut ahead = || next.iter_mut().for_each(Coming::fetch);
            let Slot { chunk, prepared, .. } = slot;
            w.stages.prepare(call.variant, call.plan, &x, chunk, prepared, &mut ahead);
        }
    }

    /// Takes a part through the group in a place; `next` comes after it, and `coming` is to be prepared soon.
    fn pass(
        &self,
        call: &Call<'_>,
        isa: Isa,
        [part, group, place]: [usize; 3],
        steps: &[Step],
        [next, coming]: [Option<&Step>; 2],
    ) {
        let Part { columns, options: o, state, work } = &mut *lock(&self.parts[part]);
        let place = &self.places[place];
        let (slots, mut read) =
            (place.slots.read().unwrap_or_else(PoisonError::into_inner), lock(&place.reads[part]));
        let Read { rows, norms } = &mut *read;
        let finishes = call.variant.finishes();
        let mut out = self.outs.get(group).filter(|_| !finishes).map(|parts| lock(&parts[part]));
        let mut first = 0;
        for (at, (step, slot)) in steps.iter().zip(&*slots).enumerate() {
            let x = self.rows.loaded(call.sizes, isa, step, &slot.wide);
            let chunk = head::piece(&slot.chunk, call.plan, &x, call.variant.given());
            let pauses = (pauses(o, chunk.len) - chunk.len.div_ceil(MAX_LANES)).max(1);
            let last = at + 1 == steps.len();
            let next = steps.get(at + 1).or(next);
            let next = next.map(|next| self.rows.ahead(next, pauses).with_values(columns.clone()));
            let coming =
                coming.filter(|_| last).map(|coming| self.rows.ahead(coming, pauses).with_values(0..0));
            let mut both = [next, coming];
            let tokens = first..first + step.tokens.len();
            let (mut these, mut later) = match &mut out {
                Some(out) => {
                    let all = out.len();
                    let (these, later) = out.rows_mut(first..all).split_at(tokens.len());
                    (Some(these), Some(later))
                }
                None => (None, None),
            };
            let mut stored = 0..later.as_ref().map_or(0, |later| later.len().min(tokens.len()));
            let mut ahead = || {
                both.iter_mut().flatten().for_each(Coming::fetch);
                if let Some(later) = &mut later {
                    let some = tokens.len().div_ceil(pauses);
                    stored.by_ref().take(some).for_each(|i| prefetch(later.row_mut(i)));
                }
            };
            let direct = these.as_mut().and_then(|these| call.direct(these));
            let stored_directly = direct.is_some();
            let norms = if o.norm { &mut norms[tokens.clone()] } else { &mut [][..] };
            let to = [&mut rows[tokens.start * o.value_dim..tokens.end * o.value_dim], norms];
            let (prepared, first_column) = (&slot.prepared, columns.start);
            let ahead = &mut ahead;
            isa.run(Through { chunk, prepared, o, first_column, state, work, to, direct, ahead });
            if let Some(out) = these.as_mut().filter(|_| !stored_directly) {
                let rows = &rows[tokens.start * o.value_dim..tokens.end * o.value_dim];
                let reads = Reads { rows, norms: &[], scale: o.scale };
                isa.run(Store { reads, rows: 0..tokens.len(), out });
            }
            first = tokens.end;
        }
    }

    /// Stores what a group has read behind the back end.
    fn store(
        &self,
        call: &Call<'_>,
        isa: Isa,
        [group, place]: [usize; 2],
        steps: &[Step],
        w: &mut Workspace<'a>,
    ) {
        let Some(out) = self.outs.get(group).filter(|_| call.variant.finishes()) else { return };
        let (mut out, place) = (lock(&out[0]), &self.places[place]);
        let slots = place.slots.read().unwrap_or_else(PoisonError::into_inner);
        let reads: Vec<_> = place.reads.iter().map(lock).collect();
        let o = call.plan.stages[0];
        let start = steps[0].tokens.start;
        for (step, slot) in steps.iter().zip(&*slots).filter(|(step, _)| !step.tokens.is_empty()) {
            let tokens = step.tokens.start - start..step.tokens.end - start;
            w.state.resize(tokens.len() * o.value_dim, 0.0);
            for (columns, read) in self.columns.iter().zip(&reads) {
                let from = read.rows.chunks_exact(columns.len()).skip(tokens.start);
                let to = w.state.chunks_exact_mut(o.value_dim);
                to.zip(from).for_each(|(to, from)| to[columns.clone()].copy_from_slice(from));
            }
            let norms = if o.norm { &reads[0].norms[tokens.clone()] } else { &[] };
            let reads = Reads { rows: &w.state, norms, scale: o.scale };
            let x = self.rows.loaded(call.sizes, isa, step, &slot.wide);
            store(call, isa, &x, &slot.chunk, reads, &mut w.out, tokens, &mut out);
        }
    }

    /// Puts the columns of the state together.
    fn finish(self, o: &Options) {
        let memory = self.memory.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (matrix, sums) = memory.split_at_mut(o.matrix_len());
        for part in self.parts {
            let Part { columns, options, state, .. } =
                part.into_inner().unwrap_or_else(PoisonError::into_inner);
            let rows = matrix.chunks_exact_mut(o.value_dim).zip(state.chunks_exact(options.value_dim));
            rows.for_each(|(row, own)| row[columns.clone()].copy_from_slice(own));
            if options.norm {
                sums.copy_from_slice(&state[options.matrix_len()..]);
            }
        }
    }
}

/// Runs all of these heads, of the same `steps`.
pub(super) fn run<'a, E: Element>(call: &Call<'_>, isa: Isa, steps: &[Step], tracks: Vec<Track<'a, '_, E>>) {
    let groups: Vec<_> = steps.chunks(GROUP).collect();
    let Some(first) = tracks.first() else { return };
    let threads = rayon::current_num_threads();
    let turns = Turns::new(groups.len(), tracks.len(), first.parts.len(), first.places.len(), threads);
    let start = || call.workspace(E::DTYPE);
    for_each_task(0..threads, start, |w, _| {
        turns.work(|job| match job {
            Job::Prepare { track, group, place } => tracks[track].prepare(call, isa, place, groups[group], w),
            Job::Pass { track, group, place, part, coming } => {
                let first = |group: usize| groups.get(group).map(|steps| &steps[0]);
                let next = [first(group + 1), first(coming)];
                tracks[track].pass(call, isa, [part, group, place], groups[group], next);
            }
            Job::Store { track, group, place } => {
                tracks[track].store(call, isa, [group, place], groups[group], w);
            }
        });
    });
    tracks.into_iter().for_each(|track| track.finish(&call.plan.stages[0]));
}

/// The columns from `first_column` on through a chunk.
struct Through<'a> {
    chunk: Piece<'a>,
    prepared: &'a Prepared,
    o: &'a Options,
    first_column: usize,
    state: &'a mut [f32],
    work: &'a mut Working,
    to: [&'a mut [f32]; 2],
    direct: Option<Direct<'a>>,
    ahead: Ahead<'a>,
}

impl SimdOp for Through<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { chunk, prepared, o, first_column, state, work, to, direct, ahead } = self;
        let all_columns = chunk.v.len() / chunk.writes.max(1);
        let values = chunk.values(all_columns.max(1)).columns_after(first_column);
        let on = On { o, chunk: &chunk, values, prepared };
        on.run(simd, state, work, to, direct, head::Wanted::Reads, ahead);
    }
}
