//! The cache of one key/value head: slots in no order, keys in columns, so that slots lie in the vector lanes.

use super::policy::{EvictionPolicy, Importance};

/// Slots come in multiples of this, the widest vector.
pub(super) const LANES: usize = 16;
/// Never evicted so far.
pub(super) const ALIVE: u32 = u32::MAX;

/// Keys, values and what is remembered of the positions that one key/value head holds.
pub(super) struct Slots {
    pub(super) head_dim: usize,
    pub(super) head_dim_v: usize,
    /// `head_dim_v`, rounded up to whole vectors.
    pub(super) v_stride: usize,
    /// Query heads that read it.
    pub(super) group: usize,
    /// Slots there is room for, and at most.
    pub(super) capacity: usize,
    limit: usize,
    /// `[head_dim, capacity]`.
    pub(super) k: Vec<f32>,
    /// `[capacity, v_stride]`.
    pub(super) v: Vec<f32>,
    /// Of each slot that is taken.
    pub(super) positions: Vec<usize>,
    /// Slots in the order of their positions.
    pub(super) order: Vec<usize>,
    /// `[group, capacity]`: scores, then weights before the normaliser, of the last query.
    pub(super) weights: Vec<f32>,
    /// Mean weight that the last query's heads gave each slot.
    pub(super) mean: Vec<f32>,
    /// By importance: the static worth, the mass, or the inverse norm of the key.
    pub(super) memory: Vec<f64>,
    /// What each slot is worth now.
    pub(super) worth: Vec<f64>,
    /// `[window, capacity]`: the mean weights of the last queries, for [`Importance::WindowMass`].
    pub(super) ring: Vec<f32>,
    /// Sum of the normalised keys, for [`Importance::KeyDifference`].
    pub(super) anchor: Vec<f64>,
    /// Position of the last query that saw each position, if asked for.
    pub(super) deaths: Option<Vec<u32>>,
    window: usize,
}

impl Slots {
    /// `most`: positions held when nothing is being appended.
    pub(super) fn new(
        policy: &EvictionPolicy,
        [head_dim, head_dim_v]: [usize; 2],
        group: usize,
        most: usize,
    ) -> Self {
        let window = match policy.importance {
            Importance::WindowMass { window, .. } => window,
            _ => 0,
        };
        let has_anchor = policy.importance == Importance::KeyDifference;
        Self {
            head_dim,
            head_dim_v,
            v_stride: head_dim_v.next_multiple_of(LANES),
            group,
            capacity: 0,
            limit: most.saturating_add(1).min(usize::MAX / 2),
            k: Vec::new(),
            v: Vec::new(),
            positions: Vec::new(),
            order: Vec::new(),
            weights: Vec::new(),
            mean: Vec::new(),
            memory: Vec::new(),
            worth: Vec::new(),
            ring: Vec::new(),
            anchor: vec![0.0; if has_anchor { head_dim } else { 0 }],
            deaths: None,
            window,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Columns that vectors run over: the slots taken, rounded up.
    pub(super) fn padded(&self) -> usize {
        self.len().next_multiple_of(LANES)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let floats = self.k.len() + self.v.len() + self.weights.len() + self.mean.len() + self.ring.len();
        let words = self.memory.len() + self.worth.len() + self.anchor.len();
        let places = self.positions.capacity() + self.order.capacity();
        4 * floats + 8 * words + size_of::<usize>() * places
    }

    fn reserve(&mut self) {
        if self.len() < self.capacity {
            return;
        }
        let old = self.capacity;
        let new = (2 * old).max(4 * LANES).min(self.limit.next_multiple_of(LANES)).max(old + LANES);
        let wider = |from: &[f32], rows: usize| {
            let mut to = vec![0.0; rows * new];
            for row in 0..if old == 0 { 0 } else { rows } {
                to[row * new..][..old].copy_from_slice(&from[row * old..][..old]);
            }
            to
        };
        self.k = wider(&self.k, self.head_dim);
        self.weights = wider(&self.weights, self.group);
        self.ring = wider(&self.ring, self.window);
        self.v.resize(new * self.v_stride, 0.0);
        self.mean.resize(new, 0.0);
        self.memory.resize(new, 0.0);
        self.worth.resize(new, 0.0);
        self.positions.reserve_exact(new - self.len());
        self.order.reserve_exact(new - self.order.len());
        self.capacity = new;
    }

    /// Takes a slot for a position, later than all that are held.
    pub(super) fn push(&mut self, importance: Importance, position: usize, k: &[f32], v: &[f32]) {
        self.reserve();
        let slot = self.len();
        self.positions.push(position);
        self.order.push(slot);
        k.iter().enumerate().for_each(|(c, k)| self.k[c * self.capacity + slot] = *k);
        self.v[slot * self.v_stride..][..self.head_dim_v].copy_from_slice(v);
        (0..self.window).for_each(|row| self.ring[row * self.capacity + slot] = 0.0);
        let norm = || k.iter().map(|k| f64::from(*k) * f64::from(*k)).sum::<f64>().sqrt();
        self.memory[slot] = match importance {
            Importance::KeyNorm => -norm(),
            Importance::KeyDifference => {
                let norm = norm();
                if norm > 0.0 { 1.0 / norm } else { 0.0 }
            }
            _ => 0.0,
        };
        self.turn_anchor(slot, 1.0);
        if let Some(deaths) = &mut self.deaths {
            deaths.push(ALIVE);
        }
    }

    /// Adds `sign` times the normalised key of a slot to the anchor.
    fn turn_anchor(&mut self, slot: usize, sign: f64) {
        let by = sign * self.memory[slot];
        for (c, anchor) in self.anchor.iter_mut().enumerate() {
            *anchor += by * f64::from(self.k[c * self.capacity + slot]);
        }
    }

    /// Frees a slot; the last one moves into it. `last` is the position of the last query that saw it.
    pub(super) fn evict(&mut self, slot: usize, last: usize) {
        self.turn_anchor(slot, -1.0);
        if let Some(deaths) = &mut self.deaths {
            deaths[self.positions[slot]] = last as u32;
        }
        self.order.retain(|held| *held != slot);
        let moved = self.len() - 1;
        self.positions.swap_remove(slot);
        if moved == slot {
            return;
        }
        self.order.iter_mut().filter(|held| **held == moved).for_each(|held| *held = slot);
        let columns = self.capacity;
        for row in self.k.chunks_exact_mut(columns).chain(self.ring.chunks_exact_mut(columns)) {
            row[slot] = row[moved];
        }
        self.v.copy_within(moved * self.v_stride..(moved + 1) * self.v_stride, slot * self.v_stride);
        self.memory[slot] = self.memory[moved];
        self.worth[slot] = self.worth[moved];
    }
}
