//! Exact softmax attention in f64, row by row: the slow truth everything else is judged against.
//!
//! For query row `i` of head `h`, over the keys `j` that the mask lets it see:
//!
//! ```text
//! s_j = score_mod(softmax_scale * q_i . k_j)
//! m   = max_j s_j            (and the sink logit, if there is one)
//! Z   = sum_j e^(s_j - m)    (+ e^(sink_h - m))
//! out = sum_j e^(s_j - m) v_j / Z          lse = m + ln Z
//! ```
//!
//! No tiles, no SIMD, no threads. A row that sees nothing gives zeros and `lse = -inf`; so does a row whose
//! scores are all -inf. [`Exact::rows`] computes chosen rows only, so that the truth is affordable at a million
//! keys.

use crate::mask::{Head, Mask, SeeAll};
use crate::score::{ScoreMod, Unchanged};
use crate::{AttnError, Qkv, Result};

/// One query row of one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowId {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query row.
    pub i: usize,
}

/// The output of one query row.
#[derive(Debug, Clone, PartialEq)]
pub struct ExactRow {
    /// `[head_dim_v]`.
    pub out: Vec<f64>,
    /// Natural log of the sum of exponentials, sink included; -inf for a row that sees nothing.
    pub lse: f64,
}

/// What a variant's definition gives, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// `[batch, n_heads_q, n_q, head_dim_v]`, row-major.
    pub out: Vec<f64>,
    /// `[batch, n_heads_q, n_q]`, for variants whose rows are softmax rows.
    pub lse: Option<Vec<f64>>,
}

/// Exact attention with its mask, score mod, scale and sinks.
#[derive(Clone, Copy)]
pub struct Exact<'a> {
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// Who sees whom.
    pub mask: &'a dyn Mask,
    /// Applied after the scale and before the mask.
    pub score_mod: &'a dyn ScoreMod,
    /// One logit a query head that enters the normaliser and has no value.
    pub sinks: Option<&'a [f64]>,
}

impl Default for Exact<'_> {
    fn default() -> Self {
        Self { softmax_scale: None, mask: &SeeAll, score_mod: &Unchanged, sinks: None }
    }
}

impl Exact<'_> {
    /// All rows. Time `O(batch * n_heads_q * n_q * n_kv * (head_dim + head_dim_v))`, in scalar f64.
    ///
    /// # Errors
    /// As [`Exact::rows`].
    pub fn all(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        let mut ids = Vec::with_capacity(s.rows());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                ids.extend((0..s.n_q).map(|i| RowId { batch, head, i }));
            }
        }
        let rows = self.rows(x, &ids)?;
        let lse = rows.iter().map(|r| r.lse).collect();
        Ok(Reference { out: rows.into_iter().flat_map(|r| r.out).collect(), lse: Some(lse) })
    }

    /// Chosen rows, in the order given. Memory: one row of scores.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a row outside the problem or a scale that is not finite; [`AttnError::Shape`]
    /// unless there is one sink a query head.
    pub fn rows(&self, x: &Qkv<'_>, rows: &[RowId]) -> Result<Vec<ExactRow>> {
        let s = x.shape();
        let scale = self.softmax_scale.unwrap_or(1.0 / (s.head_dim as f64).sqrt());
        if !scale.is_finite() {
            return Err(AttnError::value("softmax_scale", scale, "a finite number"));
        }
        if let Some(sinks) = self.sinks
            && sinks.len() != s.n_heads_q
        {
            return Err(AttnError::shape("sinks", "n_heads_q", sinks.len(), s.n_heads_q));
        }
        let outside = |r: &&RowId| r.batch >= s.batch || r.head >= s.n_heads_q || r.i >= s.n_q;
        if let Some(row) = rows.iter().find(outside) {
            let expected = format!("a row of {} x {} x {}", s.batch, s.n_heads_q, s.n_q);
            return Err(AttnError::value("row", format!("{row:?}"), expected));
        }
        Ok(rows.iter().map(|&row| self.row(x, row, scale)).collect())
    }

    fn row(&self, x: &Qkv<'_>, RowId { batch, head, i }: RowId, scale: f64) -> ExactRow {
        let s = x.shape();
        let kv_head = s.kv_head(head);
        let mut q = vec![0.0; s.head_dim];
        x.q().read_row(batch, head, i, &mut q);

        let mut k = vec![0.0; s.head_dim];
        let mut seen = Vec::new(); // (key, score)
        for j in 0..s.n_kv {
            let at = Head { batch, head }.pair(i, j);
            if self.mask.sees(at) {
                x.k().read_row(batch, kv_head, j, &mut k);
                seen.push((j, self.score_mod.apply_f64(scale * dot(&q, &k), at)));
            }
        }

        let sink = self.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head]);
        // `f64::max` ignores NaN: a NaN score reaches the result through its exponential instead.
        let max = seen.iter().fold(sink, |max, (_, score)| max.max(*score));
        let mut out = vec![0.0; s.head_dim_v];
        if max == f64::NEG_INFINITY && !seen.iter().any(|(_, score)| score.is_nan()) {
            return ExactRow { out, lse: f64::NEG_INFINITY };
        }
        let mut sum = (sink - max).exp();
        let mut v = vec![0.0; s.head_dim_v];
        for (j, score) in seen {
            let weight = (score - max).exp();
            sum += weight;
            if weight == 0.0 {
                continue; // an infinite value behind a weight of zero is not seen
            }
            x.v().read_row(batch, kv_head, j, &mut v);
            out.iter_mut().zip(&v).for_each(|(o, v)| *o += weight * v);
        }
        out.iter_mut().for_each(|o| *o /= sum);
        ExactRow { out, lse: max + sum.ln() }
    }
}

/// Sum of products in eight running sums, which the compiler can keep in vector registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (a, b) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::View;
    use crate::mask::{Band, Predicate};

    fn qkv<'a>(q: &'a [f32], k: &'a [f32], v: &'a [f32], n_q: usize, n_kv: usize, d: usize) -> Qkv<'a> {
        let view = |name, data, n| View::contiguous(name, data, [1, 1, n, d]).unwrap();
        Qkv::new(view("q", q, n_q), view("k", k, n_kv), view("v", v, n_kv)).unwrap()
    }

    #[test]
    fn two_keys_by_hand() {
        // scores 0 and ln 3 (scale 1): weights 1/4 and 3/4
        let (q, k, v) = ([1.0, 0.0], [0.0, 5.0, 3f32.ln(), 7.0], [4.0, 8.0, 0.0, 4.0]);
        let exact = Exact { softmax_scale: Some(1.0), ..Exact::default() };
        let got = exact.all(&qkv(&q, &k, &v, 1, 2, 2)).unwrap();
        assert!((got.out[0] - 1.0).abs() < 1e-7 && (got.out[1] - 5.0).abs() < 1e-7, "{:?}", got.out);
        assert!((got.lse.unwrap()[0] - 4f64.ln()).abs() < 1e-7);
    }

    #[test]
    fn rows_that_see_nothing_are_zero() {
        let (q, k, v) = ([1.0; 4], [1.0; 2], [f32::NAN; 2]);
        let nobody = Predicate(|_| false);
        let exact = Exact { mask: &nobody, ..Exact::default() };
        let got = exact.all(&qkv(&q, &k, &v, 2, 1, 2)).unwrap();
        assert_eq!((got.out, got.lse), (vec![0.0; 4], Some(vec![f64::NEG_INFINITY; 2])));
        let none = exact.all(&qkv(&q, &[], &[], 2, 0, 2)).unwrap();
        assert_eq!(none.out, vec![0.0; 4]);
    }

    #[test]
    fn nan_stays_with_the_rows_that_see_it() {
        let (q, k, v) = ([1.0, 1.0, 1.0], [1.0, f32::NAN, 1.0], [1.0, 2.0, 3.0]);
        let causal = Band { offset: 0, left: None, right: Some(0) };
        let got = Exact { mask: &causal, ..Exact::default() }.all(&qkv(&q, &k, &v, 3, 3, 1)).unwrap();
        assert_eq!(got.out[0], 1.0);
        assert!(got.out[1].is_nan() && got.out[2].is_nan());
    }

    #[test]
    fn a_sink_takes_weight_and_gives_nothing() {
        let (q, k, v) = ([0.0], [0.0], [6.0]);
        let exact = Exact { sinks: Some(&[2f64.ln()]), ..Exact::default() };
        let got = exact.all(&qkv(&q, &k, &v, 1, 1, 1)).unwrap();
        assert!((got.out[0] - 2.0).abs() < 1e-12);
        assert!((got.lse.unwrap()[0] - 3f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn chosen_rows_equal_all_rows() {
        let data: Vec<f32> = (0..24).map(|x| (x as f32 * 0.7).sin()).collect();
        let x = qkv(&data[..12], &data[..12], &data[12..], 4, 4, 3);
        let all = Exact::default().all(&x).unwrap();
        let one = Exact::default().rows(&x, &[RowId { batch: 0, head: 0, i: 2 }]).unwrap();
        assert_eq!(one[0].out, all.out[6..9]);
        let outside = Exact::default().rows(&x, &[RowId { batch: 0, head: 0, i: 4 }]).unwrap_err();
        assert!(outside.to_string().contains("a row of 1 x 1 x 4"), "{outside}");
    }
}
