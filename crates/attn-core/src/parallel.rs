//! Independent tasks on the current rayon pool.

use rayon::prelude::*;
use std::sync::Mutex;

/// Runs every task once, each on one thread, in the order given but without waiting for one another.
///
/// A thread makes one workspace with `start` and keeps it for all its tasks. Which thread runs a task must not
/// matter: then the result does not depend on the number of threads.
pub fn for_each_task<T: Send, W>(
    tasks: impl Iterator<Item = T> + Send,
    start: impl Fn() -> W + Sync,
    run: impl Fn(&mut W, T) + Sync,
) {
    let queue = Mutex::new(tasks);
    // A panic inside `run` unwinds through rayon; the queue itself is never left half-changed.
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let worker = |_| {
        let Some(mut task) = next() else { return };
        let mut workspace = start();
        loop {
            run(&mut workspace, task);
            match next() {
                Some(following) => task = following,
                None => return,
            }
        }
    };
    if rayon::current_num_threads() == 1 {
        // The caller may as well do it: handing it over takes longer than some tasks do.
        return worker(0);
    }
    (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).for_each(worker);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_once_with_few_workspaces() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let (workspaces, mut marks) = (AtomicUsize::new(0), vec![0; 100]);
        pool.install(|| {
            let start = || workspaces.fetch_add(1, Ordering::Relaxed);
            for_each_task(marks.iter_mut(), start, |_, mark| *mark += 1);
        });
        assert_eq!(marks, vec![1; 100]);
        assert!(workspaces.into_inner() <= 3);
    }
}
