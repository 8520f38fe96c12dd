//! What all sparse variants share: a decider says which pairs are attended, the exact engine attends them.
//!
//! ```text
//! out_i = sum_{j in A(i)} e^(s_ij - lse_i) v_j        lse_i = ln sum_{j in A(i)} e^(s_ij)
//! ```
//!
//! with `s_ij = softmax_scale * q_i . k_j` and `A(i)` the keys that query `i` sees. An empty `A(i)` gives a zero row and a
//! log-sum-exp of -inf.
//!
//! A [`Pattern`] knows `A` from the shape alone; other deciders look at the numbers. Gradients flow through the chosen
//! pairs; the choice itself has none.

use crate::block_mask::{BlockMask, SharedMask};
use crate::memory::Memory;
use crate::prefill::Lines;
use crate::residues::Residues;
use attn_core::mask::{Head, Mask};
use attn_core::{AttnShape, Causality, Growth, Qkv, Result, StreamShape};
use attn_flash::stream::Kept;
use std::fmt;
use std::sync::Arc;

/// Decides which pairs are attended.
pub trait Decider: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// The visible pairs of these inputs; deterministic, whatever the number of threads.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for shapes or settings that the decider does not serve.
    fn decide(&self, x: &Qkv<'_>) -> Result<Decision>;

    /// What it promises.
    fn promises(&self) -> Promises;

    /// What it will take, known before it runs.
    fn work(&self, shape: &AttnShape) -> Work;

    /// What a stream remembers of its keys besides the keys themselves (summaries of pages, say), for a decider that
    /// would otherwise look at all of them for each token. Only asked where [`Promises::kept`] keeps all rows; `None`:
    /// every piece is decided anew.
    fn memory(&self, shape: &StreamShape) -> Option<Box<dyn Memory>> {
        let _ = shape;
        None
    }
}

/// Which pairs are attended.
#[derive(Clone)]
pub struct Decision {
    mask: SharedMask,
    arrangement: Arrangement,
}

/// How the engine is best given the rows.
#[derive(Clone)]
pub(crate) enum Arrangement {
    /// As they lie.
    Together,
    /// Each by its own list, of blocks of so many keys.
    Apart(usize),
    /// Class by class.
    ByResidue(Residues),
    /// Some distances one by one.
    ByLines(Arc<Lines>),
}

impl Decision {
    /// The pairs that `mask` sees.
    pub fn new(mask: impl Mask + Send + 'static) -> Self {
        Self { mask: Arc::new(mask), arrangement: Arrangement::Together }
    }

    /// The pairs that `mask` sees, all of which lie within a residue class: the engine runs class by class, with the
    /// masks that `residues` makes, which have to see the same.
    pub fn by_residue(mask: impl Mask + Send + 'static, residues: Residues) -> Self {
        Self { arrangement: Arrangement::ByResidue(residues), ..Self::new(mask) }
    }

    /// The pairs that `mask` sees, each row by its own list: for rows whose lists are short and different. Then a row's
    /// result depends on nothing but what it sees, to the last bit.
    pub fn row_by_row(mask: impl Mask + Send + 'static) -> Self {
        Self { arrangement: Arrangement::Apart(1), ..Self::new(mask) }
    }

    /// The pairs of columns and diagonals: what no tile serves well is attended along its diagonal.
    pub fn by_lines(lines: Lines) -> Self {
        let lines = Arc::new(lines);
        Self { mask: lines.clone(), arrangement: Arrangement::ByLines(lines) }
    }

    /// [`Decision::row_by_row`] for the lists of a block mask: the engine is told what blocks there are.
    pub(crate) fn by_lists(mask: BlockMask) -> Self {
        Self { arrangement: Arrangement::Apart(mask.sizes().kv), ..Self::new(mask) }
    }

    /// The mask.
    pub fn mask(&self) -> &(dyn Mask + Send + Sync) {
        &*self.mask
    }

    /// Whether each row has its own short list of keys.
    pub fn rows_apart(&self) -> bool {
        matches!(self.arrangement, Arrangement::Apart(_))
    }

    /// Keys of the blocks that rows list, where each has a list of its own; else 1.
    pub(crate) fn block_of_lists(&self) -> usize {
        match self.arrangement {
            Arrangement::Apart(block) => block,
            _ => 1,
        }
    }

    pub(crate) fn arrangement(&self) -> &Arrangement {
        &self.arrangement
    }

    /// The keys `A(i)` of query row `i`, ascending, of `n_kv`.
    pub fn selected(&self, head: Head, i: usize, n_kv: usize) -> Vec<usize> {
        let spans = self.mask.spans(head, i..i + 1, n_kv);
        spans.into_iter().flatten().filter(|&j| self.mask.sees(head.pair(i, j))).collect()
    }
}

impl From<BlockMask> for Decision {
    fn from(mask: BlockMask) -> Self {
        if mask.rows_are_apart() { Self::by_lists(mask) } else { Self::new(mask) }
    }
}

impl fmt::Debug for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrangement = match self.arrangement {
            Arrangement::Together => "together",
            Arrangement::Apart(_) => "rows apart",
            Arrangement::ByResidue(_) => "by residue",
            Arrangement::ByLines(_) => "by lines",
        };
        f.debug_struct("Decision").field("rows", &arrangement).finish_non_exhaustive()
    }
}

/// What a decider promises; see [`attn_core::Profile`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Promises {
    /// `Strict` if what a query sees depends on no later input, and no later key is seen.
    pub causality: Causality,
    /// Permuting keys with their values changes nothing but rounding.
    pub key_order_free: bool,
    /// Accepts `n_q != n_kv`.
    pub cross_lengths: bool,
    /// Growth of time.
    pub time: Growth,
    /// Growth of memory beyond q, k, v and out.
    pub memory: Growth,
    /// Which rows a stream keeps; `None` if the variant cannot stream.
    pub kept: Option<Kept>,
}

/// Work of one call, over all heads and batch entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Attended pairs.
    pub pairs: u64,
    /// Floating-point operations of the decision.
    pub decision_flops: u64,
    /// Bytes that the decision allocates.
    pub decision_bytes: u64,
}

/// A static pattern: a decider that needs the shape alone.
pub trait Pattern: Clone + Send + Sync + 'static {
    /// Its mask type.
    type Mask: Mask + Send + Sync + 'static;

    /// Stable kebab-case name.
    const NAME: &'static str;

    /// The visible pairs of a problem.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] for shapes or settings that the pattern does not serve.
    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask>;

    /// The same pairs, with how the engine is best given the rows.
    ///
    /// # Errors
    /// As [`Pattern::mask`].
    fn decision(&self, shape: &AttnShape) -> Result<Decision> {
        Ok(Decision::new(self.mask(shape)?))
    }

    /// Number of visible pairs, over all heads of all batch entries.
    fn pairs(&self, shape: &AttnShape) -> u64;

    /// Whether no query sees a later key: what it sees then depends on no later input either.
    fn is_causal(&self) -> bool;

    /// Which rows a stream has to keep; only asked of causal patterns. `None` if it cannot stream.
    fn kept(&self) -> Option<Kept> {
        Some(Kept { sinks: 0, last: None })
    }

    /// Whether it accepts `n_q != n_kv`.
    fn cross_lengths(&self) -> bool {
        true
    }

    /// How time grows with the length.
    fn growth(&self) -> Growth {
        Growth::Linear
    }

    /// How memory grows with the length: masks that list blocks grow as their lists.
    fn memory(&self) -> Growth {
        Growth::Constant
    }
}

impl<P: Pattern> Decider for P {
    const NAME: &'static str = P::NAME;

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.decision(&x.shape())
    }

    fn promises(&self) -> Promises {
        let causal = self.is_causal();
        Promises {
            causality: if causal { Causality::Strict } else { Causality::Bidirectional },
            key_order_free: false,
            cross_lengths: self.cross_lengths(),
            time: self.growth(),
            memory: self.memory(),
            kept: if causal { self.kept() } else { None },
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        Work { pairs: self.pairs(shape), ..Work::default() }
    }
}
