//! Rows that are attended one by one, forward and backward, against the f64 definition.

use crate::backward::case::{Case, SCALE, spec};
use attn_core::dropout::Dropout;
use attn_core::mask::{Band, Cover, Head, Mask, Pair, Predicate};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::score::{Bias, SoftCap, Then, Unchanged};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, Qkv, View, ViewMut};
use attn_flash::TileSizes;
use attn_flash::engine::{Problem, Spec, attend_any};
use half::bf16;
use std::ops::Range;

/// Ascending keys of each row, the same for `group` consecutive heads.
pub(crate) struct Lists {
    pub(crate) keys: Vec<Vec<usize>>,
    n_q: usize,
    group: usize,
    /// Whether it says that rows see their spans; an engine that is not told asks for covers.
    tells: bool,
}

impl Lists {
    /// About `per_row` keys a row, some rows without any, some with neighbours.
    pub(crate) fn new(shape: &AttnShape, per_row: usize, group: usize) -> Self {
        let lists = shape.n_heads_q / group;
        let mut x = 7u64;
        let mut random = move |below: usize| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) as usize % below.max(1)
        };
        let keys = (0..lists * shape.n_q).map(|row| {
            let n = if row % 7 == 3 { 0 } else { 1 + random(2 * per_row) };
            let mut keys: Vec<usize> = (0..n).map(|_| random(shape.n_kv)).collect();
            if row % 5 == 0 {
                keys.extend(shape.n_kv / 3..shape.n_kv / 2);
            }
            keys.sort_unstable();
            keys.dedup();
            if shape.n_kv == 0 { Vec::new() } else { keys }
        });
        Self { keys: keys.collect(), n_q: shape.n_q, group, tells: true }
    }

    /// Up to `per_row` blocks of keys a row, as far as they lie at `last(i)` or before; some rows without any.
    pub(crate) fn of_blocks(
        shape: &AttnShape,
        (block, per_row): (usize, usize),
        group: usize,
        last: impl Fn(usize) -> usize,
    ) -> Self {
        let n_blocks = shape.n_kv.div_ceil(block);
        let blocks = Self::new(&AttnShape { n_kv: n_blocks, ..*shape }, per_row, group);
        let keys = |(row, blocks): (usize, &Vec<usize>)| -> Vec<usize> {
            let end = shape.n_kv.min(last(row % shape.n_q) + 1);
            blocks.iter().flat_map(|b| b * block..((b + 1) * block).min(end)).collect()
        };
        Self { keys: blocks.keys.iter().enumerate().map(keys).collect(), ..blocks }
    }

    fn row(&self, head: usize, i: usize) -> &[usize] {
        &self.keys[head / self.group * self.n_q + i]
    }
}

impl Mask for Lists {
    fn sees(&self, p: Pair) -> bool {
        self.row(p.head, p.i).binary_search(&p.j).is_ok()
    }

    fn spans(&self, head: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
        let mut keys: Vec<usize> = rows.flat_map(|i| self.row(head.head, i).iter().copied()).collect();
        keys.sort_unstable();
        keys.dedup();
        let mut spans: Vec<Range<usize>> = Vec::new();
        for j in keys {
            match spans.last_mut() {
                Some(last) if last.end == j => last.end += 1,
                _ => spans.push(j..j + 1),
            }
        }
        spans
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let pairs = rows.clone().flat_map(|i| keys.clone().map(move |j| head.pair(i, j)));
        match pairs.filter(|pair| self.sees(*pair)).count() {
            0 => Cover::Empty,
            n if n == rows.len() * keys.len() => Cover::Full,
            _ => Cover::Partial,
        }
    }

    fn sees_spans(&self, _: Head, rows: Range<usize>) -> bool {
        self.tells && rows.len() == 1
    }

    fn is_shared_by(&self, _: usize, heads: Range<usize>) -> bool {
        heads.is_empty() || heads.start / self.group == (heads.end - 1) / self.group
    }
}

fn apart(shape: &AttnShape) -> Option<TileSizes> {
    Some(TileSizes::auto(shape).rows_apart())
}

fn shape(group: usize, n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 2, n_heads_q: 2 * group, n_heads_kv: 2, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

#[test]
fn lists_of_tokens_have_the_gradients_of_the_definition() {
    for (group, n_q, n_kv) in [(1, 40, 300), (3, 33, 150), (6, 20, 90), (2, 0, 3), (2, 3, 0), (1, 1, 1)] {
        let case = Case::new(shape(group, n_q, n_kv));
        for share in [1, group] {
            let mut lists = Lists::new(&case.shape, 20, share);
            for tells in [true, false] {
                lists.tells = tells;
                let spec = Spec { tiles: apart(&case.shape), ..spec(&lists, &Unchanged) };
                case.check(&format!("group {group}, lists for {share}, tells {tells}"), &spec);
            }
        }
    }
}

#[test]
fn widths_of_whole_vectors_and_long_lists_too() {
    for (head_dim, head_dim_v) in [(64, 64), (128, 72), (16, 130), (1, 1)] {
        let case = Case::new(AttnShape { head_dim, head_dim_v, ..shape(2, 12, 700) });
        let lists = Lists::new(&case.shape, 150, 1);
        // The scale that heads of this width have: rounding of larger scores is not what is tested.
        let scale = 1.0 / (head_dim as f32).sqrt();
        let apart = |mask| Spec { softmax_scale: scale, tiles: apart(&case.shape), ..spec(mask, &Unchanged) };
        case.check("lists", &apart(&lists));
        // Spans that are no lists: whole ranges with hidden pairs in them.
        let some = Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2);
        case.check("closure", &apart(&some));
        let window = Band { offset: 300, left: Some(200), right: Some(3) };
        case.check("window", &apart(&window));
    }
}

#[test]
fn everything_else_of_a_spec_holds_for_rows_apart() {
    let case = Case::new(shape(2, 30, 200));
    let s = &case.shape;
    let lists = Lists::new(s, 25, 2);
    let mut numbers: Vec<f32> = (0..s.n_heads_q * s.n_q * s.n_kv).map(|x| (x as f32).sin()).collect();
    numbers.iter_mut().step_by(11).for_each(|b| *b = f32::NEG_INFINITY);
    let bias = Bias::new(&numbers, &[s.n_heads_q, s.n_q, s.n_kv], s).unwrap();
    let capped = Then(SoftCap::new(2.0).unwrap(), bias);
    let mut key_bias: Vec<f32> = (0..s.n_kv).map(|j| (j as f32).cos()).collect();
    key_bias[8] = f32::NEG_INFINITY;
    let sinks = [0.5, -1.0, 2.0, f32::NEG_INFINITY];
    let plain = Spec { tiles: apart(s), ..spec(&lists, &Unchanged) };
    case.check("key bias", &Spec { key_bias: Some(&key_bias), ..plain });
    case.check("sinks", &Spec { sinks: Some(&sinks), ..plain });
    let changed = Spec { tiles: apart(s), ..spec(&lists, &capped) };
    case.check_bias("cap then bias", &changed, Some(&bias));
    case.check_bias("all", &Spec { key_bias: Some(&key_bias), sinks: Some(&sinks), ..changed }, Some(&bias));
    // These run side by side within a row's heads.
    case.check("dropout", &Spec { dropout: Some(Dropout::new(0.3, 5).unwrap()), ..plain });
    let norm = QkNorm { kind: NormKind::Rms { eps: 1e-6 }, gamma_q: None, gamma_k: None };
    case.check("norm", &Spec { qk_norm: Some(norm), ..plain });
}

#[test]
fn a_few_rows_with_long_lists_are_split_along_the_keys() {
    for group in [1, 3, 6] {
        let shape = AttnShape { batch: 1, n_heads_q: group, n_heads_kv: 1, ..shape(1, 2, 9000) };
        let case = Case::new(shape);
        let lists = Lists::new(&shape, 2500, group);
        case.check("split", &Spec { tiles: apart(&shape), ..spec(&lists, &Unchanged) });
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit_of_rows_apart() {
    let case = Case::new(shape(3, 90, 400));
    let lists = Lists::new(&case.shape, 30, 1);
    let key_bias: Vec<f32> = (0..400).map(|j| (j as f32).sin()).collect();
    let spec = Spec { tiles: apart(&case.shape), key_bias: Some(&key_bias), ..spec(&lists, &Unchanged) };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.backward(case.inputs.qkv().unwrap().into(), &spec, None))
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

#[test]
fn what_a_row_does_not_list_never_reaches_it() {
    let shape = shape(2, 20, 60);
    let clean = Case::new(shape);
    let lists = Lists::new(&shape, 8, 2);
    // A key that nobody lists, and one that some do.
    let cut = Predicate(|p: Pair| p.j != 17 && lists.sees(p));
    let mut lists_without = Lists::new(&shape, 8, 2);
    lists_without.keys.iter_mut().for_each(|keys| keys.retain(|j| *j != 17));
    for poison in [f32::NAN, f32::INFINITY] {
        let mut case = Case::new(shape);
        for head in 0..4 {
            case.inputs.k[(head * 60 + 17) * 9 + 2] = poison;
            case.inputs.v[(head * 60 + 17) * 5 + 1] = poison;
        }
        for mask in [&cut as &dyn Mask, &lists_without] {
            let spec = Spec { tiles: apart(&shape), ..spec(mask, &Unchanged) };
            let got = case.backward(case.inputs.qkv().unwrap().into(), &spec, None);
            let want = clean.backward(clean.inputs.qkv().unwrap().into(), &spec, None);
            assert_eq!(got, want, "{poison}");
        }
    }
}

#[test]
fn half_types_round_once() {
    let wide = Case::new(shape(2, 25, 150));
    let s = &wide.shape;
    let lists = Lists::new(s, 20, 2);
    let narrow = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (q, k, v) = (narrow(&wide.inputs.q), narrow(&wide.inputs.k), narrow(&wide.inputs.v));
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (q32, k32, v32) = (widen(&q), widen(&k), widen(&v));
    for isa in Isa::available() {
        let spec = Spec { tiles: apart(s), ..spec(&lists, &Unchanged) };
        let mut out = vec![bf16::NAN; s.out().iter().product()];
        let mut lse = vec![f32::NAN; s.rows()];
        let view =
            |name, data| View::contiguous(name, data, if name == "q" { s.q() } else { s.k() }).unwrap();
        let v_view = View::contiguous("v", &v, s.v()).unwrap();
        let x = Qkv::new(view("q", &q), view("k", &k), v_view).unwrap();
        let mut wide_out = vec![f32::NAN; out.len()];
        with_isa(isa, || {
            let to = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
            attend_any(Problem::batch(x), to.into(), Some(&mut lse), &spec).unwrap();
            let view = |name, data, shape| View::contiguous(name, data, shape).unwrap();
            let x = Qkv::new(view("q", &q32, s.q()), view("k", &k32, s.k()), view("v", &v32, s.v())).unwrap();
            let to = ViewMut::contiguous("out", &mut wide_out, s.out()).unwrap();
            attend_any(Problem::batch(x), to.into(), None, &spec).unwrap();
        })
        .unwrap();
        let close = |(got, want): (&bf16, &f32)| (got.to_f32() - want).abs() <= want.abs() / 200.0 + 1e-6;
        assert!(out.iter().zip(&wide_out).all(close), "{isa}, scale {SCALE}");
        assert!(lse.iter().all(|lse| !lse.is_nan()));
    }
}
