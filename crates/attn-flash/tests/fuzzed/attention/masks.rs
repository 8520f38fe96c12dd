//! Masks of every kind, also of sizes that do not fit.

use super::bytes::Bytes;
use attn_core::mask::{
    Align, And, Band, BandPerBatch, DenseMask, Documents, KeyLengths, KeysBelow, Mask, Or, Pair, Predicate,
    PrefixLm, Spans,
};
use attn_core::{AttnShape, Result};

/// Offsets and widths near everything that could overflow.
const FAR: [isize; 9] = [
    isize::MAX,
    isize::MIN,
    isize::MAX - 1,
    isize::MIN + 1,
    isize::MAX / 8,
    isize::MIN / 8,
    isize::MAX / 2,
    1 << 31,
    -(1 << 31),
];

pub fn offset(bytes: &mut Bytes<'_>) -> isize {
    match bytes.within(0..=3) {
        3 => bytes.pick(&FAR),
        _ => bytes.within(0..=140) as isize - 70,
    }
}

pub fn align(bytes: &mut Bytes<'_>) -> Align {
    match bytes.within(0..=3) {
        2 => Align::TopLeft,
        3 => Align::Offset(offset(bytes)),
        _ => Align::BottomRight,
    }
}

pub fn window(bytes: &mut Bytes<'_>) -> Option<usize> {
    match bytes.within(0..=5) {
        3 | 4 => Some(bytes.within(0..=40)),
        5 => Some(bytes.pick(&[
            usize::MAX,
            usize::MAX - 1,
            isize::MAX as usize,
            isize::MAX as usize + 1,
            1 << 62,
        ])),
        _ => None,
    }
}

/// What a mask is built from.
#[derive(Debug, Clone)]
pub enum MaskCase {
    Dense { seen: Vec<bool>, shape: Vec<usize> },
    Documents { q: Vec<i32>, kv: Vec<i32> },
    Spans { q: Vec<i32>, kv: Vec<i32> },
    PrefixLm { prefix: Vec<usize>, align: Align },
    KeyLengths(Vec<usize>),
    KeysBelow(usize),
    Band(Band),
    BandPerBatch { offsets: Vec<isize>, left: Option<usize>, right: Option<usize> },
    Closure(usize),
    Either(Box<MaskCase>, Box<MaskCase>),
    Both(Box<MaskCase>, Box<MaskCase>),
}

impl MaskCase {
    pub fn draw(bytes: &mut Bytes<'_>, shape: &AttnShape, depth: usize) -> Self {
        let kinds = if depth == 0 { 8 } else { 10 };
        match bytes.within(0..=kinds) {
            0 => Self::Closure(bytes.within(1..=5)),
            1 => {
                let mut axes = vec![shape.batch, shape.n_heads_q, shape.n_q, shape.n_kv];
                let (seed, share) = (bytes.word(), bytes.pick(&[0u64, 3, 8, 13, 16]));
                broadcast(bytes, &mut axes);
                let len: usize = axes.iter().product();
                let len = bytes.about(len);
                let seen =
                    (0..len as u64).map(|x| (x ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60 < share);
                Self::Dense { seen: seen.collect(), shape: axes }
            }
            2 => Self::Documents {
                q: ids(bytes, shape.batch, shape.n_q),
                kv: ids(bytes, shape.batch, shape.n_kv),
            },
            3 => {
                Self::Spans { q: ids(bytes, shape.batch, shape.n_q), kv: ids(bytes, shape.batch, shape.n_kv) }
            }
            4 => {
                let prefix =
                    per_batch(bytes, shape).into_iter().map(|_| bytes.within(0..=shape.n_kv + 1)).collect();
                Self::PrefixLm { prefix, align: align(bytes) }
            }
            5 => {
                let lens = per_batch(bytes, shape).into_iter().map(|_| bytes.within(0..=shape.n_kv));
                Self::KeyLengths(lens.collect())
            }
            6 => Self::KeysBelow(bytes.within(0..=shape.n_kv + 2)),
            7 => Self::Band(Band { offset: offset(bytes), left: window(bytes), right: window(bytes) }),
            8 => {
                let offsets = per_batch(bytes, shape).into_iter().map(|_| offset(bytes)).collect();
                Self::BandPerBatch { offsets, left: window(bytes), right: window(bytes) }
            }
            kind => {
                let [a, b] = [0, 1].map(|_| Box::new(Self::draw(bytes, shape, depth - 1)));
                if kind == 9 { Self::Either(a, b) } else { Self::Both(a, b) }
            }
        }
    }

    pub fn build<'a>(&'a self, shape: &AttnShape) -> Result<Box<dyn Mask + 'a>> {
        Ok(match self {
            Self::Dense { seen, shape: axes } => Box::new(DenseMask::new(seen, axes, shape)?),
            Self::Documents { q, kv } => Box::new(Documents::new(q, kv, shape)?),
            Self::Spans { q, kv } => Box::new(Spans::new(q, kv, shape)?),
            Self::PrefixLm { prefix, align } => Box::new(PrefixLm::new(prefix.clone(), shape, *align)?),
            Self::KeyLengths(lens) => Box::new(KeyLengths::new(lens.clone(), shape)?),
            Self::KeysBelow(len) => Box::new(KeysBelow(*len)),
            Self::Band(band) => Box::new(*band),
            Self::BandPerBatch { offsets, left, right } => {
                Box::new(BandPerBatch::new(offsets.clone(), *left, *right, shape)?)
            }
            Self::Closure(step) => {
                let step = *step;
                Box::new(Predicate(move |p: Pair| {
                    !(p.i + 2 * p.j + p.head + p.batch).is_multiple_of(step + 1)
                }))
            }
            Self::Either(a, b) => Box::new(Or(Any(a.build(shape)?), Any(b.build(shape)?))),
            Self::Both(a, b) => Box::new(And(Any(a.build(shape)?), Any(b.build(shape)?))),
        })
    }
}

/// A boxed mask as a mask, every question passed on.
struct Any<'a>(Box<dyn Mask + 'a>);

impl Mask for Any<'_> {
    fn sees(&self, pair: Pair) -> bool {
        self.0.sees(pair)
    }

    fn spans(
        &self,
        head: attn_core::mask::Head,
        rows: std::ops::Range<usize>,
        n_kv: usize,
    ) -> Vec<std::ops::Range<usize>> {
        self.0.spans(head, rows, n_kv)
    }

    fn cover(
        &self,
        head: attn_core::mask::Head,
        rows: std::ops::Range<usize>,
        keys: std::ops::Range<usize>,
    ) -> attn_core::mask::Cover {
        self.0.cover(head, rows, keys)
    }

    fn hide(&self, head: attn_core::mask::Head, rows: std::ops::Range<usize>, j: usize, scores: &mut [f32]) {
        self.0.hide(head, rows, j, scores);
    }
}

/// Some axes of length 1, or no longer there; rarely of a length that does not fit.
pub fn broadcast(bytes: &mut Bytes<'_>, axes: &mut Vec<usize>) {
    for axis in axes.iter_mut() {
        match bytes.within(0..=7) {
            4..=6 => *axis = 1,
            7 => *axis = bytes.about(*axis),
            _ => {}
        }
    }
    while axes.first() == Some(&1) && bytes.one_in(2) {
        axes.remove(0);
    }
}

/// Ids in runs, in any order, for all batch entries or each.
fn ids(bytes: &mut Bytes<'_>, batch: usize, n: usize) -> Vec<i32> {
    let len = if bytes.one_in(2) { n } else { batch * n };
    let (len, longest) = (bytes.about(len), bytes.pick(&[1, 4, 20, 100]));
    let mut ids = Vec::with_capacity(len);
    while ids.len() < len {
        let run = bytes.within(1..=longest).min(len - ids.len());
        ids.resize(ids.len() + run, bytes.within(0..=4) as i32 - 1);
    }
    ids
}

/// One entry, or one a batch entry, or rarely another number of them.
fn per_batch(bytes: &mut Bytes<'_>, shape: &AttnShape) -> Vec<()> {
    let entries = if bytes.one_in(2) { 1 } else { shape.batch };
    vec![(); bytes.about(entries)]
}
