//! Score mods from tensors and options, one after the other behind the soft cap: a formula, then whatever is added.

use super::by_sequence::BySequence;
use super::formula::FormulaScore;
use crate::Flash;
use crate::engine::Problem;
use attn_core::registry::{NamedTensors, Options};
use attn_core::score::{Alibi, Bias, BiasIndex, RelativeBias, ScoreMod, T5Bias, T5Buckets, Then};
use attn_core::{AttnError, Result};

/// Tensors that are added to scores, for any sequences.
pub(super) const TENSORS: [&str; 3] = ["alibi_slopes", "relative_table", "t5_table"];

/// What is added to scores.
pub(super) struct Biases<'a> {
    formula: Option<FormulaScore>,
    alibi: Option<BySequence<Alibi>>,
    bias: Option<Bias<'a>>,
    relative: Option<BySequence<RelativeBias<'a>>>,
    t5: Option<BySequence<T5Bias>>,
}

impl<'a> Biases<'a> {
    /// Reads `bias`, `alibi_slopes`, `relative_table`, `t5_table` and the option `score_mod`.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor or option that does not fit.
    pub(super) fn read(
        flash: &Flash,
        options: &Options,
        tensors: &'a NamedTensors,
        problem: &Problem<'_>,
    ) -> Result<Self> {
        let formula = options.get::<String>("score_mod")?;
        let formula = formula.map(|text| FormulaScore::new("score_mod", &text)).transpose()?;
        let alibi = tensors.f32("alibi_slopes")?.map(|(_, slopes)| {
            BySequence::new(problem, flash.align, |shape, offset| Alibi::new(slopes.to_vec(), shape, offset))
        });
        let bias = tensors.f32("bias")?.map(|(axes, bias)| Bias::new(bias, axes, &problem.shape()));
        let relative = matrix(tensors, "relative_table")?.map(|(_, width, table)| {
            if width % 2 == 0 {
                let expected = "2 * max + 1 distances";
                return Err(AttnError::shape("relative_table", "width", width, expected));
            }
            BySequence::new(problem, flash.align, |shape, offset| {
                RelativeBias::new(table, width / 2, shape, offset)
            })
        });
        let max_distance = options.get_or("max_distance", 128)?;
        let bidirectional = options.get_or("bidirectional", true)?;
        let t5 = matrix(tensors, "t5_table")?.map(|(n_buckets, _, table)| {
            let buckets = T5Buckets::new(n_buckets, max_distance, bidirectional)?;
            BySequence::new(problem, flash.align, |shape, offset| T5Bias::new(table, buckets, shape, offset))
        });
        Ok(Self {
            formula,
            alibi: alibi.transpose()?,
            bias: bias.transpose()?,
            relative: relative.transpose()?,
            t5: t5.transpose()?,
        })
    }

    /// Those that are learned: their tensors' names, and which pair reads which element.
    pub(super) fn learned(&self) -> Vec<(&'static str, &dyn BiasIndex)> {
        let bias = self.bias.as_ref().map(|bias| ("bias", bias as &dyn BiasIndex));
        let relative = self.relative.as_ref().map(|table| ("relative_table", table as &dyn BiasIndex));
        let t5 = self.t5.as_ref().map(|table| ("t5_table", table as &dyn BiasIndex));
        [bias, relative, t5].into_iter().flatten().collect()
    }

    /// All of them, in order.
    pub(super) fn score_mod(&self) -> impl ScoreMod {
        let Self { formula, alibi, bias, relative, t5 } = self;
        let tables = Then(relative.as_ref(), t5.as_ref());
        Then(Then(formula.as_ref(), alibi.as_ref()), Then(bias.as_ref(), tables))
    }
}

/// Rows, columns and numbers of a table.
type Matrix<'a> = (usize, usize, &'a [f32]);

fn matrix<'a>(tensors: &'a NamedTensors, name: &str) -> Result<Option<Matrix<'a>>> {
    match tensors.f32(name)? {
        None => Ok(None),
        Some(([rows, columns], table)) => Ok(Some((*rows, *columns, table))),
        Some((shape, _)) => {
            Err(AttnError::value(format!("{name}'s shape"), format!("{shape:?}"), "two axes"))
        }
    }
}
