//! The kernel on every instruction set against the textbook formula.

use super::{DISTANCES, Diagonals, Segment, Workspace};
use attn_core::simd::Isa;
use attn_core::view::RowsMut;

fn numbers<const W: usize>(n: usize, width: usize, seed: f32) -> Vec<[f32; W]> {
    let number = |i: usize, c: usize| if c < width { ((i * width + c + 1) as f32 * seed).sin() } else { 0.0 };
    (0..n).map(|i| std::array::from_fn(|c| number(i, c))).collect()
}

/// Queries at `position ..` whose rows already hold what `before` weighs.
fn check<const W: usize>(isa: Isa, distances: &[u32], position: isize, n_q: usize, before: Option<f32>) {
    const SCALE: f32 = 0.7;
    let (width, width_v, n_kv) = (W - 7, W - 3, (position + n_q as isize).max(1) as usize);
    let (q, k) = (numbers::<W>(n_q, width, 0.37), numbers::<W>(n_kv, width, 0.73));
    let v = numbers::<W>(n_kv, width_v, 0.91);
    let mut lse = vec![before.unwrap_or(f32::NEG_INFINITY); n_q];
    // What a row without keys holds does not count.
    let mut out = vec![if before.is_some() { 0.25 } else { f32::NAN }; n_q * width_v];
    let segments = Segment::cut::<W>(distances);
    assert_eq!(segments.iter().map(Segment::len).sum::<usize>(), distances.len());
    let mut workspace = Workspace::default();
    isa.run(Diagonals {
        q: &q,
        k: &k,
        v: &v,
        position,
        segments: &segments,
        softmax_scale: SCALE,
        workspace: &mut workspace,
        out: RowsMut::new(&mut out, width_v, width_v),
        lse: &mut lse,
    });
    for i in 0..n_q {
        let p = position + i as isize;
        let keys = distances.iter().map(|d| p - *d as isize).filter(|j| *j >= 0).map(|j| j as usize);
        let dot = |j: usize| q[i].iter().zip(&k[j]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let scores: Vec<_> = keys.map(|j| (f64::from(SCALE) * dot(j), j)).collect();
        let had = before.map_or(0.0, |lse| f64::from(lse).exp());
        let sum = had + scores.iter().map(|(s, _)| s.exp()).sum::<f64>();
        let what = format!("{isa}, rows of {W}, {} distances, position {p}, {before:?}", distances.len());
        if sum == 0.0 {
            assert_eq!(lse[i], f32::NEG_INFINITY, "{what}");
        } else {
            assert!((f64::from(lse[i]) - sum.ln()).abs() < 2e-6, "{what}: {} for {}", lse[i], sum.ln());
        }
        for c in 0..width_v {
            let own = scores.iter().map(|(s, j)| s.exp() * f64::from(v[*j][c])).sum::<f64>();
            let want = if sum == 0.0 { 0.0 } else { (had * 0.25 + own) / sum };
            let got = out[i * width_v + c];
            assert!((f64::from(got) - want).abs() < 2e-6, "{what}, column {c}: {got} for {want}");
        }
    }
}

#[test]
fn every_isa_and_width_equals_the_formula() {
    let lists: [Vec<u32>; 7] = [
        vec![0],
        vec![3, 9, 10],
        (0..17).map(|d| d * d).collect(),
        (0..2 * DISTANCES as u32 + 1).map(|d| 3 * d + d % 2).collect(),
        // Keys that two neighbours share, from four on together.
        vec![0, 1, 2, 5, 6, 9, 20, 21, 22, 23, 24, 25],
        (3..60).collect(),
        // Farther apart than one segment spans.
        vec![1, 2, 1500, 1501],
    ];
    for isa in Isa::available() {
        for distances in &lists {
            for before in [None, Some(1.5), Some(-60.0)] {
                check::<64>(isa, distances, 0, 70, before);
                check::<128>(isa, distances, -3, 40, before);
                check::<64>(isa, distances, 1490, 20, before);
            }
        }
    }
}

#[test]
fn scores_of_any_size_stay_finite() {
    for isa in Isa::available() {
        // The keys' products with the query grow by 40 from one to the next: each raises the reference.
        let k: Vec<[f32; 64]> = (0..50).map(|j| std::array::from_fn(|_| j as f32 * 40.0 / 64.0)).collect();
        let v: Vec<[f32; 64]> = (0..50).map(|j| [j as f32; 64]).collect();
        let (mut out, mut lse) = (vec![7.0; 64], vec![-1e4]);
        let segments = Segment::cut::<64>(&(0..50).collect::<Vec<_>>());
        isa.run(Diagonals {
            q: &[[1.0; 64]],
            k: &k,
            v: &v,
            position: 49,
            segments: &segments,
            softmax_scale: 1.0,
            workspace: &mut Workspace::default(),
            out: RowsMut::new(&mut out, 64, 64),
            lse: &mut lse,
        });
        assert!((lse[0] - 49.0 * 40.0).abs() < 1e-3, "{isa}: {}", lse[0]);
        assert!(out.iter().all(|x| (x - 49.0).abs() < 1e-4), "{isa}: {out:?}");
    }
}

#[test]
fn nan_reaches_the_rows_that_see_it() {
    for isa in Isa::available() {
        let mut k = numbers::<64>(100, 64, 0.3);
        k[40][5] = f32::NAN;
        let (q, v) = (numbers::<64>(100, 64, 0.7), numbers::<64>(100, 64, 0.5));
        let (mut out, mut lse) = (vec![0.0; 6400], vec![f32::NEG_INFINITY; 100]);
        isa.run(Diagonals {
            q: &q,
            k: &k,
            v: &v,
            position: 0,
            segments: &Segment::cut::<64>(&[0, 7, 30]),
            softmax_scale: 0.125,
            workspace: &mut Workspace::default(),
            out: RowsMut::new(&mut out, 64, 64),
            lse: &mut lse,
        });
        for i in 0..100 {
            let is_poisoned = [40, 47, 70].contains(&i);
            assert_eq!(lse[i].is_nan(), is_poisoned, "{isa}: lse of row {i}");
            assert!(out[i * 64..][..64].iter().all(|x| x.is_nan() == is_poisoned), "{isa}: row {i}");
        }
    }
}
