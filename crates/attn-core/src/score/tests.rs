use super::*;
use crate::AttnShape;

const AT: Pair = Pair { batch: 0, head: 1, i: 2, j: 5 };

#[test]
fn kernel_and_definition_agree() {
    let shape = AttnShape { n_q: 4, n_kv: 6, ..AttnShape::square(2, 1, 1) };
    let bias: Vec<f32> = (0..24).map(|x| x as f32 / 7.0).collect();
    let t5 = T5Buckets::new(4, 8, true).unwrap();
    let mods: [&dyn ScoreMod; 8] = [
        &Unchanged,
        &Alibi::new(vec![0.5, 0.25], &shape, -3).unwrap(),
        &RelativeBias::new(&bias[..10], 2, &shape, 2).unwrap(),
        &T5Bias::new(&bias[..8], t5, &shape, 2).unwrap(),
        &SoftCap::new(3.0).unwrap(),
        &Alibi::new(Alibi::default_slopes(2), &shape, 2).unwrap(),
        &Bias::new(&bias, &[4, 6], &shape).unwrap(),
        &Then(SoftCap::new(3.0).unwrap(), ScoreFn(|s, p: Pair| s * p.i as f32)),
    ];
    for (m, score_mod) in mods.iter().enumerate() {
        let (got, want) = (score_mod.apply(1.7, AT), score_mod.apply_f64(f64::from(1.7f32), AT));
        assert!((f64::from(got) - want).abs() < 1e-5, "mod {m}: {got} and {want}");
    }
}

#[test]
fn derivatives_are_those_of_the_definition() {
    let cap = SoftCap::new(3.0).unwrap();
    let square = ScoreFnWithDerivative(|s: f32, _| s * s, |s, _| 2.0 * s);
    let shape = AttnShape::square(2, 6, 1);
    let alibi = Alibi::new(Alibi::default_slopes(2), &shape, 0).unwrap();
    let mods: [&dyn ScoreMod; 5] = [&Unchanged, &cap, &square, &Then(cap, square), &Then(&cap, Some(&alibi))];
    for (m, score_mod) in mods.iter().enumerate() {
        let at = |s: f64| score_mod.apply_f64(s, AT);
        let slope = (at(1.25 + 0.0625) - at(1.25 - 0.0625)) / 0.125;
        let got = f64::from(score_mod.derivative(1.25, AT));
        assert!((got - slope).abs() < 2e-3, "mod {m}: {got} and {slope}");
    }
    for score_mod in [&cap as &dyn ScoreMod, &Then(cap, &alibi), &Then(&alibi, Some(cap))] {
        let at = |s: f64| score_mod.apply_f64(s, AT);
        let (slope, got) = ((at(1.2501) - at(1.2499)) / 2e-4, score_mod.derivative_f64(1.25, AT));
        assert!((got - slope).abs() < 1e-8, "in f64: {got} and {slope}");
    }
    assert!(!Then(cap, ScoreFn(|s, _| s)).has_derivative());
}

#[test]
fn default_slopes_follow_the_paper() {
    assert_eq!(Alibi::default_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
    let six = Alibi::default_slopes(6);
    assert_eq!(six[..4], Alibi::default_slopes(4));
    assert_eq!(six[4..], [0.5, 0.125]);
}

#[test]
fn bad_caps_are_refused() {
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(SoftCap::new(cap).is_err(), "{cap}");
    }
}

/// All pairs of a problem.
fn pairs(s: &AttnShape) -> impl Iterator<Item = Pair> + use<> {
    let AttnShape { batch, n_heads_q, n_q, n_kv, .. } = *s;
    (0..batch * n_heads_q * n_q * n_kv).map(move |at| {
        let (row, j) = (at / n_kv, at % n_kv);
        Pair { batch: row / n_q / n_heads_q, head: row / n_q % n_heads_q, i: row % n_q, j }
    })
}

const SHAPE: AttnShape =
    AttnShape { batch: 2, n_heads_q: 3, n_heads_kv: 1, n_q: 5, n_kv: 9, head_dim: 1, head_dim_v: 1 };

/// Every score moves by the element that `index` names.
fn check_index<B: BiasIndex + ScoreMod>(bias: &B, table: &[f32]) {
    assert_eq!(bias.len(), table.len());
    for at in pairs(&SHAPE) {
        assert_eq!(bias.apply(0.0, at), table[bias.index(at)], "{at:?}");
        assert_eq!(bias.apply_f64(0.0, at), f64::from(table[bias.index(at)]), "{at:?}");
    }
}

#[test]
fn biases_name_the_element_they_add() {
    let table: Vec<f32> = (0..270).map(|x| (x as f32).sin()).collect();
    for axes in [&[2, 3, 5, 9][..], &[3, 1, 9], &[2, 1, 1, 1], &[5, 1], &[9]] {
        let table = &table[..axes.iter().product()];
        check_index(&Bias::new(table, axes, &SHAPE).unwrap(), table);
    }
    for offset in [-20, -1, 0, 4, 20] {
        for max in [0, 2, 30] {
            let table = &table[..3 * (2 * max + 1)];
            check_index(&RelativeBias::new(table, max, &SHAPE, offset).unwrap(), table);
        }
        for (n, max, bidirectional) in [(4, 3, true), (2, 40, false), (16, 9, true)] {
            let (table, buckets) = (&table[..3 * n], T5Buckets::new(n, max, bidirectional).unwrap());
            check_index(&T5Bias::new(table, buckets, &SHAPE, offset).unwrap(), table);
        }
    }
}

#[test]
fn relative_biases_depend_on_the_distance_alone() {
    let table: Vec<f32> = (0..3 * 16).map(|x| x as f32).collect();
    let buckets = T5Buckets::new(16, 6, true).unwrap();
    let t5 = T5Bias::new(&table, buckets, &SHAPE, 4).unwrap();
    let relative = RelativeBias::new(&table[..15], 2, &SHAPE, 4).unwrap();
    for at in pairs(&SHAPE) {
        let r = at.j as isize - (at.i as isize + 4);
        assert_eq!(t5.index(at), buckets.bucket(r) * 3 + at.head, "{at:?}");
        assert_eq!(relative.index(at), at.head * 5 + (r.clamp(-2, 2) + 2) as usize, "{at:?}");
    }
}

#[test]
fn alibi_takes_slopes_for_each_batch_entry() {
    let slopes = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let alibi = Alibi::new(slopes, &SHAPE, 4).unwrap();
    let at = |j| alibi.apply(0.0, Pair { batch: 1, head: 2, i: 1, j });
    assert_eq!([at(3), at(5), at(8)], [-12.0, 0.0, -18.0]);
    for wrong in [0, 2, 4, 7] {
        assert!(Alibi::new(vec![0.0; wrong], &SHAPE, 0).is_err(), "{wrong}");
    }
}

#[test]
fn alibi_takes_an_offset_for_each_batch_entry() {
    let (slopes, offsets) = (vec![0.5, 0.25, 2.0], [4, -3]);
    let both = Alibi::with_offsets(slopes.clone(), &SHAPE, &offsets).unwrap();
    for at in pairs(&SHAPE) {
        let alone = Alibi::new(slopes.clone(), &SHAPE, offsets[at.batch]).unwrap();
        assert_eq!(both.apply(1.5, at), alone.apply(1.5, at), "{at:?}");
        assert_eq!(both.apply_f64(1.5, at), alone.apply_f64(1.5, at), "{at:?}");
    }
    assert!(both.check(&AttnShape { batch: 3, ..SHAPE }).unwrap_err().to_string().contains("offsets"));
    let error = Alibi::with_offsets(slopes, &SHAPE, &[0; 3]).unwrap_err().to_string();
    assert!(error.contains("offsets: batch is 3") && error.contains("1 or 2"), "{error}");
}

#[test]
fn offsets_beyond_any_length_are_refused() {
    for offset in [isize::MIN, -(1 << 30), 1 << 30, isize::MAX] {
        let error = Alibi::new(vec![0.0; 3], &SHAPE, offset).unwrap_err().to_string();
        assert!(error.contains("offset") && error.contains("5 queries"), "{error}");
    }
    assert!(RelativeBias::new(&[0.0; 3], usize::MAX, &SHAPE, 0).is_err());
    assert!(RelativeBias::new(&[0.0; 8], 1, &SHAPE, 0).is_err());
}

#[test]
fn tiles_are_scores_one_by_one() {
    let shape = AttnShape { n_q: 70, n_kv: 90, ..AttnShape::square(2, 1, 1) };
    let bias: Vec<f32> = (0..2 * 70 * 90).map(|x| (x as f32 * 0.37).sin()).collect();
    let full = Bias::new(&bias, &[2, 70, 90], &shape).unwrap();
    let column = Bias::new(&bias[..70], &[70, 1], &shape).unwrap();
    let alibi = Alibi::new(Alibi::default_slopes(2), &shape, 20).unwrap();
    let mods: [&dyn ScoreMod; 5] =
        [&full, &column, &alibi, &Some(Then(SoftCap::new(2.0).unwrap(), full)), &Then(Unchanged, column)];
    for (m, score_mod) in mods.iter().enumerate() {
        for (rows, keys) in [(0..32, 0..64), (38..70, 3..90), (5..6, 7..8), (10..27, 80..90), (0..32, 9..10)]
        {
            let (head, stride) = (Head { batch: 0, head: 1 }, 32);
            let before: Vec<f32> =
                (0..(keys.len() - 1) * stride + rows.len()).map(|x| (x as f32 * 0.11).cos()).collect();
            let mut scores = before.clone();
            let tile =
                ScoreTile { head, rows: rows.clone(), keys: keys.clone(), scores: &mut scores, stride };
            score_mod.apply_tile(tile);
            for (at, (got, was)) in scores.iter().zip(before).enumerate() {
                let (j, i) = (keys.start + at / stride, rows.start + at % stride);
                let want = if i < rows.end { score_mod.apply(was, head.pair(i, j)) } else { was };
                assert!((got - want).abs() <= 1e-6, "mod {m}, row {i}, key {j}: {got} for {want}");
            }
        }
    }
}
