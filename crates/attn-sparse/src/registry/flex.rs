//! Masks and score functions that the user gives: by name, as formulas, as dense tensors, as lists of blocks.

use super::named::{CAUSAL, Learned, option, run};
use super::{at_least_1, attention, length};
use crate::pairs::{Alike, count_pairs};
use crate::score_rule::{RelativeIndex, relative_max};
use crate::{BlockSizes, Builder, Decider, Decision, Promises, ScoreRule, SharedMask, SparseAttention, Work};
use attn_core::mask::{Align, And, Band, Cover, DenseMask, Head, Mask, Pair};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options};
use attn_core::{AttnError, AttnShape, Causality, Family, Growth, Qkv, Result, band_pairs};
use attn_flash::stream::Kept;
use attn_flash::{FormulaMask, FormulaScore};
use std::ops::Range;
use std::sync::Arc;

const MASK_MOD: OptionSpec = option(
    "mask_mod",
    "",
    "a further condition on batch b, head h, query row i, key row j: (i - j) % 7 == 0 or j < 3",
);
const SCORE_MOD: OptionSpec = option(
    "score_mod",
    "none",
    "none, alibi (tensor slopes), relative (tensor table), or a formula: s - |i - j|",
);
const SOFTCAP: OptionSpec = option("softcap", "", "scores become c tanh(s / c) before the score mod");
const BLOCK_Q: OptionSpec = option("block_q", "128", "queries of a block");
const BLOCK_KV: OptionSpec = option("block_kv", "128", "keys of a block");

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: "flex",
            family: Family::Sparse,
            summary: "A mask and a score function of the user's (FlexAttention, Dong et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    option("window", "", "last keys seen, on each side unless causal; default all"),
                    MASK_MOD,
                    SCORE_MOD,
                    SOFTCAP,
                    BLOCK_Q,
                    BLOCK_KV,
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| Ok(Box::new(built("flex", options)?)),
            runner: run_flex,
        },
        Entry {
            name: "block-mask",
            family: Family::Sparse,
            summary: "Lists of blocks: dense, compressed rows, or compiled from a predicate (Child et al. 2019)",
            options: const {
                &[
                    CAUSAL,
                    option("window", "512", "last keys seen, on each side unless causal; none is all"),
                    MASK_MOD,
                    SCORE_MOD,
                    SOFTCAP,
                    BLOCK_Q,
                    BLOCK_KV,
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| Ok(Box::new(built("block-mask", options)?)),
            runner: run_flex,
        },
    ]
}

/// A band, and what else hides pairs.
#[derive(Clone)]
struct Flex {
    causal: bool,
    window: Option<usize>,
    formula: Option<FormulaMask>,
    dense: Option<OwnedDense>,
    layout: Option<Layout>,
    sizes: BlockSizes,
    /// Whether a band alone is made a block mask too.
    compiled: bool,
}

/// Blocks that may be seen, given by the user.
#[derive(Clone)]
enum Layout {
    /// `[batch lists, head lists, block rows, block columns]`.
    Dense { axes: [usize; 2], layout: Arc<[bool]> },
    /// The lists of each row, one list for all heads and entries or one for each.
    Csr { row_ptr: Arc<[usize]>, blocks: Arc<[usize]> },
}

impl Flex {
    fn band(&self, shape: &AttnShape) -> Band {
        let side = self.window.map(|window| window.saturating_sub(1));
        let right = if self.causal { Some(0) } else { side };
        Band { offset: Align::BottomRight.offset(shape.n_q, shape.n_kv), left: side, right }
    }

    /// The pairs, but for the layout.
    fn inside(&self, shape: &AttnShape) -> SharedMask {
        Arc::new(And(self.band(shape), And(self.formula.clone(), self.dense.clone())))
    }

    fn is_band(&self) -> bool {
        self.formula.is_none() && self.dense.is_none() && self.layout.is_none()
    }

    /// Between which the mask inside tells no difference.
    fn alike(&self) -> Alike {
        let apart = |axis: usize, of_formula: fn(&FormulaMask) -> bool| {
            self.dense.as_ref().is_some_and(|dense| dense.axes[axis] > 1)
                || self.formula.as_ref().is_some_and(of_formula)
        };
        Alike {
            batch: !apart(0, FormulaMask::tells_entries_apart),
            heads: !apart(1, FormulaMask::tells_heads_apart),
        }
    }

    fn builder(&self, shape: &AttnShape, alike: Alike) -> Builder {
        let builder = Builder::new(shape, self.sizes).inside(self.inside(shape));
        let builder = if alike.batch { builder } else { builder.per_batch() };
        if alike.heads { builder } else { builder.per_head(shape.n_heads_q.max(1)) }
    }

    /// The blocks of a layout that has its own lists for `axes` batch entries and heads.
    fn listed(&self, shape: &AttnShape) -> Result<Decision> {
        let alike = self.alike();
        let rows = shape.n_q.div_ceil(self.sizes.q);
        let columns = shape.n_kv.div_ceil(self.sizes.kv);
        let mask = match &self.layout {
            None => self.builder(shape, alike).from_inside()?,
            Some(Layout::Dense { axes: [batch, heads], layout }) => {
                let expected = batch * heads * rows * columns;
                if layout.len() != expected {
                    let expected = format!("{expected}: {rows} x {columns} blocks");
                    return Err(AttnError::shape("block_mask", "elements", layout.len(), expected));
                }
                for (axis, found, all) in
                    [("batch", *batch, shape.batch), ("n_heads_q", *heads, shape.n_heads_q)]
                {
                    if found != 1 && found != all {
                        return Err(AttnError::shape("block_mask", axis, found, format!("1 or {all}")));
                    }
                }
                let alike = Alike { batch: alike.batch && *batch == 1, heads: alike.heads && *heads == 1 };
                self.builder(shape, alike).from_rows(|entry, head, row| {
                    let list = (entry % batch) * heads + head % heads;
                    let first = (list * rows + row) * columns;
                    (0..columns).filter(|column| layout[first + column]).collect()
                })?
            }
            Some(Layout::Csr { row_ptr, blocks }) => {
                let one_list = row_ptr.len() == rows + 1;
                let alike = Alike { batch: alike.batch && one_list, heads: alike.heads && one_list };
                if one_list && alike != (Alike { batch: true, heads: true }) {
                    let what = "one list of blocks with a mask that tells heads or batch entries apart";
                    return Err(AttnError::unsupported("block-mask", what));
                }
                let builder = self.builder(shape, alike);
                builder.from_csr(row_ptr, blocks)?
            }
        };
        Ok(mask.into())
    }
}

impl Decider for Flex {
    const NAME: &'static str = "flex";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        let shape = x.shape();
        if self.is_band() && !self.compiled {
            return Ok(Decision::new(self.band(&shape)));
        }
        if let Some(dense) = &self.dense {
            dense.mask(&shape)?;
        }
        self.listed(&shape)
    }

    fn promises(&self) -> Promises {
        let kept = Kept { sinks: 0, last: self.window.map(|window| window.saturating_sub(1)) };
        let growth = if self.window.is_some() { Growth::Linear } else { Growth::Quadratic };
        Promises {
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            key_order_free: false,
            cross_lengths: true,
            time: growth,
            memory: if self.is_band() && !self.compiled { Growth::Constant } else { growth },
            kept: (self.causal && self.is_band()).then_some(kept),
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let band = band_pairs(shape, &self.band(shape));
        let pairs = match self.is_band() {
            true => heads * band,
            false => count_pairs(&*self.inside(shape), shape, self.alike()),
        };
        let lists = if self.is_band() { 1 } else { heads };
        let blocks = if self.compiled || !self.is_band() {
            // Every block that the band touches, with its column and its tag.
            let of_block = (self.sizes.q * self.sizes.kv) as u64;
            lists * (band / of_block + 2 * (shape.n_q / self.sizes.q) as u64)
        } else {
            0
        };
        Work { pairs, decision_flops: 0, decision_bytes: 5 * blocks }
    }
}

/// A dense mask that owns its booleans.
#[derive(Clone)]
struct OwnedDense {
    seen: Arc<[bool]>,
    /// Right-aligned to `(batch, n_heads_q, n_q, n_kv)`; 1 is shared.
    axes: [usize; 4],
    shape: AttnShape,
}

impl OwnedDense {
    fn new(seen: Vec<bool>, given: &[usize], shape: AttnShape) -> Result<Self> {
        DenseMask::new(&seen, given, &shape)?;
        let mut axes = [1; 4];
        axes[4 - given.len()..].copy_from_slice(given);
        Ok(Self { seen: seen.into(), axes, shape })
    }

    fn mask(&self, shape: &AttnShape) -> Result<DenseMask<'_>> {
        DenseMask::new(&self.seen, &self.axes, shape)
    }

    fn with<T>(&self, use_it: impl FnOnce(&DenseMask<'_>) -> T) -> Option<T> {
        self.mask(&self.shape).ok().map(|mask| use_it(&mask))
    }
}

impl Mask for OwnedDense {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.mask(&self.shape)?.check(shape)
    }

    fn sees(&self, pair: Pair) -> bool {
        self.with(|mask| mask.sees(pair)).unwrap_or(false)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.with(|mask| mask.cover(head, rows, keys)).unwrap_or(Cover::Partial)
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        self.with(|mask| mask.hide(head, rows, j, scores));
    }
}

/// The mask of the options.
fn flex(name: &str, options: &Options) -> Result<Flex> {
    let default = if name == "flex" { "none" } else { "512" };
    let window = match options.0.contains_key("window") {
        true => length(options, "window")?,
        false => default.parse().ok(),
    };
    let formula = options.get::<String>("mask_mod")?;
    let (q, kv) = (at_least_1(options, "block_q", 128)?, at_least_1(options, "block_kv", 128)?);
    Ok(Flex {
        causal: options.get_or("causal", true)?,
        window,
        formula: formula.map(|text| FormulaMask::new("mask_mod", &text)).transpose()?,
        dense: None,
        layout: None,
        sizes: BlockSizes { q, kv },
        compiled: name != "flex",
    })
}

/// The score rule of the options and of tables.
fn score_rule(options: &Options, tensors: &NamedTensors) -> Result<Option<ScoreRule>> {
    let missing = |name: &str| AttnError::Missing { name: name.into(), found: "no such tensor".into() };
    let of_name = options.get_or("score_mod", "none".to_string())?;
    let (slopes, table) = (tensors.f32("slopes")?, tensors.f32("table")?);
    let rule = match of_name.as_str() {
        "none" => None,
        "alibi" => Some(ScoreRule::linear(slopes.map(|(_, slopes)| slopes.to_vec()))),
        "relative" => {
            let (axes, table) = table.ok_or_else(|| missing("table"))?;
            Some(ScoreRule::relative(table.to_vec(), relative_max(axes)?))
        }
        text => Some(ScoreRule::new(FormulaScore::new("score_mod", text)?)),
    };
    for (tensor, is_there, name) in
        [("slopes", slopes.is_some(), "alibi"), ("table", table.is_some(), "relative")]
    {
        if is_there && of_name != name {
            let what = format!("a tensor `{tensor}` without score_mod={name}");
            return Err(AttnError::unsupported("flex", what));
        }
    }
    let cap = options.get("softcap")?.map(ScoreRule::soft_cap).transpose()?;
    Ok(match (cap, rule) {
        (Some(cap), Some(rule)) => Some(cap.then(rule)),
        (cap, rule) => cap.or(rule),
    })
}

fn built(name: &'static str, options: &Options) -> Result<SparseAttention<Flex>> {
    let attention = attention(options, flex(name, options)?)?.named(name);
    // A table is only there when tensors are.
    let relative = options.get::<String>("score_mod")?.is_some_and(|name| name == "relative");
    let rule = if relative {
        let what = "score_mod=relative without a tensor `table`";
        return Err(AttnError::unsupported(name, what));
    } else {
        score_rule(options, &NamedTensors::default())?
    };
    Ok(SparseAttention { score_rule: rule, ..attention })
}

fn run_flex(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let known = ["q", "k", "v", "grad_o", "mask", "block_mask", "row_ptr", "blocks", "slopes", "table"];
    tensors.only(entry.name, &known)?;
    let shape = tensors.qkv()?.shape();
    let mut decider = flex(entry.name, options)?;
    if let Some((axes, seen)) = tensors.booleans("mask")? {
        decider.dense = Some(OwnedDense::new(seen, axes, shape)?);
    }
    let unsigned = |name: &str| -> Result<Option<Arc<[usize]>>> {
        let Some((_, numbers)) = tensors.i32(name)? else { return Ok(None) };
        let one = |n: &i32| usize::try_from(*n).map_err(|_| AttnError::value(name, n, "not negative"));
        numbers.iter().map(one).collect::<Result<Arc<[usize]>>>().map(Some)
    };
    decider.layout = match (tensors.booleans("block_mask")?, unsigned("row_ptr")?, unsigned("blocks")?) {
        (None, None, None) => None,
        (Some((axes, layout)), None, None) => {
            let lists = match axes {
                [batch, heads, _, _] => [*batch, *heads],
                [heads, _, _] => [1, *heads],
                [_, _] => [1, 1],
                _ => return Err(AttnError::value("block_mask's shape", format!("{axes:?}"), "2 to 4 axes")),
            };
            Some(Layout::Dense { axes: lists, layout: layout.into() })
        }
        (None, Some(row_ptr), Some(blocks)) => Some(Layout::Csr { row_ptr, blocks }),
        _ => {
            return Err(AttnError::unsupported(
                entry.name,
                "other than `block_mask`, or `row_ptr` and `blocks`",
            ));
        }
    };
    // What a tensor says of the pairs is not narrowed by a default.
    if (decider.dense.is_some() || decider.layout.is_some()) && !options.0.contains_key("window") {
        decider.window = None;
    }
    if decider.dense.is_some() && !options.0.contains_key("causal") {
        decider.causal = false;
    }
    let plain = attention(options, decider)?.named(entry.name);
    let attention = SparseAttention { score_rule: score_rule(options, tensors)?, ..plain };
    let index = tensors.get("table").map(|table| relative_max(&table.shape)).transpose()?;
    let index = index.map(|max| RelativeIndex::new(max, &shape));
    let learned: Option<Learned<'_>> = index.as_ref().map(|index| ("table", index as _));
    run(&attention, tensors, learned)
}
