//! Decoding from caches of every storage type, contiguous and paged, against the f64 oracle on what the cache holds.

use attn_core::mask::{Band, DenseMask, Mask, Pair, Predicate};
use attn_core::score::{ScoreFn, ScoreMod, Unchanged};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, Element, View, ViewMut};
use attn_flash::engine::{KvView, Problem, Spec, attend_any};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;
use half::{bf16, f16};

const TOL: Tol = Tol::AllClose { atol: 3e-6, rtol: 3e-6 };

/// A tensor as a cache stores it, and what that means in f32.
enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Int8 { data: Vec<i8>, scales: Vec<f32>, block: usize },
}

impl Stored {
    const KINDS: usize = 5;

    fn new(kind: usize, numbers: &[f32], [_, _, n, width]: [usize; 4]) -> Self {
        let int8 = |block: usize| {
            let mut data = vec![0; numbers.len()];
            let mut scales = Vec::new();
            for (head, from) in numbers.chunks_exact((n * width).max(1)).enumerate() {
                for (b, block_of) in from.chunks(block * width).enumerate() {
                    let scale = block_of.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
                    scales.push(scale);
                    let at = head * n * width + b * block * width;
                    for (to, x) in data[at..].iter_mut().zip(block_of) {
                        *to = (x / scale).round() as i8;
                    }
                }
            }
            Self::Int8 { data, scales, block }
        };
        match kind {
            0 => Self::F32(numbers.to_vec()),
            1 => Self::Bf16(numbers.iter().map(|x| bf16::store(*x)).collect()),
            2 => Self::F16(numbers.iter().map(|x| f16::store(*x)).collect()),
            3 => int8(1),
            _ => int8(16),
        }
    }

    fn view(&self, shape: [usize; 4]) -> KvView<'_> {
        fn view<E: Copy>(data: &[E], shape: [usize; 4]) -> View<'_, E> {
            View::contiguous("cache", data, shape).unwrap()
        }
        match self {
            Self::F32(data) => view(data, shape).into(),
            Self::Bf16(data) => view(data, shape).into(),
            Self::F16(data) => view(data, shape).into(),
            Self::Int8 { data, scales, block } => {
                let [b, h, n, _] = shape;
                let scales = view(scales, [b, h, n.div_ceil(*block), 1]);
                KvView::Int8 { data: view(data, shape), scales, block: *block }
            }
        }
    }

    fn meant(&self, [_, _, n, width]: [usize; 4]) -> Vec<f32> {
        match self {
            Self::F32(data) => data.clone(),
            Self::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Self::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Self::Int8 { data, scales, block } => {
                let blocks = n.div_ceil(*block);
                let scale = |at: usize| scales[at / (n * width) * blocks + at / width % n / block];
                data.iter().enumerate().map(|(at, x)| f32::from(*x) * scale(at)).collect()
            }
        }
    }
}

fn run(problem: Problem<'_>, spec: &Spec<'_, dyn Mask + '_, dyn ScoreMod + '_>) -> (Vec<f32>, Vec<f32>) {
    let shape = problem.shape();
    let (mut out, mut lse) = (vec![f32::NAN; shape.out().iter().product()], vec![f32::NAN; shape.rows()]);
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    attend_any(problem, view.into(), Some(&mut lse), spec).unwrap();
    (out, lse)
}

fn check(what: &str, shape: AttnShape, mask: &dyn Mask, score_mod: &dyn ScoreMod, sinks: Option<&[f32]>) {
    let data = inputs::Problem::normal(shape, 17);
    let q = View::contiguous("q", &data.q, shape.q()).unwrap();
    for kind in 0..Stored::KINDS {
        let (k, v) = (Stored::new(kind, &data.k, shape.k()), Stored::new(kind, &data.v, shape.v()));
        let (k_meant, v_meant) = (k.meant(shape.k()), v.meant(shape.v()));
        let meant = attn_core::Qkv::new(
            q,
            View::contiguous("k", &k_meant, shape.k()).unwrap(),
            View::contiguous("v", &v_meant, shape.v()).unwrap(),
        );
        let sinks_f64: Option<Vec<f64>> = sinks.map(|s| s.iter().map(|x| f64::from(*x)).collect());
        let exact = attn_core::exact::Exact {
            softmax_scale: Some(0.25),
            mask,
            score_mod,
            sinks: sinks_f64.as_deref(),
            ..Default::default()
        };
        let want = exact.all(&meant.unwrap()).unwrap();
        for isa in Isa::available() {
            let problem = Problem::cached(q, k.view(shape.k()), v.view(shape.v()), None).unwrap();
            let spec = Spec { sinks, ..Spec::new(0.25, mask, score_mod) };
            let (out, lse) = with_isa(isa, || run(problem, &spec)).unwrap();
            let what = format!("{what}, {shape:?}, storage {kind}, {isa}");
            assert_close(&what, &out, &want.out, TOL);
            assert_close(&what, &lse, want.lse.as_ref().unwrap(), TOL);
        }
    }
}

fn shape(group: usize, n_q: usize, n_kv: usize, head_dim: usize) -> AttnShape {
    AttnShape { batch: 2, n_heads_q: 2 * group, n_heads_kv: 2, n_q, n_kv, head_dim, head_dim_v: head_dim + 1 }
}

#[test]
fn every_storage_type_and_few_queries_equal_the_oracle() {
    for (group, n_q) in [(1, 1), (2, 1), (3, 1), (4, 1), (9, 1), (1, 2), (2, 2), (1, 3)] {
        check("all keys", shape(group, n_q, 150, 40), &attn_core::mask::SeeAll, &Unchanged, None);
    }
    for head_dim in [1, 3, 16, 63, 64, 65, 128, 200] {
        check("widths", shape(2, 1, 70, head_dim), &attn_core::mask::SeeAll, &Unchanged, None);
    }
    for n_kv in [0, 1, 2, 63, 64, 65, 5000] {
        check("lengths", shape(1, 1, n_kv, 8), &attn_core::mask::SeeAll, &Unchanged, Some(&[0.5, -1.0]));
    }
}

#[test]
fn masks_and_score_mods_reach_few_queries() {
    let shape = shape(2, 2, 300, 24);
    let window = Band { offset: 298, left: Some(100), right: Some(0) };
    check("window", shape, &window, &Unchanged, Some(&[0.0, 1.0, 2.0, -3.0]));
    check("nobody", shape, &Predicate(|_: Pair| false), &Unchanged, None);
    let fade = ScoreFn(|s: f32, p: Pair| s - 0.01 * p.j as f32 * (p.head + 1) as f32);
    check("score", shape, &window, &fade, None);
    let seen: Vec<bool> = (0..2 * 300).map(|x| x * 7 % 5 < 2).collect();
    check("dense", shape, &DenseMask::new(&seen, &[2, 300], &shape).unwrap(), &fade, None);
}

#[test]
fn what_a_query_does_not_see_never_reaches_it() {
    let shape = shape(2, 1, 200, 16);
    let mut data = inputs::Problem::normal(shape, 3);
    for j in (1..200).step_by(3) {
        data.k_row(0, 0, j).fill(f32::NAN);
        data.v_row(0, 0, j).fill(f32::INFINITY);
    }
    // Head 1 sees key 4, which is not finite.
    let mask = Predicate(|p: Pair| p.j % 3 != 1 || (p.head == 1 && p.j == 4));
    let clean = inputs::Problem::normal(shape, 3);
    let spec: Spec<'_, dyn Mask, dyn ScoreMod> = Spec::new(0.25, &mask, &Unchanged);
    let (got, want) = (run(data.qkv().unwrap().into(), &spec), run(clean.qkv().unwrap().into(), &spec));
    let d = shape.head_dim_v;
    assert_eq!(got.0[..d], want.0[..d], "head 0 sees finite keys only");
    assert!(got.0[d..2 * d].iter().all(|x| x.is_nan()), "head 1 sees a key that is NaN");
    assert_eq!(got.0[2 * d..], want.0[2 * d..], "other key/value heads");
}
