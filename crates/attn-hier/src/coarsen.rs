//! Coarsening: one row for a group of neighbouring rows.
//!
//! Level 0 are the `n` tokens. With ratio `r`, node `i` of level `l` stands for the tokens `i r^l .. (i + 1) r^l` that
//! exist, `c_l[i]` of them; only the last node of a level can have fewer than `r^l`. From the level below,
//!
//! ```text
//! mean    x_l[i] = sum over children j of (c_{l-1}[j] / c_l[i]) x_{l-1}[j]      the mean of its tokens
//! first   x_l[i] = x_{l-1}[r i]                                               its first token
//! ```
//!
//! A coarse key counts for its tokens through its log mass `ln c_l[i]`, added to its score: with the mean `v` of their
//! values, `e^(s + ln c) v` is `e^s` times their sum, and the normaliser counts `c` tokens.

use attn_core::parallel::for_each_task;
use attn_core::view::contiguous_strides;
use attn_core::{Element, OutMut, Result, TensorView, View, ViewMut};
use std::ops::Range;

/// Coarse rows of one task.
const BLOCK: usize = 256;

/// How a coarse row is made of its children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The mean of the tokens.
    Mean,
    /// The first token: what a causal query may use, because a mean would see later inputs.
    First,
}

/// The nodes of one level: which tokens each stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nodes {
    n_tokens: usize,
    /// Tokens of every node but the last.
    tokens_each: usize,
}

impl Nodes {
    /// Level 0: each token is a node.
    pub(crate) fn tokens(n_tokens: usize) -> Self {
        Self { n_tokens, tokens_each: 1 }
    }

    /// The next level: groups of `ratio` of these nodes.
    pub(crate) fn coarser(self, ratio: usize) -> Self {
        Self { tokens_each: self.tokens_each * ratio, ..self }
    }

    /// Number of nodes.
    pub(crate) fn len(&self) -> usize {
        self.n_tokens.div_ceil(self.tokens_each)
    }

    /// Tokens of node `i`.
    fn count(&self, i: usize) -> usize {
        self.tokens_each.min(self.n_tokens - i * self.tokens_each)
    }

    /// `ln` of the tokens of each node: the bias of a coarse key.
    pub(crate) fn log_mass(&self) -> Vec<f32> {
        (0..self.len()).map(|i| (self.count(i) as f64).ln() as f32).collect()
    }
}

/// Rows of one level in f32, `[batch, heads, nodes, width]`, row-major.
#[derive(Debug)]
pub(crate) struct LevelRows {
    data: Vec<f32>,
    shape: [usize; 4],
}

impl LevelRows {
    /// Rows of zeros.
    pub(crate) fn zeros(shape: [usize; 4]) -> Self {
        Self { data: vec![0.0; shape.iter().product()], shape }
    }

    /// To read.
    pub(crate) fn view(&self) -> Result<View<'_, f32>> {
        View::new("level", &self.data, self.shape, contiguous_strides(self.shape))
    }

    /// To write.
    pub(crate) fn view_mut(&mut self) -> Result<ViewMut<'_, f32>> {
        ViewMut::new("level", &mut self.data, self.shape, contiguous_strides(self.shape))
    }

    /// To write, by an engine.
    pub(crate) fn as_out(&mut self) -> Result<OutMut<'_>> {
        Ok(self.view_mut()?.into())
    }
}

/// Rows `fine [batch, heads, nodes.len(), width]` of one level as rows of the next: `nodes.coarser(ratio)`.
///
/// Reads every row once (`First`: one of `ratio`), in parallel over blocks of coarse rows of one head.
///
/// # Errors
/// None for a `fine` of that length.
pub(crate) fn coarsen(fine: &TensorView<'_>, nodes: Nodes, ratio: usize, kind: Kind) -> Result<LevelRows> {
    match fine {
        TensorView::F32(fine) => coarsen_typed(fine, nodes, ratio, kind),
        TensorView::Bf16(fine) => coarsen_typed(fine, nodes, ratio, kind),
        TensorView::F16(fine) => coarsen_typed(fine, nodes, ratio, kind),
    }
}

fn coarsen_typed<E: Element>(
    fine: &View<'_, E>,
    nodes: Nodes,
    ratio: usize,
    kind: Kind,
) -> Result<LevelRows> {
    let [batch, heads, n, width] = fine.shape();
    debug_assert_eq!(n, nodes.len());
    let coarser = nodes.coarser(ratio);
    let mut level = LevelRows::zeros([batch, heads, coarser.len(), width]);
    let blocks: Vec<_> = level.view_mut()?.into_blocks(BLOCK).collect();
    for_each_task(
        blocks.into_iter(),
        || (),
        |(), mut block| {
            let fine = fine.head(block.batch, block.head);
            for (at, i) in block.rows.clone().enumerate() {
                let row = block.out.row_mut(at);
                let children = i * ratio..((i + 1) * ratio).min(n);
                match kind {
                    Kind::Mean => add_mean(row, fine, children, |j| {
                        (nodes.count(j) as f64 / coarser.count(i) as f64) as f32
                    }),
                    Kind::First => {
                        row.iter_mut().zip(fine.row(children.start)).for_each(|(x, y)| *x = y.load())
                    }
                }
            }
        },
    );
    Ok(level)
}

/// `row += sum of share(j) fine[j]`: shares instead of a division at the end, so that no sum overflows.
fn add_mean<E: Element>(
    row: &mut [f32],
    fine: attn_core::view::Rows<'_, E>,
    children: Range<usize>,
    share: impl Fn(usize) -> f32,
) {
    for j in children {
        let share = share(j);
        row.iter_mut().zip(fine.row(j)).for_each(|(x, y)| *x += share * y.load());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pyramid(data: &[f32], n: usize, width: usize, kind: Kind, ratio: usize, levels: usize) -> LevelRows {
        let mut nodes = Nodes::tokens(n);
        let view = View::contiguous("x", data, [1, 2, n, width]).unwrap();
        let mut rows = coarsen(&view.into(), nodes, ratio, kind).unwrap();
        for _ in 1..levels {
            nodes = nodes.coarser(ratio);
            rows = coarsen(&rows.view().unwrap().into(), nodes, ratio, kind).unwrap();
        }
        rows
    }

    #[test]
    fn a_coarse_row_is_the_mean_of_the_tokens_that_exist() {
        for (n, ratio, levels) in [(8, 2, 1), (8, 2, 3), (13, 2, 2), (13, 3, 2), (1, 2, 4), (700, 2, 1)] {
            let width = 3;
            let data: Vec<f32> = (0..2 * n * width).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
            let got = pyramid(&data, n, width, Kind::Mean, ratio, levels);
            let group = ratio.pow(levels as u32);
            assert_eq!(got.shape, [1, 2, n.div_ceil(group), width]);
            for (at, got) in got.data.iter().enumerate() {
                let (c, i, head) =
                    (at % width, at / width % got_len(n, group), at / width / got_len(n, group));
                let tokens = i * group..((i + 1) * group).min(n);
                let count = tokens.len() as f64;
                let want: f64 =
                    tokens.map(|t| f64::from(data[(head * n + t) * width + c])).sum::<f64>() / count;
                assert!((f64::from(*got) - want).abs() < 1e-6, "n {n}, ratio {ratio}, levels {levels}");
            }
        }
    }

    fn got_len(n: usize, group: usize) -> usize {
        n.div_ceil(group)
    }

    #[test]
    fn first_takes_the_first_token_of_each_group() {
        let data: Vec<f32> = (0..2 * 11).map(|i| i as f32).collect();
        assert_eq!(pyramid(&data, 11, 1, Kind::First, 2, 2).data, [0., 4., 8., 11., 15., 19.]);
    }

    #[test]
    fn mass_counts_every_token_once() {
        for n in [1, 2, 5, 8, 13, 64, 100] {
            let mut nodes = Nodes::tokens(n);
            for _ in 0..8 {
                let mass: f64 = nodes.log_mass().iter().map(|m| f64::from(*m).exp()).sum();
                assert!((mass - n as f64).abs() < 1e-4, "{n} tokens, mass {mass}");
                nodes = nodes.coarser(2);
            }
        }
    }

    #[test]
    fn means_of_huge_rows_do_not_overflow() {
        let data = [3e38f32; 8];
        let got = pyramid(&data, 4, 1, Kind::Mean, 2, 2);
        assert!(got.data.iter().all(|x| (x / 3e38 - 1.0).abs() < 1e-6), "{:?}", got.data);
    }
}
