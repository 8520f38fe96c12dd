//! Problems to try a variant on: seeded numbers, storage orders and types, shapes at the edges.

mod ids;
mod shapes;
mod storage;

pub use ids::{packed_ids, scattered_ids};
pub use shapes::{edge_shapes, problems, shapes};
pub use storage::{Layout, StoredProblem, StoredTensor};

use attn_core::{AttnShape, Element, Qkv, Result, View};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// The inputs of one call in f32, each row-major in `(batch, heads, length, width)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Sizes.
    pub shape: AttnShape,
    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub q: Vec<f32>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub k: Vec<f32>,
    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub v: Vec<f32>,
}

impl Problem {
    /// Independent standard normal numbers; the same `seed` gives the same numbers on every machine.
    ///
    /// ```
    /// use attn_core::AttnShape;
    /// use attn_testkit::inputs::Problem;
    ///
    /// let problem = Problem::normal(AttnShape::square(2, 17, 8), 42);
    /// assert_eq!(problem, Problem::normal(AttnShape::square(2, 17, 8), 42));
    /// assert_eq!(problem.qkv()?.shape().n_kv, 17);
    /// # Ok::<(), attn_core::AttnError>(())
    /// ```
    pub fn normal(shape: AttnShape, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |axes: [usize; 4]| {
            let numbers = StandardNormal.sample_iter(&mut rng);
            numbers.take(axes.iter().product()).collect::<Vec<f32>>()
        };
        Self { shape, q: normal(shape.q()), k: normal(shape.k()), v: normal(shape.v()) }
    }

    /// With queries `by` times as large: by a thousand, scores become extreme.
    #[must_use]
    pub fn scale_queries(mut self, by: f32) -> Self {
        self.q.iter_mut().for_each(|x| *x *= by);
        self
    }

    /// With values `by` times as large.
    #[must_use]
    pub fn scale_values(mut self, by: f32) -> Self {
        self.v.iter_mut().for_each(|x| *x *= by);
        self
    }

    /// With `by` added to every value.
    #[must_use]
    pub fn shift_values(mut self, by: f32) -> Self {
        self.v.iter_mut().for_each(|x| *x += by);
        self
    }

    /// Query row `i` of a head, to be changed.
    ///
    /// # Panics
    /// If there is no such row; so do [`Problem::k_row`] and [`Problem::v_row`].
    pub fn q_row(&mut self, batch: usize, head: usize, i: usize) -> &mut [f32] {
        row(&mut self.q, self.shape.q(), [batch, head, i])
    }

    /// Key row `j` of a key/value head, to be changed.
    pub fn k_row(&mut self, batch: usize, head: usize, j: usize) -> &mut [f32] {
        row(&mut self.k, self.shape.k(), [batch, head, j])
    }

    /// Value row `j` of a key/value head, to be changed.
    pub fn v_row(&mut self, batch: usize, head: usize, j: usize) -> &mut [f32] {
        row(&mut self.v, self.shape.v(), [batch, head, j])
    }

    /// The inputs as they lie.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] if the numbers have been changed to another count than `shape` says.
    pub fn qkv(&self) -> Result<Qkv<'_>> {
        let s = self.shape;
        Qkv::new(
            View::contiguous("q", &self.q, s.q())?,
            View::contiguous("k", &self.k, s.k())?,
            View::contiguous("v", &self.v, s.v())?,
        )
    }

    /// The inputs in another storage order and type, rounded to nearest.
    pub fn store<E: Element>(&self, layout: Layout) -> StoredProblem<E> {
        let s = self.shape;
        StoredProblem {
            q: StoredTensor::from_rows(&self.q, s.q(), layout),
            k: StoredTensor::from_rows(&self.k, s.k(), layout),
            v: StoredTensor::from_rows(&self.v, s.v(), layout),
        }
    }
}

fn row(data: &mut [f32], [_, heads, n, width]: [usize; 4], [batch, head, i]: [usize; 3]) -> &mut [f32] {
    assert!(head < heads && i < n, "row {i} of head {head} in {heads} heads of {n} rows");
    &mut data[((batch * heads + head) * n + i) * width..][..width]
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::OutMut;
    use half::{bf16, f16};

    const SHAPE: AttnShape =
        AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 3, n_kv: 5, head_dim: 6, head_dim_v: 7 };

    fn check_storage<E: Element>(roundoff: f64) {
        let problem = Problem::normal(SHAPE, 1);
        for layout in Layout::ALL {
            let stored = problem.store::<E>(layout);
            let x = stored.qkv().unwrap();
            assert_eq!((x.shape(), x.dtype()), (SHAPE, E::DTYPE));
            for (view, rows) in [(x.q(), &problem.q), (x.k(), &problem.k), (x.v(), &problem.v)] {
                let [batch, heads, ..] = view.shape();
                let read: Vec<f64> =
                    (0..batch * heads).flat_map(|h| view.head_f64(h / heads, h % heads)).collect();
                assert_eq!(read.len(), rows.len());
                for (got, want) in read.iter().zip(rows) {
                    let want = f64::from(*want);
                    assert!((got - want).abs() <= roundoff * want.abs(), "{layout:?}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn every_storage_holds_the_same_numbers() {
        check_storage::<f32>(0.0);
        check_storage::<bf16>(attn_core::DType::Bf16.roundoff());
        check_storage::<f16>(attn_core::DType::F16.roundoff());
    }

    #[test]
    fn outputs_are_read_back_and_gaps_are_watched() {
        for layout in Layout::ALL {
            let mut out = StoredTensor::<f32>::filled(SHAPE.out(), layout, f32::NAN);
            assert!(out.to_rows().iter().all(|x| x.is_nan()));
            let OutMut::F32(view) = out.view_mut("out").unwrap().into() else { panic!("f32") };
            for (at, mut block) in view.into_blocks(1).enumerate() {
                block.out.row_mut(0).fill(at as f32);
            }
            let want: Vec<f32> = (0..SHAPE.rows()).flat_map(|at| [at as f32; 7]).collect();
            assert_eq!(out.to_rows(), want, "{layout:?}");
            assert!(out.gaps_hold(f32::NAN), "{layout:?}");
        }
        let padded = StoredTensor::<f32>::filled(SHAPE.out(), Layout::Padded, 0.0);
        assert!(!padded.gaps_hold(f32::NAN), "a changed gap is seen");
    }

    #[test]
    fn numbers_are_standard_normal() {
        let p = Problem::normal(AttnShape::square(2, 200, 50), 3);
        let all: Vec<f64> = [&p.q, &p.k, &p.v].into_iter().flatten().map(|x| f64::from(*x)).collect();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
        assert_ne!(p.q, p.k);
    }
}
