//! A panel: up to 32 queries of a task in the vector lanes, and what they accumulate.
//!
//! Lane `l` of panel `p` is query `x = 32 p + l` of the task, row `x % rows` of head `x / rows`. Usually all lanes are of
//! one head; when queries are few, several heads that share keys stand side by side.

use super::Spec;
use super::chunks::{share_of, union};
use super::online_softmax::OnlineSoftmax;
use super::problem::Problem;
use super::rows::HeadRows;
use super::tasks::Task;
use crate::tiles::PANEL;
use attn_core::mask::{Cover, Head, Mask};
use attn_core::qk_norm::QkNorm;
use attn_core::simd::Simd;
use attn_core::tile::transpose;
use attn_core::view::Rows;
use std::ops::Range;

/// Consecutive lanes with consecutive rows of one head.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) head: Head,
    pub(super) rows: Range<usize>,
    /// Lane of the first row.
    pub(super) lane: usize,
}

impl Segment {
    /// The lanes with their query rows.
    #[inline(always)]
    pub(super) fn lanes(&self) -> impl Iterator<Item = (usize, usize)> {
        (self.lane..).zip(self.rows.clone())
    }
}

/// See the module.
pub(super) struct Panel {
    /// `[head_dim, PANEL]`, scaled.
    pub(super) q: Vec<f32>,
    /// `[head_dim_v, PANEL]`, not yet divided.
    pub(super) acc: Vec<f32>,
    pub(super) softmax: OnlineSoftmax,
    pub(super) segments: Vec<Segment>,
    /// Lanes in use.
    pub(super) n_lanes: usize,
    /// Keys these queries can see.
    pub(super) spans: Vec<Range<usize>>,
    /// Whether each query sees all of them.
    pub(super) sees_spans: bool,
}

impl Panel {
    pub(super) fn new(head_dim: usize, head_dim_v: usize) -> Self {
        Self {
            q: vec![0.0; head_dim * PANEL],
            acc: vec![0.0; head_dim_v * PANEL],
            softmax: OnlineSoftmax::new(),
            segments: Vec::new(),
            n_lanes: 0,
            spans: Vec::new(),
            sees_spans: false,
        }
    }

    /// Takes queries `lanes` (counted over heads and rows) of `task`. `rows` is scratch, `[PANEL, head_dim]`.
    #[inline(always)]
    pub(super) fn start<S: Simd, M: Mask + ?Sized, C: ?Sized>(
        &mut self,
        simd: S,
        problem: &Problem<'_>,
        spec: &Spec<'_, M, C>,
        task: &Task<'_>,
        lanes: Range<usize>,
        rows: &mut Vec<f32>,
    ) {
        self.acc.fill(0.0);
        self.softmax = OnlineSoftmax::new();
        self.segments = segments(task, lanes.clone());
        self.n_lanes = lanes.len();
        let n_kv = problem.kv_range(task.sequence).len();
        (self.spans, self.sees_spans) = visible(spec.mask, &self.segments, n_kv);

        let q = |s: &Segment| problem.q_rows(task.sequence, s.head.head).slice(s.rows.clone());
        let width = problem.shape().head_dim;
        let single = match self.segments.as_slice() {
            [one] => Some(q(one)),
            _ => None,
        };
        if let (Some(HeadRows::F32(rows)), None) = (single, &spec.qk_norm) {
            return transpose(simd, rows, spec.softmax_scale, &mut self.q, PANEL);
        }
        rows.resize(PANEL * width, 0.0);
        for segment in &self.segments {
            q(segment).copy_to(&mut rows[segment.lane * width..]);
        }
        if let Some(norm) = &spec.qk_norm {
            normalise(rows, self.n_lanes, width, norm);
        }
        transpose(simd, Rows::new(rows, self.n_lanes, width, width), spec.softmax_scale, &mut self.q, PANEL);
    }

    /// How much of the panel sees `keys`.
    #[inline(always)]
    pub(super) fn cover<M: Mask + ?Sized>(&self, mask: &M, keys: &Range<usize>) -> Cover {
        let cover = |s: &Segment| mask.cover(s.head, s.rows.clone(), keys.clone());
        let mut covers = self.segments.iter().map(cover);
        let first = covers.next().unwrap_or(Cover::Empty);
        if covers.all(|cover| cover == first) { first } else { Cover::Partial }
    }
}

/// Normalises the queries and multiplies them with the weights of both norms: what is left to do for a key is one factor.
fn normalise(rows: &mut [f32], n_rows: usize, width: usize, norm: &QkNorm<'_>) {
    let mut row = vec![0.0; width];
    for q in rows.chunks_exact_mut(width).take(n_rows) {
        norm.q().apply(q, &mut row);
        q.copy_from_slice(&row);
        if let Some(gamma) = norm.gamma_k {
            q.iter_mut().zip(gamma).for_each(|(q, gamma)| *q *= gamma);
        }
    }
}

/// Keys that the queries of a task can see, cut to its share, and whether each query is known to see all of them.
pub(super) fn spans_of<M: Mask + ?Sized, C: ?Sized>(
    problem: &Problem<'_>,
    spec: &Spec<'_, M, C>,
    task: &Task<'_>,
    segments: &[Segment],
) -> (Vec<Range<usize>>, bool) {
    let n_kv = problem.kv_range(task.sequence).len();
    let (spans, all_seen) = visible(spec.mask, segments, n_kv);
    match &task.share {
        Some(share) => (share_of(&spans, share.clone()), all_seen),
        None => (spans, all_seen),
    }
}

/// Keys that some of the queries can see, and whether each query is known to see all of them.
fn visible<M: Mask + ?Sized>(mask: &M, segments: &[Segment], n_kv: usize) -> (Vec<Range<usize>>, bool) {
    let spans = |s: &Segment| mask.spans(s.head, s.rows.clone(), n_kv);
    match segments {
        [] => (Vec::new(), false),
        [first, others @ ..] => {
            let heads = first.head.head..segments[others.len()].head.head + 1;
            let alike = others.is_empty()
                || others.iter().all(|s| s.rows == first.rows) && mask.is_shared_by(first.head.batch, heads);
            match alike {
                true => (spans(first), mask.sees_spans(first.head, first.rows.clone())),
                false => (union(segments.iter().flat_map(spans).collect()), false),
            }
        }
    }
}

/// Which heads and rows stand in `lanes` of a task.
pub(super) fn segments(task: &Task<'_>, lanes: Range<usize>) -> Vec<Segment> {
    let n_rows = task.rows.len();
    let mut segments = Vec::with_capacity(lanes.len().div_ceil(n_rows) + 1);
    let mut at = lanes.start;
    while at < lanes.end {
        let (head, row) = (at / n_rows, at % n_rows);
        let n = (n_rows - row).min(lanes.end - at);
        let rows = task.rows.start + row..task.rows.start + row + n;
        let head = Head { batch: task.sequence, head: task.heads.start + head };
        segments.push(Segment { head, rows, lane: at - lanes.start });
        at += n;
    }
    segments
}
