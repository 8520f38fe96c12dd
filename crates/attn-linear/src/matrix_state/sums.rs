//! Few heads on many threads where nothing is erased: groups of chunks apart.
//!
//! What a chunk adds to the state does not need the state, and neither do its scores:
//!
//! ```text
//! T_c = (K o end)^T V        S_(c+1) = down_last o S_c + T_c        O_c = scale ((q o down) S_c + A V)
//! ```
//!
//! A thread takes the next group of chunks and finds scores and `T_c` of all of them. It waits for the state that the group
//! before leaves, takes it through the `T_c`, where it keeps every `S_c`, and hands it on: nothing else is one after another.
//! Then it reads. Every number is computed by the operations of one thread in their order: the bits are the same.

use super::attend::{Ahead, Direct, On, pauses};
use super::chunk::Chunk;
use super::head::{self, Coming, HeadRows, Step, Widened};
use super::options::{Decay, Options};
use super::run::{Call, Workspace, store};
use super::scratch::{Prepared, Read, Working};
use super::variant::Reads;
use super::write::write;
use super::{Piece, read};
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdBase, SimdFloat, SimdOp};
use attn_core::tile::{Start, prefetch};
use attn_core::view::RowsMut;
use attn_core::{DType, Element};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Chunks of a group, and whose output is one piece.
pub(super) const GROUP: usize = 8;

/// Looks at the turn before a thread sleeps: what it waits for takes microseconds.
const LOOKS: usize = 2000;

/// What a chunk is on its way.
pub(super) struct Slot<'a> {
    pub(super) chunk: Chunk,
    pub(super) prepared: Prepared,
    pub(super) wide: Widened<'a>,
}

impl Slot<'_> {
    pub(super) fn new<E: Element>(call: &Call<'_>, len: usize) -> Self {
        let o = &call.plan.stages[0];
        Self {
            chunk: Chunk::new(o, len),
            prepared: Prepared::new(o, len),
            wide: Widened::new(call.plan, call.sizes, E::DTYPE != DType::F32),
        }
    }
}

/// Bytes that every thread has beside its workspace.
pub(super) fn bytes(o: &Options) -> u64 {
    let len = o.chunk_len;
    let slot = Prepared::bytes(o, len) + 4 * (Chunk::floats(o, len) + o.state_len());
    (GROUP * slot + Working::bytes(o, len) + Read::bytes(o, len)) as u64
}

/// A head on its way: whose turn the state is, and the state.
pub(super) struct Track<'a, 'b, E> {
    rows: &'b HeadRows<'a, E>,
    /// The group that waits for the state; [`FAILED`] if it will never come.
    turn: AtomicUsize,
    state: Mutex<&'b mut [f32]>,
    /// Who sleeps until the turn changes.
    sleepers: (Mutex<()>, Condvar),
}

const FAILED: usize = usize::MAX;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a, 'b, E> Track<'a, 'b, E> {
    pub(super) fn new(rows: &'b HeadRows<'a, E>, state: &'b mut [f32]) -> Self {
        let sleepers = (Mutex::new(()), Condvar::new());
        Self { rows, turn: AtomicUsize::new(0), state: Mutex::new(state), sleepers }
    }

    /// Waits for a group's turn; false if it does not come.
    fn wait(&self, group: usize) -> bool {
        let come = || [group, FAILED].contains(&self.turn.load(Ordering::Acquire));
        for _ in 0..LOOKS {
            if come() {
                break;
            }
            std::hint::spin_loop();
        }
        if !come() {
            let mut asleep = lock(&self.sleepers.0);
            while !come() {
                asleep = self.sleepers.1.wait(asleep).unwrap_or_else(PoisonError::into_inner);
            }
        }
        self.turn.load(Ordering::Acquire) == group
    }

    fn hand_on(&self, to: usize) {
        let guard = lock(&self.sleepers.0);
        self.turn.store(to, Ordering::Release);
        drop(guard);
        self.sleepers.1.notify_all();
    }
}

/// Tells who waits when a thread panics before it has handed the state on.
struct Guard<'t, 'a, 'b, E>(&'t Track<'a, 'b, E>);

impl<E> Drop for Guard<'_, '_, '_, E> {
    fn drop(&mut self) {
        self.0.hand_on(FAILED);
    }
}

/// A thread's buffers.
struct Thread<'a> {
    w: Workspace<'a>,
    slots: Vec<Slot<'a>>,
    /// `T_c`, then `S_c`, of every chunk of a group.
    states: Vec<Vec<f32>>,
    work: Working,
    read: Read,
}

impl<'a> Thread<'a> {
    fn new<E: Element>(call: &Call<'_>) -> Self {
        let o = &call.plan.stages[0];
        let len = head::chunk_len(call.plan, call.sizes);
        Self {
            w: call.workspace(E::DTYPE),
            slots: (0..GROUP).map(|_| Slot::new::<E>(call, len)).collect(),
            states: vec![vec![0.0; o.state_len()]; GROUP],
            work: Working::new(o, len),
            read: Read::new(o, len),
        }
    }

    /// A group of steps; `coming` is the first of the next one this thread is likely to take.
    fn run<E: Element>(
        &mut self,
        call: &Call<'_>,
        isa: Isa,
        track: &Track<'a, '_, E>,
        (group, steps): (usize, &[Step]),
        coming: Option<&Step>,
        out: Option<RowsMut<'a, E>>,
    ) {
        let guard = Guard(track);
        self.sum(call, isa, track.rows, steps);
        if !track.wait(group) {
            return std::mem::forget(guard);
        }
        self.advance(call, isa, &mut lock(&track.state), steps);
        track.hand_on(group + 1);
        std::mem::forget(guard);
        if let Some(out) = out {
            self.read(call, isa, track.rows, steps, coming, out);
        }
    }

    /// Scores, and what every chunk adds.
    fn sum<E: Element>(&mut self, call: &Call<'_>, isa: Isa, rows: &HeadRows<'a, E>, steps: &[Step]) {
        let o = &call.plan.stages[0];
        let Self { w, slots, states, work, .. } = self;
        for (at, ((step, slot), sum)) in steps.iter().zip(slots).zip(states).enumerate() {
            let x = rows.tokens(isa, call.variant, call.sizes, step, &mut slot.wide);
            let mut next = steps.get(at + 1).map(|next| rows.ahead(next, pauses(o, step.tokens.len()) / 2));
            let mut ahead = || next.iter_mut().for_each(Coming::fetch);
            let Slot { chunk, prepared, .. } = slot;
            w.stages.prepare(call.variant, call.plan, &x, chunk, prepared, &mut ahead);
            let chunk = head::piece(chunk, call.plan, &x, call.variant.given());
            isa.run(Sum { o, chunk, prepared, sum, work, ahead: &mut ahead });
        }
    }

    /// Takes the state through the group.
    fn advance(&mut self, call: &Call<'_>, isa: Isa, state: &mut [f32], steps: &[Step]) {
        let o = &call.plan.stages[0];
        for ((step, slot), sum) in steps.iter().zip(&self.slots).zip(&mut self.states) {
            let writes = !step.keys.is_empty();
            isa.run(Advance { o, prepared: &slot.prepared, writes, state, sum });
        }
    }

    fn read<E: Element>(
        &mut self,
        call: &Call<'_>,
        isa: Isa,
        rows: &HeadRows<'a, E>,
        steps: &[Step],
        coming: Option<&Step>,
        mut out: RowsMut<'a, E>,
    ) {
        let o = &call.plan.stages[0];
        let start = steps[0].tokens.start;
        let Self { w, slots, states, work, read, .. } = self;
        for (at, ((step, slot), state)) in steps.iter().zip(slots).zip(states).enumerate() {
            if step.tokens.is_empty() {
                continue;
            }
            let x = rows.loaded(call.sizes, isa, step, &slot.wide);
            let chunk = head::piece(&slot.chunk, call.plan, &x, call.variant.given());
            let parts = chunk.len.div_ceil(super::scores::BLOCK);
            let last = at + 1 == steps.len();
            let mut next = coming.filter(|_| last).map(|next| rows.ahead(next, parts));
            let (first, all) = (step.tokens.start - start, out.len());
            let (mut these, mut later) = out.rows_mut(first..all).split_at(step.tokens.len());
            let mut rest = 0..later.len().min(step.tokens.len());
            let mut ahead = || {
                next.iter_mut().for_each(Coming::fetch);
                let some = super::scores::BLOCK;
                rest.by_ref().take(some).for_each(|i| prefetch(later.row_mut(i)));
            };
            let direct = call.direct(&mut these);
            let stored = direct.is_some();
            let prepared = &slot.prepared;
            isa.run(ReadChunk { o, chunk, prepared, state, work, read, direct, ahead: &mut ahead });
            if !stored {
                let norms = if o.norm { &read.norms[..chunk.len] } else { &[] };
                let reads = Reads { rows: &read.rows[..chunk.len * o.value_dim], norms, scale: o.scale };
                store(call, isa, &x, &slot.chunk, reads, &mut w.out, 0..chunk.len, &mut these);
            }
        }
    }
}

/// A head, and the output's pieces, a group each.
pub(super) type Given<'a, 'b, E> = (Track<'a, 'b, E>, Vec<RowsMut<'a, E>>);

/// Runs all of these heads, of the same `steps`.
pub(super) fn run<'a, E: Element>(call: &Call<'_>, isa: Isa, steps: &[Step], heads: Vec<Given<'a, '_, E>>) {
    let groups: Vec<_> = steps.chunks(GROUP).collect();
    let threads = rayon::current_num_threads();
    let (tracks, outs): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
    let tasks = tracks.iter().zip(outs).flat_map(|(track, outs)| {
        let mut outs = outs.into_iter();
        (0..groups.len()).map(|group| (track, group, outs.next())).collect::<Vec<_>>()
    });
    // Taken in this order: whoever waits for a state waits for a group that has been taken before.
    let tasks: Vec<_> = tasks.collect();
    for_each_task(
        tasks.into_iter(),
        || Thread::new::<E>(call),
        |thread, (track, group, out)| {
            let coming = groups.get(group + threads).map(|steps| &steps[0]);
            thread.run(call, isa, track, (group, groups[group]), coming, out);
        },
    );
}

/// What a chunk adds to the state.
struct Sum<'a> {
    o: &'a Options,
    chunk: Piece<'a>,
    prepared: &'a Prepared,
    sum: &'a mut [f32],
    work: &'a mut Working,
    ahead: Ahead<'a>,
}

impl SimdOp for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, chunk, prepared, sum, work, ahead } = self;
        let on = On { o, chunk: &chunk, values: chunk.values(o.value_dim), prepared };
        write(simd, &on, sum, work, Start::Zero, ahead);
    }
}

/// `(sum, state) <- (state, down_last o state + sum)`.
struct Advance<'a> {
    o: &'a Options,
    prepared: &'a Prepared,
    /// Whether the chunk adds anything.
    writes: bool,
    state: &'a mut [f32],
    sum: &'a mut [f32],
}

impl SimdOp for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, prepared, writes, state, sum } = self;
        if !writes {
            return sum.copy_from_slice(state);
        }
        let loss = &prepared.fading.loss[..];
        let (matrix, z) = state.split_at_mut(o.matrix_len());
        let (sums, z_sum) = sum.split_at_mut(o.matrix_len());
        let rows = matrix.chunks_exact_mut(o.value_dim).zip(sums.chunks_exact_mut(o.value_dim));
        for (c, (state, sum)) in rows.enumerate() {
            advance(simd, if o.decay == Decay::Key { &loss[c..c + 1] } else { loss }, state, sum);
        }
        advance(simd, loss, z, z_sum);
    }
}

/// [`Advance`] of a row, with no loss, one or one a number: what [`super::write::fade`] and a product that is added give.
#[inline(always)]
fn advance<S: Simd>(simd: S, loss: &[f32], state: &mut [f32], sum: &mut [f32]) {
    let lanes = S::f32s::LEN;
    let each = loss.len() > 1;
    let by = loss.first().copied().unwrap_or(0.0);
    let whole = state.len() / lanes * lanes;
    for at in (0..whole).step_by(lanes) {
        let old = S::f32s::from_slice(simd, &state[at..at + lanes]);
        let more = S::f32s::from_slice(simd, &sum[at..at + lanes]);
        let by =
            if each { S::f32s::from_slice(simd, &loss[at..at + lanes]) } else { S::f32s::splat(simd, by) };
        let faded = if loss.is_empty() { old } else { by.mul_add(old, old) };
        old.store_slice(&mut sum[at..at + lanes]);
        (more + faded).store_slice(&mut state[at..at + lanes]);
    }
    for at in whole..state.len() {
        let (old, more) = (state[at], sum[at]);
        let faded = if loss.is_empty() { old } else { old + (if each { loss[at] } else { by }) * old };
        sum[at] = old;
        state[at] = more + faded;
    }
}

/// What a chunk's tokens read of the state before it and of one another.
struct ReadChunk<'a> {
    o: &'a Options,
    chunk: Piece<'a>,
    prepared: &'a Prepared,
    state: &'a [f32],
    work: &'a mut Working,
    read: &'a mut Read,
    direct: Option<Direct<'a>>,
    ahead: Ahead<'a>,
}

impl SimdOp for ReadChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { o, chunk, prepared, state, work, read: to, direct, ahead } = self;
        let on = On { o, chunk: &chunk, values: chunk.values(o.value_dim), prepared };
        read::read(simd, &on, state, work, [&mut to.rows, &mut to.norms], direct, ahead);
    }
}
