//! One head's sequence, chunk by chunk.

use super::chunked::{Absorb, Attend, Read, Scratch};
use super::powers::Powers;
use super::recurrent::Steps;
use super::state::HeadState;
use super::{Normaliser, Spec};
use crate::feature_map::FeatureMap;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::widen;
use attn_core::view::{Rows, RowsMut};
use attn_core::{AttnShape, DType, Element};
use std::ops::Range;

/// Up to this many tokens the recurrent form beats the chunked one.
const RECURRENT_LEN: usize = 4;

/// One task: a head of the inputs, of the output and of the state.
pub(super) struct Head<'a, E> {
    pub(super) spec: &'a Spec,
    pub(super) isa: Isa,
    /// `[n_q, head_dim]`, `[n_kv, head_dim]`, `[n_kv, value_dim]`.
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    pub(super) log_decay: Option<f32>,
    /// `[n_q, value_dim]`; `None` without rows.
    pub(super) out: Option<RowsMut<'a, E>>,
    /// `None` starts from nothing and forgets the end.
    pub(super) state: Option<HeadState<'a>>,
}

/// A thread's scratch, taken once.
pub(super) struct Workspace {
    q: RowScratch,
    k: RowScratch,
    v: RowScratch,
    chunk: Scratch,
    powers: Powers,
    /// The state of a head that was given none.
    s: Vec<f32>,
    z: Vec<f32>,
}

impl Workspace {
    pub(super) fn new(spec: &Spec, shape: &AttnShape, dtype: DType) -> Self {
        let len = Self::chunk_len(spec, shape);
        let (key_dim, value_dim) = (spec.key_dim(shape.head_dim), shape.head_dim_v);
        let widen = |width: usize| if dtype == DType::F32 { 0 } else { len * width };
        let features = if spec.features.is_some() { len * key_dim } else { 0 };
        let rows = |wide, features| RowScratch { wide: vec![0.0; wide], features: vec![0.0; features] };
        Self {
            q: rows(widen(shape.head_dim), features),
            k: rows(widen(shape.head_dim), features),
            v: rows(widen(value_dim), 0),
            chunk: Scratch::new(len, key_dim, value_dim),
            powers: Powers::new(len),
            s: vec![0.0; key_dim * value_dim],
            z: vec![0.0; if spec.has_normaliser() { key_dim } else { 0 }],
        }
    }

    fn chunk_len(spec: &Spec, shape: &AttnShape) -> usize {
        spec.chunk_len.min(shape.n_q.max(shape.n_kv)).max(1)
    }

    /// Bytes of [`Workspace::new`].
    pub(super) fn bytes(spec: &Spec, shape: &AttnShape, dtype: DType) -> u64 {
        let len = Self::chunk_len(spec, shape);
        let (key_dim, value_dim) = (spec.key_dim(shape.head_dim), shape.head_dim_v);
        let wide = if dtype == DType::F32 { 0 } else { len * (2 * shape.head_dim + value_dim) };
        let features = if spec.features.is_some() { 2 * len * key_dim } else { 0 };
        let state = key_dim * value_dim + if spec.has_normaliser() { key_dim } else { 0 };
        let floats = wide + features + Scratch::floats(len, key_dim, value_dim) + Powers::floats(len) + state;
        4 * floats as u64
    }
}

/// Rows of a chunk on their way to f32 features.
struct RowScratch {
    wide: Vec<f32>,
    features: Vec<f32>,
}

impl RowScratch {
    /// The rows as f32 features: in place where they are that already.
    fn load<'a, E: Element>(
        &'a mut self,
        isa: Isa,
        rows: Rows<'a, E>,
        features: Option<&dyn FeatureMap>,
    ) -> Rows<'a, f32> {
        let (len, width) = (rows.len(), rows.width());
        let wide = match E::as_f32(rows.data()) {
            Some(data) => Rows::new(data, len, width, rows.stride()),
            None => {
                let wide = &mut self.wide[..len * width];
                isa.run(Widen(rows, wide));
                Rows::new(wide, len, width, width)
            }
        };
        let Some(map) = features else { return wide };
        let width = map.width(width);
        let features = &mut self.features[..len * width];
        map.apply(isa, wide, features);
        Rows::new(features, len, width, width)
    }
}

impl<E: Element> Head<'_, E> {
    pub(super) fn run(self, workspace: &mut Workspace) {
        let Self { spec, isa, q, k, v, log_decay, mut out, state } = self;
        let chunk_len = workspace.powers.chunk_len();
        let Workspace { q: q_scratch, k: k_scratch, v: v_scratch, chunk, powers, s, z } = workspace;
        let mut state = state.unwrap_or_else(|| {
            s.fill(0.0);
            z.fill(0.0);
            HeadState { s, z }
        });
        let decay = log_decay.map(|g| powers.set(g));
        let features = spec.features.as_deref();

        // The first keys are past for every query; the first queries stand before every key.
        let (n_q, n_kv) = (q.len(), k.len());
        let (first_q, first_kv) =
            if spec.causal { (n_q.saturating_sub(n_kv), n_kv.saturating_sub(n_q)) } else { (0, n_kv) };
        if let Some(out) = &mut out {
            (0..first_q).for_each(|i| out.row_mut(i).fill(E::ZERO));
        }
        for keys in pieces(0..first_kv, chunk_len) {
            let k = k_scratch.load(isa, k.slice(keys.clone()), features);
            let v = v_scratch.load(isa, v.slice(keys), None);
            isa.run(Absorb { k, v, decay, state: state.reborrow(), scratch: chunk });
        }
        let Some(mut out) = out else { return };
        for queries in pieces(first_q..n_q, chunk_len) {
            let q = q_scratch.load(isa, q.slice(queries.clone()), features);
            if spec.causal {
                let keys = queries.start - first_q + first_kv..queries.end - first_q + first_kv;
                let k = k_scratch.load(isa, k.slice(keys.clone()), features);
                let v = v_scratch.load(isa, v.slice(keys), None);
                let state = state.reborrow();
                if queries.len() <= RECURRENT_LEN {
                    isa.run(Steps { q, k, v, decay: log_decay, state, scratch: chunk });
                } else {
                    isa.run(Attend { q, k, v, decay, state, scratch: chunk });
                }
            } else {
                isa.run(Read { q, state: state.reborrow(), scratch: chunk });
            }
            isa.run(Finish { spec, reads: chunk, out: &mut out, rows: queries });
        }
    }
}

/// `range` cut into pieces of `len` rows; the last may be shorter.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..(start + len).min(range.end))
}

struct Widen<'a, E>(Rows<'a, E>, &'a mut [f32]);

impl<E: Element> SimdOp for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        widen(self.0, self.1);
    }
}

/// The back end: scales, divides, rounds and stores the reads of a chunk.
struct Finish<'a, 'o, E> {
    spec: &'a Spec,
    reads: &'a Scratch,
    out: &'a mut RowsMut<'o, E>,
    rows: Range<usize>,
}

impl<E: Element> SimdOp for Finish<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let scale = self.spec.scale;
        for (i, (read, denominator)) in self.rows.zip(self.reads.reads()) {
            let factor = match self.spec.normaliser {
                Normaliser::None => scale,
                Normaliser::SumPlus { eps } => {
                    let divisor = scale * denominator + eps;
                    if divisor == 0.0 { 0.0 } else { scale / divisor }
                }
            };
            let row = self.out.row_mut(i);
            row.iter_mut().zip(read).for_each(|(o, x)| *o = E::store(factor * x));
        }
    }
}
