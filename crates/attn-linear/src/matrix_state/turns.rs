//! Whose turn it is where threads work on a ring of places: which group is prepared, which columns pass which group.
//!
//! A group is prepared in the place `group % places` once the group that was there has been stored; every part passes the
//! groups one after another; a group that all parts have passed is stored. Nobody waits while there is something to do, and
//! whoever waits is told when something has been done, so the work ends with any number of threads, be it one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a thread is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// Prepare a group in a place.
    Prepare { track: usize, group: usize, place: usize },
    /// Take a part through a group; `coming` is the next one to be prepared.
    Pass { track: usize, group: usize, place: usize, part: usize, coming: usize },
    /// Store what a group has read.
    Store { track: usize, group: usize, place: usize },
}

/// What is in a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// A group that is being prepared or stored.
    Busy,
    /// A group that so many parts have passed.
    Ready(usize),
}

/// How far a head has come.
#[derive(Debug, Clone)]
struct Progress {
    /// The next group to be prepared.
    next: usize,
    places: Vec<State>,
    /// The next group of each part, and whether it is on its way.
    parts: Vec<(usize, bool)>,
}

#[derive(Debug)]
struct Board {
    tracks: Vec<Progress>,
    /// Groups that are not stored yet, of all tracks.
    left: usize,
    /// A thread has panicked: the others end.
    failed: bool,
}

/// The turns of some heads of as many groups.
#[derive(Debug)]
pub(super) struct Turns {
    groups: usize,
    /// Groups to be prepared before columns go on.
    ahead: usize,
    board: Mutex<Board>,
    done: Condvar,
}

/// Looks at the board before a thread sleeps: what it waits for takes microseconds.
const LOOKS: usize = 200;

impl Turns {
    /// So many groups of so many heads, in parts, with so many places each.
    pub(super) fn new(groups: usize, tracks: usize, parts: usize, places: usize, threads: usize) -> Self {
        let one = Progress { next: 0, places: vec![State::Free; places], parts: vec![(0, false); parts] };
        let board = Board { tracks: vec![one; tracks], left: groups * tracks, failed: false };
        Self { groups, ahead: threads.min(places - 1), board: Mutex::new(board), done: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is to be done until nothing is left.
    pub(super) fn work(&self, mut run: impl FnMut(Job)) {
        let mut before = None;
        let mut looks = 0;
        let mut board = self.lock();
        while board.left > 0 && !board.failed {
            let Some(job) = board.take(self.groups, self.ahead, before) else {
                looks += 1;
                if looks < LOOKS {
                    drop(board);
                    std::hint::spin_loop();
                    board = self.lock();
                } else {
                    board = self.done.wait(board).unwrap_or_else(PoisonError::into_inner);
                }
                continue;
            };
            drop(board);
            looks = 0;
            let guard = Guard(self);
            run(job);
            std::mem::forget(guard);
            board = self.lock();
            if let Job::Pass { track, part, .. } = job {
                before = Some((track, part));
            }
            if let Some(store) = board.finish(job) {
                drop(board);
                let guard = Guard(self);
                run(store);
                std::mem::forget(guard);
                board = self.lock();
                board.finish(store);
            }
            self.done.notify_all();
        }
    }
}

/// Tells the others when a job panics.
struct Guard<'a>(&'a Turns);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.lock().failed = true;
        self.0.done.notify_all();
    }
}

impl Board {
    /// Takes a job, with the columns of `before` if there is a choice.
    fn take(&mut self, groups: usize, ahead: usize, before: Option<(usize, usize)>) -> Option<Job> {
        let n = self.tracks.len();
        let first = before.map_or(0, |(track, _)| track);
        let tracks = || (0..n).map(move |at| (first + at) % n);
        for track in tracks() {
            let last = self.tracks[track].parts.iter().map(|(group, _)| *group).min().unwrap_or(0);
            if self.tracks[track].next < last + ahead
                && let Some(job) = self.prepare(track, groups)
            {
                return Some(job);
            }
            let own = before.filter(|(own, _)| *own == track).map_or(0, |(_, part)| part);
            if let Some(job) = self.pass(track, own) {
                return Some(job);
            }
        }
        tracks().find_map(|track| self.prepare(track, groups))
    }

    fn prepare(&mut self, track: usize, groups: usize) -> Option<Job> {
        let progress = &mut self.tracks[track];
        let (group, place) = (progress.next, progress.next % progress.places.len());
        if group == groups || progress.places[place] != State::Free {
            return None;
        }
        progress.next += 1;
        progress.places[place] = State::Busy;
        Some(Job::Prepare { track, group, place })
    }

    fn pass(&mut self, track: usize, own: usize) -> Option<Job> {
        let Progress { next, places, parts } = &mut self.tracks[track];
        let n = parts.len();
        (0..n).map(|at| (own + at) % n).find_map(|part| {
            let (group, busy) = parts[part];
            let place = group % places.len();
            let ready = !busy && group < *next && matches!(places[place], State::Ready(_));
            ready.then(|| {
                parts[part].1 = true;
                Job::Pass { track, group, place, part, coming: *next }
            })
        })
    }

    /// What follows from a job that is done.
    fn finish(&mut self, job: Job) -> Option<Job> {
        match job {
            Job::Prepare { track, place, .. } => self.tracks[track].places[place] = State::Ready(0),
            Job::Pass { track, group, place, part, .. } => {
                let Progress { places, parts, .. } = &mut self.tracks[track];
                parts[part] = (group + 1, false);
                let passed = if let State::Ready(passed) = places[place] { passed + 1 } else { 0 };
                let all = passed == parts.len();
                places[place] = if all { State::Busy } else { State::Ready(passed) };
                return all.then_some(Job::Store { track, group, place });
            }
            Job::Store { track, place, .. } => {
                self.tracks[track].places[place] = State::Free;
                self.left -= 1;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every group is prepared, then passed by every part in order, then stored, before its place is taken again.
    #[test]
    fn every_group_is_prepared_passed_and_stored_in_order() {
        for (groups, tracks, parts, places, threads) in
            [(1, 1, 2, 6, 2), (23, 1, 2, 6, 2), (40, 3, 2, 10, 4), (9, 2, 4, 3, 3), (12, 1, 3, 2, 1)]
        {
            let turns = Turns::new(groups, tracks, parts, places, threads);
            let log = Mutex::new(Vec::new());
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| turns.work(|job| log.lock().unwrap().push(job)));
                }
            });
            let log = log.into_inner().unwrap();
            assert_eq!(log.len(), groups * tracks * (2 + parts), "{groups} groups, {threads} threads");
            for of in 0..tracks {
                let mut passed = vec![0; parts];
                let mut prepared = vec![None; places];
                for job in &log {
                    match *job {
                        Job::Prepare { track, group, place } if track == of => {
                            assert_eq!(prepared[place], None, "group {group}");
                            prepared[place] = Some(group);
                        }
                        Job::Pass { track, group, place, part, .. } if track == of => {
                            assert_eq!((prepared[place], passed[part]), (Some(group), group));
                            passed[part] += 1;
                        }
                        Job::Store { track, group, place } if track == of => {
                            assert!(passed.iter().all(|passed| *passed > group));
                            assert_eq!(prepared[place].take(), Some(group));
                        }
                        _ => {}
                    }
                }
                assert_eq!(passed, vec![groups; parts]);
            }
        }
    }

    #[test]
    fn a_panic_ends_the_others() {
        let turns = Turns::new(100, 1, 2, 6, 2);
        let panicked = std::thread::scope(|scope| {
            let bad = scope.spawn(|| turns.work(|job| assert!(!matches!(job, Job::Pass { group: 1, .. }))));
            let other = scope.spawn(|| turns.work(|job| assert!(!matches!(job, Job::Pass { group: 1, .. }))));
            [bad.join().is_err(), other.join().is_err()]
        });
        assert!(panicked.contains(&true));
    }
}
