//! What a variant does to scores, as a rule that makes the score mod of each problem.
//!
//! ```text
//! s_ij = score_mod(softmax_scale * q_i . k_j, i, j)       before the mask
//! ```
//!
//! Slopes and tables of distances depend on where queries stand, hence on the shape: query `i` stands at position
//! `p = i + n_kv - n_q`.

use attn_core::mask::{Align, Pair};
use attn_core::score::{Alibi, BiasIndex, RelativeBias, ScoreMod, ScoreTile, SoftCap, Then};
use attn_core::{AttnError, AttnShape, Result};
use std::fmt;
use std::sync::Arc;

/// Any score mod that can be shared between threads and kept.
pub type SharedScoreMod = Arc<dyn ScoreMod + Send + Sync>;

/// What a score mod looks at, which decides whether a stream that forgets positions may apply it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reads {
    /// The score alone.
    Score,
    /// The score and how far apart query and key stand.
    Distance,
    /// Anything, rows and keys by number: such a variant cannot stream.
    Places,
}

type Make = dyn Fn(&AttnShape) -> Result<SharedScoreMod> + Send + Sync;

/// Makes the score mod of a problem, as a [`Pattern`](crate::Pattern) makes its mask.
///
/// ```
/// use attn_core::mask::Pair;
/// use attn_core::score::ScoreFnWithDerivative;
/// use attn_sparse::{ScoreRule, SlidingWindow, SparseAttention};
///
/// // The user's own closure: scores halve with every 64 keys of distance.
/// let fade = |at: Pair| (-0.0156 * at.i.abs_diff(at.j) as f32).exp2();
/// let rule = ScoreRule::new(ScoreFnWithDerivative(move |s, at| s * fade(at), move |_, at| fade(at)));
/// let faded = SparseAttention::new(SlidingWindow::causal(256)).with_score_rule(rule);
/// let capped = SparseAttention::new(SlidingWindow::causal(256)).with_score_rule(ScoreRule::soft_cap(30.0)?);
/// # let _ = (faded, capped);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Clone)]
pub struct ScoreRule {
    make: Arc<Make>,
    reads: Reads,
}

impl fmt::Debug for ScoreRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScoreRule").field("reads", &self.reads).finish_non_exhaustive()
    }
}

impl From<SharedScoreMod> for ScoreRule {
    fn from(score_mod: SharedScoreMod) -> Self {
        Self::by_shape(Reads::Places, move |_| Ok(score_mod.clone()))
    }
}

impl ScoreRule {
    /// The same score mod for every problem: the user's closure ([`attn_core::score::ScoreFn`],
    /// [`attn_core::score::ScoreFnWithDerivative`] with gradients) or a type of their own.
    pub fn new(score_mod: impl ScoreMod + Send + 'static) -> Self {
        Self::from(Arc::new(score_mod) as SharedScoreMod)
    }

    /// A score mod for each shape. `reads` is a promise.
    pub fn by_shape(
        reads: Reads,
        make: impl Fn(&AttnShape) -> Result<SharedScoreMod> + Send + Sync + 'static,
    ) -> Self {
        Self { make: Arc::new(make), reads }
    }

    /// `cap * tanh(s / cap)`; see [`SoftCap`].
    ///
    /// # Errors
    /// [`AttnError::Value`] unless the cap is positive and finite.
    pub fn soft_cap(cap: f32) -> Result<Self> {
        let score_mod: SharedScoreMod = Arc::new(SoftCap::new(cap)?);
        Ok(Self::by_shape(Reads::Score, move |_| Ok(score_mod.clone())))
    }

    /// `s - slope_h * |p - j|`; see [`Alibi`]. `None` takes the slopes of the paper. A problem with another number of
    /// heads is an error of the call.
    pub fn alibi(slopes: Option<Vec<f32>>) -> Self {
        Self::by_shape(Reads::Distance, move |shape| {
            let slopes = slopes.clone().unwrap_or_else(|| Alibi::default_slopes(shape.n_heads_q));
            Ok(Arc::new(Alibi::new(slopes, shape, offset(shape))?))
        })
    }

    /// `s + slope_h * (j - p)`, which falls before the query and rises behind it: FlexAttention's form of linear biases, the
    /// same as [`ScoreRule::alibi`] under a causal mask. `None` takes the slopes of the paper.
    pub fn linear(slopes: Option<Vec<f32>>) -> Self {
        Self::by_shape(Reads::Distance, move |shape| {
            let slopes = slopes.clone().unwrap_or_else(|| Alibi::default_slopes(shape.n_heads_q));
            if slopes.len() != shape.n_heads_q {
                return Err(AttnError::shape("slopes", "n_heads_q", slopes.len(), shape.n_heads_q));
            }
            Ok(Arc::new(Linear { slopes, offset: offset(shape) }))
        })
    }

    /// `s + table[h, clamp(p - j, -max, max) + max]` for a `table [n_heads_q, 2 * max + 1]`, row-major: the bias of a query
    /// that stands `max` before its key comes first. A table of another size is an error of the call.
    pub fn relative(table: Vec<f32>, max: usize) -> Self {
        // The bias of attn-core counts from the query to the key.
        let mut table = table;
        let width = 2 * max + 1;
        if table.len().is_multiple_of(width) {
            table.chunks_exact_mut(width).for_each(<[f32]>::reverse);
        }
        let table: Arc<[f32]> = table.into();
        Self::by_shape(Reads::Distance, move |shape| {
            Ok(Arc::new(RelativeTable::new(table.clone(), max, *shape)?))
        })
    }

    /// This one, then `next`: a soft cap comes before biases.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        let reads = self.reads.max(next.reads);
        Self::by_shape(reads, move |shape| {
            Ok(Arc::new(Then(Kept(self.score_mod(shape)?), Kept(next.score_mod(shape)?))))
        })
    }

    /// What it looks at.
    pub fn reads(&self) -> Reads {
        self.reads
    }

    /// The score mod of a problem.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor that does not fit the shape.
    pub fn score_mod(&self, shape: &AttnShape) -> Result<SharedScoreMod> {
        (self.make)(shape)
    }
}

fn offset(shape: &AttnShape) -> isize {
    Align::BottomRight.offset(shape.n_q, shape.n_kv)
}

/// A shared score mod as one that can be chained.
struct Kept(SharedScoreMod);

impl ScoreMod for Kept {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.0.check(shape)
    }

    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.0.apply(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.0.apply_f64(score, at)
    }

    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.0.derivative(score, at)
    }

    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        self.0.derivative_f64(score, at)
    }

    fn has_derivative(&self) -> bool {
        self.0.has_derivative()
    }

    fn is_identity(&self) -> bool {
        self.0.is_identity()
    }

    fn apply_tile(&self, tile: ScoreTile<'_>) {
        self.0.apply_tile(tile);
    }
}

/// `s + slope_h * (j - p)`.
struct Linear {
    slopes: Vec<f32>,
    offset: isize,
}

impl Linear {
    fn distance(&self, at: Pair) -> isize {
        at.j as isize - at.i as isize - self.offset
    }
}

impl ScoreMod for Linear {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        match shape.n_heads_q <= self.slopes.len() {
            true => Ok(()),
            false => Err(AttnError::shape("slopes", "n_heads_q", self.slopes.len(), shape.n_heads_q)),
        }
    }

    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.slopes[at.head] * self.distance(at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.slopes[at.head]) * self.distance(at) as f64
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

/// [`RelativeBias`] that owns its table.
struct RelativeTable {
    table: Arc<[f32]>,
    max: usize,
    shape: AttnShape,
}

impl RelativeTable {
    fn new(table: Arc<[f32]>, max: usize, shape: AttnShape) -> Result<Self> {
        RelativeBias::new(&table, max, &shape, offset(&shape))?;
        Ok(Self { table, max, shape })
    }

    fn with<T>(&self, use_it: impl FnOnce(&RelativeBias<'_>) -> T) -> Option<T> {
        RelativeBias::new(&self.table, self.max, &self.shape, offset(&self.shape)).ok().map(|b| use_it(&b))
    }
}

impl ScoreMod for RelativeTable {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        RelativeBias::new(&self.table, self.max, &self.shape, offset(&self.shape))?.check(shape)
    }

    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.with(|bias| bias.apply(score, at)).unwrap_or(f32::NAN)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.with(|bias| bias.apply_f64(score, at)).unwrap_or(f64::NAN)
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }

    fn apply_tile(&self, tile: ScoreTile<'_>) {
        self.with(|bias| bias.apply_tile(tile));
    }
}

/// Which element of a relative table, in the order of [`ScoreRule::relative`], each pair reads.
pub(crate) struct RelativeIndex {
    pub(crate) max: usize,
    pub(crate) n_heads: usize,
    pub(crate) offset: isize,
}

impl RelativeIndex {
    pub(crate) fn new(max: usize, shape: &AttnShape) -> Self {
        Self { max, n_heads: shape.n_heads_q, offset: offset(shape) }
    }
}

impl BiasIndex for RelativeIndex {
    fn len(&self) -> usize {
        self.n_heads * (2 * self.max + 1)
    }

    fn index(&self, at: Pair) -> usize {
        let max = self.max as isize;
        let distance = at.i as isize + self.offset - at.j as isize;
        at.head * (2 * self.max + 1) + (distance.clamp(-max, max) + max) as usize
    }
}

/// Refuses a table that is no matrix of an odd width.
pub(crate) fn relative_max(shape: &[usize]) -> Result<usize> {
    match shape {
        [_, width] if width % 2 == 1 => Ok(width / 2),
        _ => Err(AttnError::value("table's shape", format!("{shape:?}"), "(n_heads_q, 2 * max + 1)")),
    }
}
