//! The best keys of some consecutive queries: scores by tiles of keys, filtered as they come.

use super::approximate::{Keys, Queries};
use super::candidates::{Candidates, best};
use crate::scores::{HeadRows, PANEL};
use attn_core::simd::{Simd, SimdBase, SimdMask, SimdOp};
use std::ops::Range;

/// Queries of a task: four panels share each tile of keys while it is in the first-level cache.
pub(super) const BLOCK: usize = 4 * PANEL;
/// Keys of a tile.
const TILE: usize = 128;

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    panels: Vec<Panel>,
    /// `[TILE, PANEL]`.
    scores: Vec<f32>,
    /// Widened keys.
    keys: Vec<f32>,
    /// `[BLOCK, width]`, times the sign of the scale.
    x: Vec<f32>,
}

/// [`PANEL`] queries and their candidates.
struct Panel {
    queries: Queries,
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
        let Self { q, keys, rows, causal, top_k, sign, workspace, lists } = self;
        let (n_kv, width) = (keys.rows.len(), q.width());
        let Workspace { panels, scores, keys: scratch, x } = workspace;
        x.resize(rows.len() * width, 0.0);
        q.read(simd, rows.clone(), x);
        if sign != 1.0 {
            x.iter_mut().for_each(|x| *x *= sign);
        }
        scores.resize(TILE * PANEL, 0.0);
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
        }
        let most = panels[..n_panels].iter().map(|panel| panel.n_keys).max().unwrap_or(0);
        // From the last tile to the first: near keys often score highest, and the sooner the thresholds rise, the fewer keys
        // pass. The choice does not depend on the order.
        for first in (0..most).step_by(TILE).rev() {
            let tile = first..(first + TILE).min(most);
            let lhs = keys.lhs(simd, tile.clone(), scratch);
            for panel in panels[..n_panels].iter_mut().filter(|panel| panel.n_keys > first) {
                let tile = first..tile.end.min(panel.n_keys);
                let scores = &mut scores[..tile.len() * PANEL];
                keys.score(simd, tile.clone(), lhs, &panel.queries, scores);
                panel.hide(tile.clone(), scores);
                panel.filter(simd, tile, scores);
            }
        }
        let mut key_row = vec![0.0; width];
        for (at, list) in lists.iter_mut().enumerate() {
            let (panel, lane) = (&mut panels[at / PANEL], at % PANEL);
            let x = &x[at * width..][..width];
            let end = end_of(rows.start + at);
            let mut exact = |key: u32| {
                let key = key as usize;
                if let HeadRows::F32(rows) = keys.rows {
                    return dot(x, rows.row(key));
                }
                keys.rows.read(simd, key..key + 1, &mut key_row);
                dot(x, &key_row)
            };
            if panel.queries.error[lane].is_finite() {
                panel.candidates[lane].finish(keys.wild(end), exact, list);
            } else {
                *list = best((0..end as u32).map(|key| (exact(key), key)).collect(), top_k).collect();
                list.sort_unstable();
            }
        }
    }
}

impl Panel {
    fn new() -> Self {
        Self {
            queries: Queries::default(),
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
            let error = self.queries.error[lane];
            candidates.start(top_k, error);
            // Below every score but -inf; nothing passes for lanes without a bound or a query, or nobody asks.
            let takes = lane < lanes && error.is_finite() && top_k > 0;
            self.threshold[lane] = if takes { f32::MIN } else { f32::INFINITY };
        }
    }

    /// Keys after a query's position score -inf.
    #[inline(always)]
    fn hide(&self, tile: Range<usize>, scores: &mut [f32]) {
        if tile.end as isize - 1 <= self.position {
            return;
        }
        for (j, row) in tile.zip(scores.chunks_exact_mut(PANEL)) {
            let hidden = (j as isize - self.position).clamp(0, PANEL as isize) as usize;
            row[..hidden].fill(f32::NEG_INFINITY);
        }
    }

    /// Collects the keys that reach their lane's threshold.
    #[inline(always)]
    fn filter<S: Simd>(&mut self, simd: S, tile: Range<usize>, scores: &[f32]) {
        let step = S::f32s::LEN;
        for (j, row) in tile.zip(scores.chunks_exact(PANEL)) {
            let mut reached = 0u64;
            for first in (0..PANEL).step_by(step) {
                let score = S::f32s::from_slice(simd, &row[first..first + step]);
                let threshold = S::f32s::from_slice(simd, &self.threshold[first..first + step]);
                reached |= score.simd_ge(threshold).to_bitmask() << first;
            }
            while reached != 0 {
                let lane = reached.trailing_zeros() as usize;
                reached &= reached - 1;
                self.candidates[lane].push(row[lane], j, &mut self.threshold[lane]);
            }
        }
    }
}

/// The dot product in f64: products are exact.
#[inline(always)]
fn dot(x: &[f32], k: &[f32]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (x_chunks, k_chunks) = (x.chunks_exact(8), k.chunks_exact(8));
    let rest: f64 = x_chunks
        .remainder()
        .iter()
        .zip(k_chunks.remainder())
        .map(|(x, k)| f64::from(*x) * f64::from(*k))
        .sum();
    for (x, k) in x_chunks.zip(k_chunks) {
        for (sum, (x, k)) in sums.iter_mut().zip(x.iter().zip(k)) {
            *sum += f64::from(*x) * f64::from(*k);
        }
    }
    sums.iter().sum::<f64>() + rest
}
