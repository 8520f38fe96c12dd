use super::*;
use attn_core::exact::Exact;
use attn_core::mask::SeeAll;
use attn_core::registry::{NamedTensor, NamedTensors, TensorData, output_like};
use attn_testkit::compare::{Tol, assert_close};
use half::bf16;

/// Random numbers in [-1, 1), from a seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn shape(heads: [usize; 2], n: usize, widths: [usize; 2]) -> AttnShape {
    let [n_heads_q, n_heads_kv] = heads;
    let [head_dim, head_dim_v] = widths;
    AttnShape { batch: 2, n_heads_q, n_heads_kv, n_q: n, n_kv: n, head_dim, head_dim_v }
}

/// `q`, `k`, `v` of this shape; scores have a spread of about `spread`.
fn inputs(shape: &AttnShape, spread: f32, seed: u64) -> NamedTensors {
    let tensor = |name: &str, seed, axes: [usize; 4], scale: f32| {
        let data = noise(seed, axes.iter().product()).into_iter().map(|x| scale * x).collect();
        (name.to_string(), NamedTensor::f32(name, &axes, data).unwrap())
    };
    let q = tensor("q", seed, shape.q(), 1.7 * spread);
    NamedTensors([q, tensor("k", seed + 1, shape.k(), 1.7), tensor("v", seed + 2, shape.v(), 1.0)].into())
}

fn run(variant: &HTransformer, x: &NamedTensors) -> (Vec<f32>, Vec<f32>) {
    let x = x.qkv().unwrap();
    let (mut out, mut lse) = (output_like(&x), vec![f32::NAN; x.shape().rows()]);
    variant.forward_with_lse(x, out.as_out().unwrap(), &mut lse).unwrap();
    (floats(out), lse)
}

fn floats(tensor: NamedTensor) -> Vec<f32> {
    match tensor.data {
        TensorData::F32(data) => data,
        TensorData::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
        TensorData::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
        TensorData::I32(_) | TensorData::U8(_) => panic!("not floats"),
    }
}

fn f32s_mut<'a>(x: &'a mut NamedTensors, name: &str) -> &'a mut Vec<f32> {
    match &mut x.0.get_mut(name).unwrap().data {
        TensorData::F32(data) => data,
        _ => panic!("{name} is not f32"),
    }
}

/// Largest difference, as a share of the largest wanted value; NaN if anything is NaN.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-3, |max: f64, x| max.max(x.abs()));
    let differences = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs());
    differences.fold(0.0, |max: f64, x| if max.is_nan() || max >= x { max } else { x }) / largest
}

#[track_caller]
fn assert_near(what: &str, got: &(Vec<f32>, Vec<f32>), want: &Reference, bound: f64) {
    assert_close(&format!("{what}: out"), &got.0, &want.out, Tol::ScaledMax(bound));
    assert_close(&format!("{what}: lse"), &got.1, want.lse.as_ref().unwrap(), Tol::ScaledMax(bound));
}

fn dense(x: &NamedTensors, causal: bool) -> Reference {
    let band = Band { offset: 0, left: None, right: Some(0) };
    let mask = if causal { &band as &dyn Mask } else { &SeeAll };
    Exact { mask, ..Exact::default() }.all(&x.qkv().unwrap()).unwrap()
}

#[test]
fn equals_the_definition_for_any_length_and_block() {
    for (block, lengths) in [
        (2, vec![1, 2, 3, 5, 8, 31, 64]),
        (6, vec![1, 11, 12, 13, 47, 96]),
        (16, vec![15, 33, 100, 128, 255]),
        (64, vec![1, 63, 129, 257, 600, 1024]),
    ] {
        for n in lengths {
            for causal in [false, true] {
                let (heads, widths) = if n % 2 == 0 { ([2, 2], [16, 8]) } else { ([4, 2], [7, 20]) };
                let x = inputs(&shape(heads, n, widths), 1.0, n as u64);
                let variant = HTransformer::new(block).unwrap().with_causal(causal);
                let want = variant.definition(&x.qkv().unwrap()).unwrap();
                let what = format!("block {block}, n {n}, causal {causal}");
                assert_near(&what, &run(&variant, &x), &want, variant.profile().max_error);
            }
        }
    }
}

#[test]
fn scores_far_apart_stay_exact() {
    for causal in [false, true] {
        let x = inputs(&shape([1, 1], 500, [16, 16]), 300.0, 5);
        let variant = HTransformer::new(16).unwrap().with_causal(causal);
        let want = variant.definition(&x.qkv().unwrap()).unwrap();
        let got = run(&variant, &x);
        // Scores of a few thousand carry rounding errors of a few 1e-4.
        assert_near(&format!("causal {causal}"), &got, &want, 2e-3);
    }
}

#[test]
fn two_blocks_are_dense_attention() {
    for (block, n) in [(32, 64), (32, 63), (32, 17), (64, 128), (128, 200), (1 << 40, 77)] {
        for causal in [false, true] {
            let x = inputs(&shape([2, 1], n, [16, 16]), 1.0, 3);
            let variant = HTransformer::new(block).unwrap().with_causal(causal);
            assert_near(&format!("block {block}, n {n}"), &run(&variant, &x), &dense(&x, causal), 4e-6);
        }
    }
}

#[test]
fn rows_constant_in_the_coarsest_groups_give_dense_attention() {
    // 8 blocks: levels 0, 1, 2; the coarsest group has 4 tokens.
    let (block, n, group) = (8, 64, 4);
    for causal in [false, true] {
        let shape = shape([2, 2], n, [16, 16]);
        let mut x = inputs(&shape, 1.0, 9);
        for name in ["q", "k"] {
            for rows in f32s_mut(&mut x, name).chunks_exact_mut(group * shape.head_dim) {
                let (first, others) = rows.split_at_mut(shape.head_dim);
                others.chunks_exact_mut(first.len()).for_each(|row| row.copy_from_slice(first));
            }
        }
        let variant = HTransformer::new(block).unwrap().with_causal(causal);
        assert_near(&format!("causal {causal}"), &run(&variant, &x), &dense(&x, causal), 4e-6);
        let smaller = run(&HTransformer::new(2).unwrap().with_causal(causal), &x);
        assert!(error(&smaller.0, &dense(&x, causal).out) > 1e-3, "groups of 16 tokens are not constant");
    }
}

#[test]
fn half_types_are_near_the_definition_on_the_rounded_inputs() {
    for causal in [false, true] {
        let mut x = inputs(&shape([2, 1], 300, [16, 16]), 1.0, 11);
        for name in ["q", "k", "v"] {
            let data: Vec<bf16> = f32s_mut(&mut x, name).iter().map(|x| bf16::from_f32(*x)).collect();
            x.0.get_mut(name).unwrap().data = TensorData::Bf16(data);
        }
        let variant = HTransformer::new(16).unwrap().with_causal(causal);
        let want = variant.definition(&x.qkv().unwrap()).unwrap();
        let got = run(&variant, &x);
        let out = error(&got.0, &want.out);
        assert!(out <= 2.0 * DType::Bf16.roundoff(), "causal {causal}: out is off by {out:e}");
        assert!(error(&got.1, want.lse.as_ref().unwrap()) <= 4e-6, "causal {causal}: lse");
    }
}

#[test]
fn causal_rows_do_not_change_by_one_bit_when_later_inputs_do() {
    let shape = shape([2, 2], 203, [8, 8]);
    let x = inputs(&shape, 1.0, 21);
    let variant = HTransformer::new(8).unwrap().with_causal(true);
    let before = run(&variant, &x);
    for first_changed in [1, 7, 8, 16, 63, 100, 202] {
        for poison in [5.0, f32::NAN, f32::INFINITY] {
            let mut x = x.clone();
            for name in ["q", "k", "v"] {
                let rows = f32s_mut(&mut x, name).chunks_exact_mut(shape.head_dim).enumerate();
                let later = rows.filter(|(row, _)| row % shape.n_q >= first_changed);
                later.for_each(|(_, row)| row.fill(poison));
            }
            let after = run(&variant, &x);
            for row in (0..shape.rows()).filter(|row| row % shape.n_q < first_changed) {
                let place = row * shape.head_dim_v..(row + 1) * shape.head_dim_v;
                assert_eq!(
                    after.0[place.clone()],
                    before.0[place],
                    "row {row}, {poison} from {first_changed}"
                );
                assert_eq!(after.1[row], before.1[row], "lse {row}, {poison} from {first_changed}");
            }
        }
    }
}

#[test]
fn a_nan_key_reaches_every_row_that_counts_it() {
    for causal in [false, true] {
        for at in [0, 40, 99] {
            let shape = shape([1, 1], 100, [4, 4]);
            let mut x = inputs(&shape, 1.0, 2);
            f32s_mut(&mut x, "k")[at * 4] = f32::NAN;
            let (out, lse) = run(&HTransformer::new(4).unwrap().with_causal(causal), &x);
            for i in 0..100 {
                let sees = !causal || at <= i;
                assert_eq!(out[i * 4].is_nan(), sees, "causal {causal}: key {at}, row {i}");
                assert_eq!(lse[i].is_nan(), sees, "causal {causal}: key {at}, lse {i}");
            }
        }
    }
}

#[test]
fn outputs_are_means_of_values() {
    let shape = shape([2, 2], 333, [8, 8]);
    for causal in [false, true] {
        let mut x = inputs(&shape, 4.0, 31);
        f32s_mut(&mut x, "v").chunks_exact_mut(8).for_each(|row| row[0] = 2.5);
        let (out, _) = run(&HTransformer::new(8).unwrap().with_causal(causal), &x);
        assert!(out.chunks_exact(8).all(|row| (row[0] - 2.5).abs() < 1e-5), "weights sum to 1");
        assert!(out.chunks_exact(8).flatten().all(|x| x.abs() <= 2.5 + 1e-5), "inside the values' range");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = inputs(&shape([2, 1], 1500, [16, 16]), 1.0, 41);
    let variant = HTransformer::new(16).unwrap();
    let on = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&variant, &x))
    };
    let one = on(1);
    assert!(on(2) == one && on(5) == one);
}

#[test]
fn larger_blocks_are_nearer_to_dense_attention() {
    let x = inputs(&shape([2, 2], 512, [16, 16]), 0.5, 51);
    let want = dense(&x, false).out;
    let errors = [4, 16, 64, 256].map(|b| error(&run(&HTransformer::new(b).unwrap(), &x).0, &want));
    assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    assert!(errors[3] < 4e-6, "{errors:?}");
}

#[test]
fn what_cannot_be_computed_is_refused() {
    for block in [0, 1, 7] {
        let error = HTransformer::new(block).unwrap_err().to_string();
        assert!(error.contains("block_size") && error.contains("even"), "{error}");
    }
    assert!(HTransformer::default().with_softmax_scale(f32::NAN).is_err());

    let mut x = inputs(&shape([1, 1], 6, [4, 4]), 1.0, 1);
    x.0.insert("q".into(), NamedTensor::f32("q", &[2, 1, 5, 4], vec![1.0; 40]).unwrap());
    let x = x.qkv().unwrap();
    let mut out = output_like(&x);
    let error = HTransformer::default().forward(x, out.as_out().unwrap()).unwrap_err().to_string();
    assert!(error.contains("n_kv is 6") && error.contains("5 (n_q)"), "{error}");
    assert!(floats(out).iter().all(|x| x.is_nan()), "nothing is written on error");
    assert!(HTransformer::default().definition(&x).is_err());
}

#[test]
fn no_rows_are_fine() {
    let x = inputs(&shape([2, 1], 0, [4, 4]), 1.0, 1);
    let (out, lse) = run(&HTransformer::default(), &x);
    assert!(out.is_empty() && lse.is_empty());
}

#[test]
fn cost_grows_linearly_and_counts_the_levels() {
    let variant = HTransformer::new(64).unwrap();
    let cost = |n| variant.cost(&AttnShape::square(1, n, 64), DType::F32);
    let (short, long) = (cost(1 << 14), cost(1 << 16));
    let ratio = long.flops as f64 / short.flops as f64;
    assert!((3.9..4.1).contains(&ratio), "{ratio}");
    // 3 blocks of 64 on level 0, 1.5 on each of the others, whose nodes together are as many as the tokens.
    let pairs = long.flops as f64 / f64::from(1 << 16) / (4.0 * 64.0);
    assert!((pairs / (4.5 * 64.0) - 1.0).abs() < 0.01, "{pairs} pairs a token");
}
