//! Score stages against their definitions, in f64, on every instruction set.

use super::*;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::{TensorView, View};

/// Numbers around 0, all different.
fn numbers(len: usize, seed: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + 1.0) * seed).sin() * 1.5).collect()
}

/// One head.
struct Head {
    data: Vec<f32>,
    width: usize,
}

impl Head {
    fn new(n: usize, width: usize, seed: f32) -> Self {
        Self { data: numbers(n * width, seed), width }
    }

    fn view(&self) -> TensorView<'_> {
        let shape = [1, 1, self.data.len() / self.width, self.width];
        View::contiguous("head", &self.data, shape).unwrap().into()
    }

    fn rows(&self) -> HeadRows<'_> {
        HeadRows::of(&self.view(), 0, 0)
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.width..][..self.width]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Softmax of scores, in place.
fn normalise(row: &mut [f64]) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|s| if *s > f64::NEG_INFINITY { (s - max).exp() } else { 0.0 }).sum();
    let weight = |s: f64| if s > f64::NEG_INFINITY { (s - max).exp() / sum } else { 0.0 };
    row.iter_mut().for_each(|s| *s = weight(*s));
}

#[track_caller]
fn assert_near(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let near = (f64::from(*got) - want).abs() <= 2e-5 * want.abs().max(1.0);
        assert!(near || f64::from(*got) == *want, "{what}[{at}]: {got} for {want}");
    }
}

#[test]
fn means_and_similarities() {
    for isa in Isa::available() {
        for (n, width, block) in [(10, 5, 4), (64, 16, 16), (3, 1, 8), (33, 20, 33)] {
            let x = Head::new(n, width, 0.7);
            let means = BlockMeans::of(isa, &x.view(), block);
            for at in 0..n.div_ceil(block) {
                let rows = at * block..((at + 1) * block).min(n);
                let count = rows.len() as f64;
                let of = |c: usize| rows.clone().map(|i| f64::from(x.row(i)[c])).sum::<f64>() / count;
                let want: Vec<f64> = (0..width).map(of).collect();
                assert_near("mean", &means.head(0)[at * width..][..width], &want);
                let cosine = |i: usize, j: usize| {
                    let norm = |i| dot(x.row(i), x.row(i)).sqrt();
                    dot(x.row(i), x.row(j)) / norm(i) / norm(j)
                };
                let all: f64 = rows.clone().flat_map(|i| rows.clone().map(move |j| cosine(i, j))).sum();
                assert_near("similarity", &means.similarity(0)[at..=at], &[all / count / count]);
            }
        }
    }
}

#[test]
fn products_of_means() {
    for isa in Isa::available() {
        for (n_q, n_kv, width) in [(3, 5, 4), (32, 70, 17), (1, 1, 1), (9, 300, 64)] {
            let (q, k) = (Head::new(n_q, width, 0.3), Head::new(n_kv, width, 0.9));
            let turned = Turned::of(&BlockMeans::of(isa, &k.view(), 1), 0);
            let mut scores = Vec::new();
            for visible in [0, n_kv / 2, n_kv] {
                isa.run(pooled_rows(&q.data, &turned, visible, &mut scores));
                let pairs = (0..n_q).flat_map(|i| (0..visible).map(move |j| (i, j)));
                let want: Vec<f64> = pairs.map(|(i, j)| dot(q.row(i), k.row(j))).collect();
                assert_near("scores", &scores, &want);
            }
        }
    }
}

#[test]
fn sums_over_the_probabilities_of_some_queries() {
    for isa in Isa::available() {
        for (n_q, n_kv, first) in [(40, 40, 0), (70, 70, 6), (5, 200, 1), (9, 4, 2), (300, 300, 299)] {
            let (q, k) = (Head::new(n_q, 8, 0.37), Head::new(n_kv, 8, 0.73));
            let sums = QuerySums::of(isa, q.rows(), k.rows(), first..n_q, 0.6);
            let (mut columns, mut diagonals) = (vec![0.0; n_kv], vec![0.0; n_kv]);
            for i in first..n_q {
                let position = (i + n_kv) as isize - n_q as isize;
                let seen = |j: usize| j as isize <= position;
                let score =
                    |j: usize| if seen(j) { 0.6 * dot(q.row(i), k.row(j)) } else { f64::NEG_INFINITY };
                let mut row: Vec<f64> = (0..n_kv).map(score).collect();
                normalise(&mut row);
                for j in (0..n_kv).filter(|j| seen(*j)) {
                    columns[j] += row[j];
                    diagonals[position as usize - j] += row[j];
                }
            }
            assert_near("columns", &sums.columns, &columns);
            assert_near("diagonals", &sums.diagonals, &diagonals);
        }
    }
}

#[test]
fn block_sums_of_antidiagonals() {
    for isa in Isa::available() {
        let cases =
            [(32, 32, 4, 2), (33, 33, 4, 3), (50, 50, 3, 4), (8, 40, 4, 2), (7, 7, 1, 2), (200, 200, 2, 8)];
        for ((n_q, n_kv, stride, block), causal) in cases.into_iter().flat_map(|c| [(c, true), (c, false)]) {
            let (q, k) = (Head::new(n_q, 6, 0.41), Head::new(n_kv, 6, 0.83));
            let groups = Strided { q: q.rows(), k: k.rows(), stride, block, scale: 0.5, causal };
            let (n_groups, n_blocks) = (n_kv.div_ceil(stride), n_kv.div_ceil(stride).div_ceil(block));
            let n_rows = n_q.div_ceil(stride);
            let mut got = vec![f32::NAN; n_rows * n_blocks];
            for first in (0..n_rows).step_by(PANEL) {
                let count = PANEL.min(n_rows - first);
                let sums = &mut got[first * n_blocks..][..count * n_blocks];
                isa.run(antidiagonal_sums(groups, first, count, sums));
            }
            let mut want = Vec::new();
            for a in 0..n_rows {
                let last = ((a + 1) * stride).min(n_q) - 1;
                let score = |b: usize| {
                    if causal && (b * stride + n_q) > last + n_kv {
                        return f64::NEG_INFINITY;
                    }
                    let pairs = (0..stride).map(|t| (a * stride + stride - 1 - t, b * stride + t));
                    0.5 * pairs
                        .filter(|(i, j)| *i < n_q && *j < n_kv)
                        .map(|(i, j)| dot(q.row(i), k.row(j)))
                        .sum::<f64>()
                };
                let mut row: Vec<f64> = (0..n_groups).map(score).collect();
                normalise(&mut row);
                want.extend(row.chunks(block).map(|block| block.iter().sum::<f64>()));
            }
            assert_near(&format!("{isa} {n_q} x {n_kv}, stride {stride}, causal {causal}"), &got, &want);
        }
    }
}

#[test]
fn largest_scores_of_blocks() {
    for isa in Isa::available() {
        for causal in [true, false] {
            let (q, k) = (Head::new(50, 7, 0.29), Head::new(60, 7, 0.61));
            let (rows, blocks, mut maxima) = (5..45, [0, 2, 5], Vec::new());
            let (q_rows, k_rows, blocks) = (q.rows(), k.rows(), (&blocks[..], 11));
            isa.run(TileMaxima {
                q: q_rows,
                k: k_rows,
                rows: rows.clone(),
                blocks,
                softmax_scale: -0.7,
                causal,
                maxima: &mut maxima,
            });
            let mut want = Vec::new();
            for block in blocks.0 {
                for i in rows.clone() {
                    let keys = (block * 11..(block * 11 + 11).min(60)).filter(|j| !causal || *j <= i + 10);
                    let score = |j: usize| f64::from(-0.7f32) * dot(q.row(i), k.row(j));
                    want.push(keys.map(score).fold(f64::NEG_INFINITY, f64::max));
                }
            }
            assert_near("maxima", &maxima, &want);
        }
    }
}

struct Read<'a>(HeadRows<'a>, &'a mut Vec<f32>);

impl SimdOp for Read<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Vec<f32> {
        let lhs = self.0.lhs(simd, 1..3, self.1);
        (0..2).flat_map(|i| (0..self.0.width()).map(move |c| lhs.data[i * lhs.row_stride + c])).collect()
    }
}

#[test]
fn rows_of_every_type_are_read_alike() {
    let x = [1.0f32, -2.0, 0.5, 4.0, 0.25, -8.0, 3.0, 0.0];
    let bf16: Vec<_> = x.iter().map(|x| half::bf16::from_f32(*x)).collect();
    let f16: Vec<_> = x.iter().map(|x| half::f16::from_f32(*x)).collect();
    let shape = [1, 1, 4, 2];
    let views: [TensorView<'_>; 3] = [
        View::contiguous("x", &x, shape).unwrap().into(),
        View::contiguous("x", &bf16, shape).unwrap().into(),
        View::contiguous("x", &f16, shape).unwrap().into(),
    ];
    for view in views {
        for isa in Isa::available() {
            assert_eq!(isa.run(Read(HeadRows::of(&view, 0, 0), &mut Vec::new())), x[2..6]);
        }
    }
}
