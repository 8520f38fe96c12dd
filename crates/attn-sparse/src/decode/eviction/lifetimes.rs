//! From when to when each key is seen.

use super::slots::ALIVE;
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Rows between two lists of the keys that are alive.
const STEP: usize = 64;

/// The mask of eviction: key `j` is seen by the queries `j ..= death_j`, for each key/value head.
///
/// Memory: a number a key, and every 64 rows a list of the keys that are held there.
#[derive(Debug, Clone)]
pub(super) struct Lifetimes {
    shape: AttnShape,
    /// `[batch * n_heads_kv][n]`: the last query that sees the key.
    deaths: Vec<Vec<u32>>,
    /// `[batch * n_heads_kv][n / STEP]`: keys before row `t * STEP` that it sees, ascending.
    alive: Vec<Vec<Vec<u32>>>,
}

impl Lifetimes {
    pub(super) fn new(shape: AttnShape, deaths: Vec<Vec<u32>>) -> Self {
        let alive = deaths.iter().map(|deaths| alive(deaths)).collect();
        Self { shape, deaths, alive }
    }

    fn head(&self, head: Head) -> usize {
        head.batch * self.shape.n_heads_kv + self.shape.kv_head(head.head)
    }
}

fn alive(deaths: &[u32]) -> Vec<Vec<u32>> {
    let mut held: Vec<u32> = Vec::new();
    let mut lists = Vec::with_capacity(deaths.len() / STEP + 1);
    for first in (0..deaths.len()).step_by(STEP) {
        held.retain(|key| deaths[*key as usize] as usize >= first);
        lists.push(held.clone());
        held.extend((first..(first + STEP).min(deaths.len())).map(|key| key as u32));
    }
    lists
}

impl Mask for Lifetimes {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        let (made, s) = (&self.shape, shape);
        let axes = [
            ("batch", s.batch, made.batch),
            ("n_heads_q", s.n_heads_q, made.n_heads_q),
            ("n_q", s.n_q, made.n_q),
            ("n_kv", s.n_kv, made.n_kv),
        ];
        match axes.into_iter().find(|(_, needed, made)| needed != made) {
            Some((axis, needed, made)) => Err(AttnError::shape("lifetimes of keys", axis, made, needed)),
            None => Ok(()),
        }
    }

    fn sees(&self, pair: Pair) -> bool {
        let head = self.head(Head { batch: pair.batch, head: pair.head });
        let death = self.deaths[head][pair.j];
        pair.j <= pair.i && (death == ALIVE || pair.i <= death as usize)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let head = self.head(head);
        let (step, deaths) = (rows.start / STEP, &self.deaths[head]);
        let before = self.alive[head][step].iter().map(|key| *key as usize);
        let seen = |key: &usize| *key < n_kv && deaths[*key] as usize >= rows.start;
        let mut spans: Vec<Range<usize>> = Vec::new();
        for key in before.chain(step * STEP..rows.end).filter(seen) {
            match spans.last_mut() {
                Some(last) if last.end == key => last.end = key + 1,
                _ => spans.push(key..key + 1),
            }
        }
        spans
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.start >= rows.end { Cover::Empty } else { Cover::Partial }
    }
}
