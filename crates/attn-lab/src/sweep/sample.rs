//! Which query rows are compared with exact attention, and the comparison.
//!
//! The positions `0..n` are cut into equal strata; each gives the same number of rows, drawn without replacement over
//! its positions and all heads. The rows of a length are the same for all variants, and exact attention over them is
//! computed once.

use crate::{LabError, Result};
use attn_core::accuracy::{Accuracy, RowError};
use attn_core::exact::{Exact, RowId};
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::{AttnShape, Qkv};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Strata, if there are enough rows for at least two in each.
const STRATA: usize = 16;

/// Sampled rows with their exact outputs.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The rows.
    pub rows: Vec<RowId>,
    strata: Vec<usize>,
    exact: Vec<Vec<f64>>,
}

impl Sample {
    /// Draws up to `rows` rows of the problem and computes exact attention for them, on the current pool.
    ///
    /// # Errors
    /// Those of [`Exact::rows`].
    pub fn draw(x: &Qkv<'_>, causal: bool, rows: usize, seed: u64) -> Result<Self> {
        let (rows, strata): (Vec<RowId>, Vec<usize>) = choose(&x.shape(), rows, seed).into_iter().unzip();
        let band = Band::causal(&x.shape(), Align::BottomRight);
        let mask = if causal { &band as &dyn Mask } else { &SeeAll };
        let exact = Exact { mask, ..Exact::default() };
        let one = |row: &RowId| Ok(exact.rows(x, std::slice::from_ref(row))?.remove(0).out);
        let exact = rows.par_iter().map(one).collect::<attn_core::Result<_>>()?;
        Ok(Self { rows, strata, exact })
    }

    /// The error of `got`, one output row for each of [`Sample::rows`].
    ///
    /// # Errors
    /// [`LabError::Argument`] for another number of rows or no rows at all.
    pub fn compare(&self, got: &[Vec<f64>]) -> Result<Accuracy> {
        if got.len() != self.rows.len() {
            let (found, expected) = (got.len(), self.rows.len());
            return Err(LabError::Argument(format!("{found} output rows to compare, expected {expected}")));
        }
        let rows: Vec<RowError> = (got.iter().zip(&self.exact).zip(&self.strata))
            .map(|((got, want), stratum)| RowError::new(*stratum, got, want))
            .collect();
        Accuracy::of(&rows).ok_or_else(|| LabError::Argument("no rows to compare".into()))
    }
}

/// Rows with their strata.
fn choose(shape: &AttnShape, rows: usize, seed: u64) -> Vec<(RowId, usize)> {
    let heads = shape.batch * shape.n_heads_q;
    let strata = STRATA.min(rows / 2).min(shape.n_q).max(1);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut chosen = Vec::with_capacity(rows);
    for stratum in 0..strata {
        let edge = |s: usize| s * shape.n_q / strata;
        let (start, len) = (edge(stratum), edge(stratum + 1) - edge(stratum));
        let wanted = rows * (stratum + 1) / strata - rows * stratum / strata;
        let mut drawn = rand::seq::index::sample(&mut rng, len * heads, wanted.min(len * heads)).into_vec();
        drawn.sort_unstable();
        chosen.extend(drawn.into_iter().map(|at| {
            let (head, i) = (at % heads, start + at / heads);
            (RowId { batch: head / shape.n_heads_q, head: head % shape.n_heads_q, i }, stratum)
        }));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::DType;

    #[test]
    fn strata_share_the_rows_and_no_row_comes_twice() {
        let shape = AttnShape { batch: 2, ..AttnShape::square(3, 1000, 8) };
        let chosen = choose(&shape, 256, 1);
        assert_eq!(chosen.len(), 256);
        for stratum in 0..16 {
            let of: Vec<_> = chosen.iter().filter(|(_, s)| *s == stratum).collect();
            assert_eq!(of.len(), 16);
            let range = stratum * 1000 / 16..(stratum + 1) * 1000 / 16;
            assert!(of.iter().all(|(row, _)| range.contains(&row.i)));
        }
        for (i, (row, _)) in chosen.iter().enumerate() {
            assert!(chosen[..i].iter().all(|(other, _)| other != row), "{row:?} twice");
        }
        for head in 0..3 {
            assert!(chosen.iter().filter(|(row, _)| row.head == head).count() > 50);
        }
        assert_eq!(choose(&shape, 256, 1), chosen);
        assert_ne!(choose(&shape, 256, 2), chosen);
    }

    #[test]
    fn a_small_problem_gives_all_of_its_rows() {
        let chosen = choose(&AttnShape::square(2, 5, 8), 256, 1);
        assert_eq!(chosen.len(), 10);
    }

    #[test]
    fn exact_rows_have_no_error_and_wrong_ones_have_theirs() {
        let shape = AttnShape::square(2, 64, 8);
        let inputs = crate::gauss::qkv(&shape, DType::F32, 3);
        let sample = Sample::draw(&inputs.qkv().unwrap(), true, 32, 1).unwrap();
        let none = sample.compare(&sample.exact).unwrap();
        assert_eq!((none.rel_l2, none.rows), (0.0, 32));
        let double: Vec<Vec<f64>> =
            sample.exact.iter().map(|r| r.iter().map(|x| 2.0 * x).collect()).collect();
        assert!((sample.compare(&double).unwrap().rel_l2 - 1.0).abs() < 1e-12);
        assert!(sample.compare(&double[1..]).is_err());
    }
}
