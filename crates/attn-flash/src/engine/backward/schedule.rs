//! Which block of keys meets which block of queries when: deterministic sums without waiting for each other.
//!
//! A meeting adds to the gradients of its keys and to those of its queries, so both lists of meetings, that of each key
//! block and that of each query block, have a fixed order; everything else is free. In a grid of `n` key blocks and `n` query
//! blocks, step `t` lets key block `w` meet query block `(w + t) mod n`: no block takes part twice in a step, so that all
//! meetings of a step can run at once. A meeting starts as soon as the meetings before it, in the lists of both its blocks,
//! are over: there is no barrier between steps, and grids do not wait for one another.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

/// A key block and a query block, and the meetings that wait for this one.
#[derive(Debug)]
struct Meeting {
    keys: usize,
    queries: usize,
    next: [Option<usize>; 2],
}

/// Meetings in the order in which one thread would hold them.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    meetings: Vec<Meeting>,
    /// How many meetings each one waits for.
    waits: Vec<u8>,
}

impl Schedule {
    /// Adds the meetings of a grid; `meet(w, i)` says whether the `w`-th of `keys` and the `i`-th of `queries` have anything to
    /// do with each other.
    pub(super) fn add_grid(
        &mut self,
        keys: Range<usize>,
        queries: &[usize],
        meet: impl Fn(usize, usize) -> bool,
    ) {
        let n = keys.len().max(queries.len());
        let mut of_keys: Vec<Vec<(usize, usize)>> = vec![Vec::new(); keys.len()];
        for (i, &query_block) in queries.iter().enumerate() {
            let mut before: Option<usize> = None;
            for step in 0..n {
                let w = (i + n - step) % n;
                if w >= keys.len() || !meet(w, i) {
                    continue;
                }
                let id = self.meetings.len();
                self.meetings.push(Meeting { keys: keys.start + w, queries: query_block, next: [None; 2] });
                self.waits.push(0);
                of_keys[w].push((step, id));
                if let Some(before) = before.replace(id) {
                    self.follow(before, 0, id);
                }
            }
        }
        for mut of_block in of_keys {
            of_block.sort_unstable();
            for pair in of_block.windows(2) {
                self.follow(pair[0].1, 1, pair[1].1);
            }
        }
    }

    fn follow(&mut self, before: usize, list: usize, after: usize) {
        self.meetings[before].next[list] = Some(after);
        self.waits[after] += 1;
    }

    /// How many meetings each of `n` key blocks and each of `m` query blocks has.
    pub(super) fn counts(&self, n: usize, m: usize) -> (Vec<usize>, Vec<usize>) {
        let (mut keys, mut queries) = (vec![0; n], vec![0; m]);
        for meeting in &self.meetings {
            keys[meeting.keys] += 1;
            queries[meeting.queries] += 1;
        }
        (keys, queries)
    }

    /// Holds every meeting once, on the current rayon pool. A thread makes one workspace and keeps it.
    pub(super) fn run<W>(self, start: impl Fn() -> W + Sync, hold: impl Fn(&mut W, usize, usize) + Sync) {
        let Self { meetings, waits } = self;
        let ready: BinaryHeap<_> = (0..waits.len()).filter(|id| waits[*id] == 0).map(Reverse).collect();
        let state = Mutex::new(State { ready, left: meetings.len(), waits, failed: false });
        let changed = Condvar::new();
        let worker = |_| {
            let mut workspace = None;
            while let Some(id) = next(&state, &changed) {
                let Meeting { keys, queries, next } = &meetings[id];
                let mut over = Over { state: &state, changed: &changed, next, held: false };
                hold(workspace.get_or_insert_with(&start), *keys, *queries);
                over.held = true;
            }
        };
        (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).for_each(worker);
    }
}

struct State {
    /// Meetings that can start; those first in the list first, so that a thread tends to stay with a query block.
    ready: BinaryHeap<Reverse<usize>>,
    waits: Vec<u8>,
    /// Meetings not yet over.
    left: usize,
    /// A meeting panicked: the others stop.
    failed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is never left half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a meeting that can start; `None` when all are over. Some meeting is always ready or under way on another
/// thread, since the first of those left waits for none.
fn next(state: &Mutex<State>, changed: &Condvar) -> Option<usize> {
    let mut state = lock(state);
    loop {
        if state.left == 0 || state.failed {
            return None;
        }
        if let Some(Reverse(id)) = state.ready.pop() {
            return Some(id);
        }
        state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Tells the waiting ones that a meeting is over, also when it panicked.
struct Over<'a> {
    state: &'a Mutex<State>,
    changed: &'a Condvar,
    next: &'a [Option<usize>; 2],
    held: bool,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut state = lock(self.state);
        state.failed |= !self.held;
        state.left -= 1;
        let mut started = 0;
        for &next in self.next.iter().flatten() {
            state.waits[next] -= 1;
            if state.waits[next] == 0 {
                state.ready.push(Reverse(next));
                started += 1;
            }
        }
        // One of them is taken by this thread.
        if started > 1 || state.left == 0 || state.failed {
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a grid on `threads` threads and gives what each key block and each query block met, in order.
    fn orders(
        n: usize,
        m: usize,
        threads: usize,
        meet: impl Fn(usize, usize) -> bool + Sync,
    ) -> [Vec<Vec<usize>>; 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let lists = |n| (0..n).map(|_| Mutex::new(Vec::new())).collect::<Vec<Mutex<Vec<usize>>>>();
        let (keys, queries) = (lists(n), lists(m));
        let mut schedule = Schedule::default();
        schedule.add_grid(0..n, &(0..m).collect::<Vec<_>>(), &meet);
        pool.install(|| {
            schedule.run(
                || (),
                |(), w, i| {
                    let mut both = (keys[w].try_lock().unwrap(), queries[i].try_lock().unwrap());
                    both.0.push(i);
                    both.1.push(w);
                },
            );
        });
        let plain = |lists: Vec<Mutex<Vec<usize>>>| {
            lists.into_iter().map(|list| list.into_inner().unwrap()).collect::<Vec<_>>()
        };
        [plain(keys), plain(queries)]
    }

    #[test]
    fn every_pair_meets_once_and_in_the_same_order_on_any_number_of_threads() {
        for (n, m) in [(0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4)] {
            let patterns: [fn(usize, usize) -> bool; 3] =
                [|_, _| true, |w, i| w <= i, |w, i| (w + 2 * i) % 3 != 0];
            for meet in patterns {
                let one = orders(n, m, 1, meet);
                for (w, met) in one[0].iter().enumerate() {
                    let mut met = met.clone();
                    met.sort_unstable();
                    let want: Vec<usize> = (0..m).filter(|i| meet(w, *i)).collect();
                    assert_eq!(met, want, "key block {w} of {n} x {m}");
                }
                for threads in [2, 3, 8] {
                    assert_eq!(orders(n, m, threads, meet), one, "{n} x {m} on {threads} threads");
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let mut schedule = Schedule::default();
        schedule.add_grid(0..4, &[0, 1, 2, 3], |_, _| true);
        let run = || pool.install(|| schedule.run(|| (), |(), w, i| assert!(w + i != 3, "stop")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    }
}
