//! The best keys of some consecutive queries: scores by tiles of keys, filtered as they come.

use super::approximate::{GROUP, Keys, Queries, Scored};
use super::candidates::{Best, Candidates};
use super::exact::Exact;
use super::guess::{Guess, GuessWork};
use crate::scores::{HeadRows, PANEL};
use attn_core::simd::{Simd, SimdOp};
use std::ops::Range;

/// Queries of a task: four panels share each group of keys while it is in the first-level cache.
pub(super) const BLOCK: usize = 4 * PANEL;

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    panels: Vec<Panel>,
    scored: Scored,
    guess: GuessWork,
    /// `[BLOCK, width]`, times the sign of the scale.
    x: Vec<f32>,
}

/// [`PANEL`] queries and their candidates.
struct Panel {
    queries: Queries,
    /// Thresholds that began as a guess.
    guess: [f32; PANEL],
    /// Scores below are not among the best.
    threshold: [f32; PANEL],
    candidates: Vec<Candidates>,
    /// Rows of the panel that exist.
    lanes: usize,
    /// Position of the first one on the key axis.
    position: isize,
    /// Keys that any of them sees.
    n_keys: usize,
}

/// See the module.
pub(super) struct TopRows<'a, 'o> {
    pub(super) q: HeadRows<'a>,
    pub(super) keys: &'a Keys<'a>,
    pub(super) guess: Option<&'a Guess<'a>>,
    /// Query rows, at most [`BLOCK`].
    pub(super) rows: Range<usize>,
    pub(super) causal: bool,
    pub(super) top_k: usize,
    pub(super) sign: f32,
    pub(super) workspace: &'o mut Workspace,
    /// The chosen keys of each row.
    pub(super) lists: &'o mut [Vec<u32>],
}

impl SimdOp for TopRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, keys, guess, rows, causal, top_k, sign, workspace, lists } = self;
        let (n_kv, width) = (keys.rows.len(), q.width());
        let Workspace { panels, scored, guess: guess_work, x } = workspace;
        x.resize(rows.len() * width, 0.0);
        q.read(simd, rows.clone(), x);
        if sign != 1.0 {
            x.iter_mut().for_each(|x| *x *= sign);
        }
        let n_panels = rows.len().div_ceil(PANEL);
        panels.resize_with(n_panels.max(panels.len()), Panel::new);
        let offset = n_kv as isize - q.len() as isize;
        // The last position that row `i` sees, plus one.
        let end_of = |i: usize| {
            if causal { (i as isize + offset + 1).clamp(0, n_kv as isize) as usize } else { n_kv }
        };
        for (at, panel) in panels[..n_panels].iter_mut().enumerate() {
            let first = rows.start + at * PANEL;
            let lanes = PANEL.min(rows.end - first);
            let position = if causal { first as isize + offset } else { n_kv as isize };
            let x = &x[at * PANEL * width..][..lanes * width];
            panel.start(x, keys, (top_k, lanes), position, end_of(first + lanes - 1));
            if let Some(guess) = guess {
                let n_keys = end_of(first);
                let guess = guess.thresholds(simd, &panel.queries, n_keys, scored, guess_work);
                panel.suppose(&guess);
            }
        }
        let panels = &mut panels[..n_panels];
        while panels.iter().any(|panel| panel.n_keys > 0) {
            collect(simd, keys, panels, scored);
            panels.iter_mut().for_each(Panel::take_back);
        }
        let (mut exact, mut all) = (Exact::new(keys.rows), Vec::new());
        for (at, list) in lists.iter_mut().enumerate() {
            let (panel, lane) = (&mut panels[at / PANEL], at % PANEL);
            let (x, end) =
                (x[at * width..][..width].iter().map(|x| f64::from(*x)).collect(), end_of(rows.start + at));
            if panel.queries.is_wild(lane) || panel.candidates[lane].is_crowded() {
                all.push(AllKeys { x, end, best: Best::new(top_k), list });
            } else {
                panel.candidates[lane].finish(simd, keys.wild(end), (&x, &mut exact), list);
            }
        }
        // Together: each key is read once.
        for key in 0..all.iter().map(|row| row.end).max().unwrap_or(0) {
            for AllKeys { x, end, best, .. } in &mut all {
                if key < *end {
                    best.offer(exact.score(simd, x, key as u32), key as u32);
                }
            }
        }
        for AllKeys { best, list, .. } in all {
            list.clear();
            list.extend(best.finish());
            list.sort_unstable();
        }
    }
}

/// A query that needs the true scores of all keys that it sees.
struct AllKeys<'o> {
    x: Vec<f64>,
    end: usize,
    best: Best,
    list: &'o mut Vec<u32>,
}

/// Offers all keys to all panels.
#[inline(always)]
fn collect<S: Simd>(simd: S, keys: &Keys<'_>, panels: &mut [Panel], scored: &mut Scored) {
    let most = panels.iter().map(|panel| panel.n_keys).max().unwrap_or(0);
    // From the last keys to the first: near keys often score highest, and the sooner the thresholds rise, the fewer keys
    // pass. The choice does not depend on the order.
    for first in (0..most).step_by(GROUP).rev() {
        for panel in panels.iter_mut().filter(|panel| panel.n_keys > first) {
            let group = first..(first + GROUP).min(panel.n_keys);
            scored.set(simd, keys, group.clone(), &panel.queries, &panel.threshold);
            panel.collect(simd, keys, group, scored);
        }
    }
}

impl Panel {
    fn new() -> Self {
        Self {
            queries: Queries::default(),
            guess: [f32::MIN; PANEL],
            threshold: [0.0; PANEL],
            candidates: vec![Candidates::default(); PANEL],
            lanes: 0,
            position: 0,
            n_keys: 0,
        }
    }

    #[inline(always)]
    fn start(
        &mut self,
        x: &[f32],
        keys: &Keys<'_>,
        (top_k, lanes): (usize, usize),
        position: isize,
        n_keys: usize,
    ) {
        (self.lanes, self.position, self.n_keys) = (lanes, position, n_keys);
        self.queries.set(x, keys.rows.width(), keys);
        for (lane, candidates) in self.candidates.iter_mut().enumerate() {
            candidates.start(top_k, n_keys);
            // Below every score but -inf; nothing passes for lanes without bounds or a query, or nobody asks.
            let takes = lane < lanes && !self.queries.is_wild(lane) && top_k > 0;
            self.threshold[lane] = if takes { f32::MIN } else { f32::INFINITY };
        }
        self.guess = [f32::MIN; PANEL];
    }

    /// Starts with guessed thresholds.
    fn suppose(&mut self, guess: &[f32; PANEL]) {
        for (lane, threshold) in self.threshold.iter_mut().enumerate() {
            if *threshold == f32::MIN {
                (*threshold, self.guess[lane]) = (guess[lane], guess[lane]);
            }
        }
    }

    /// After all keys were offered: those lanes start again whose guess was wrong, without one; if there are none, no further
    /// keys are wanted.
    fn take_back(&mut self) {
        let mut again = false;
        for (lane, candidates) in self.candidates.iter_mut().enumerate() {
            let right = candidates.holds(self.guess[lane]);
            self.threshold[lane] = if right { f32::INFINITY } else { f32::MIN };
            if !right {
                again = true;
                candidates.restart();
            }
            self.guess[lane] = f32::MIN;
        }
        if !again {
            self.n_keys = 0;
        }
    }

    /// Lanes whose query does not see `key`.
    #[inline(always)]
    fn hidden(&self, key: usize) -> u32 {
        match (key as isize - self.position).clamp(0, PANEL as isize) as u32 {
            n @ 0..32 => (1 << n) - 1,
            _ => u32::MAX,
        }
    }

    /// Collects the keys that reach their lane's threshold.
    #[inline(always)]
    fn collect<S: Simd>(&mut self, simd: S, keys: &Keys<'_>, group: Range<usize>, scored: &Scored) {
        for (at, key) in group.enumerate() {
            let mut reached = scored.reached[at];
            if reached == 0 {
                continue;
            }
            reached &= !self.hidden(key);
            if keys.is_wild(key) {
                reached = 0;
            }
            while reached != 0 {
                let lane = reached.trailing_zeros() as usize;
                reached &= reached - 1;
                let bounds = scored.bounds(keys, at, lane);
                let threshold = &mut self.threshold[lane];
                if bounds[1] >= *threshold {
                    self.candidates[lane].push(simd, bounds, key, threshold);
                }
            }
        }
    }
}
