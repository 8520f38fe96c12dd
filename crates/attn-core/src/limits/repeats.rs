//! The best of many short repeats, on several threads at once.

use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

/// One repeat takes about this long: shorter than a scheduler's time slice, so that some repeats are undisturbed.
const REPEAT: Duration = Duration::from_millis(2);

/// Units of work a second, over all threads, of the best repeat within `time`.
///
/// `start()` makes a thread's data, on that thread. `work(data, rounds)` does `rounds` rounds and returns the
/// units of work done. A repeat lasts from the first thread's start to the last one's end.
pub(super) fn best_rate<Data>(
    threads: usize,
    time: Duration,
    start: impl Fn() -> Data + Sync,
    work: impl Fn(&mut Data, u64) -> u64 + Sync,
) -> f64 {
    let (begin, repeats) = (Barrier::new(threads), Mutex::new(Vec::<Repeat>::new()));
    let shared_plan = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (begin, repeats, start, work, shared_plan) = (&begin, &repeats, &start, &work, &shared_plan);
            scope.spawn(move || {
                let mut data = start();
                let own = Plan::find(time, |rounds| work(&mut data, rounds));
                // All threads follow one plan: a repeat is a barrier that everybody has to reach.
                let plan: Plan = *shared_plan.lock().expect("no thread panics").get_or_insert(own);
                for repeat in 0..plan.repeats {
                    begin.wait();
                    let from = Instant::now();
                    let units = work(&mut data, plan.rounds);
                    let to = Instant::now();
                    let mut all = repeats.lock().expect("no thread panics");
                    if all.len() == repeat {
                        all.push(Repeat { units: 0, from, to });
                    }
                    all[repeat].add(units, from, to);
                }
            });
        }
    });
    let repeats = repeats.into_inner().expect("no thread panicked");
    repeats.iter().map(Repeat::rate).fold(0.0, f64::max)
}

/// How much work a repeat is, and how many there are.
#[derive(Clone, Copy)]
struct Plan {
    rounds: u64,
    repeats: usize,
}

impl Plan {
    /// Doubles the rounds until they take [`REPEAT`]; this also warms caches and clocks up.
    fn find(time: Duration, mut work: impl FnMut(u64) -> u64) -> Self {
        let mut rounds = 1;
        loop {
            let from = Instant::now();
            work(rounds);
            let took = from.elapsed();
            if took >= REPEAT {
                let repeats = time.as_secs_f64() / took.as_secs_f64();
                return Self { rounds, repeats: (repeats as usize).max(3) };
            }
            rounds *= 2;
        }
    }
}

/// One repeat of all threads.
struct Repeat {
    units: u64,
    from: Instant,
    to: Instant,
}

impl Repeat {
    fn add(&mut self, units: u64, from: Instant, to: Instant) {
        self.units += units;
        self.from = self.from.min(from);
        self.to = self.to.max(to);
    }

    fn rate(&self) -> f64 {
        self.units as f64 / (self.to - self.from).as_secs_f64().max(1e-9)
    }
}
