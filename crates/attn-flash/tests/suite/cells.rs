//! Gradients of rows that are executed cell of keys by cell of keys, against the f64 definition.

use crate::apart::Lists;
use crate::backward::case::{Case, spec};
use attn_core::mask::Mask;
use attn_core::score::Unchanged;
use attn_core::{AttnShape, Qkv, View, ViewMut};
use attn_flash::TileSizes;
use attn_flash::engine::{ForwardResult, Grads, OutputGrad, Problem, Spec, attend_backward_any};
use half::bf16;

fn shape(group: usize, n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 2, n_heads_q: 2 * group, n_heads_kv: 2, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

fn by_blocks(shape: &AttnShape, block: usize) -> Option<TileSizes> {
    Some(TileSizes::auto(shape).rows_apart_by(block))
}

/// Blocks of cells of their own size, and of several; more rows than a piece, a panel and a batch have; whole blocks, and what
/// causality leaves of them.
#[test]
fn lists_of_blocks_have_the_gradients_of_the_definition() {
    for (group, n_q, n_kv, block) in [(1, 40, 300, 16), (3, 33, 150, 8), (2, 300, 310, 40), (1, 70, 500, 200)]
    {
        let case = Case::new(shape(group, n_q, n_kv));
        for (share, causal) in [(1, true), (group, false)] {
            let last = |i: usize| if causal { i + n_kv - n_q } else { n_kv };
            let lists = Lists::of_blocks(&case.shape, (block, 4), share, last);
            let plain = Spec { tiles: by_blocks(&case.shape, block), ..spec(&lists, &Unchanged) };
            case.check(&format!("blocks of {block}, lists for {share}"), &plain);
        }
    }
}

#[test]
fn key_biases_and_sinks_have_theirs() {
    let case = Case::new(shape(2, 50, 200));
    let lists = Lists::of_blocks(&case.shape, (16, 5), 2, |i| i + 150);
    let mut key_bias: Vec<f32> = (0..200).map(|j| (j as f32).cos()).collect();
    key_bias[8] = f32::NEG_INFINITY;
    let sinks = [0.5, -1.0, 2.0, f32::NEG_INFINITY];
    let plain = Spec { tiles: by_blocks(&case.shape, 16), ..spec(&lists, &Unchanged) };
    case.check("key bias", &Spec { key_bias: Some(&key_bias), ..plain });
    case.check("both", &Spec { key_bias: Some(&key_bias), sinks: Some(&sinks), ..plain });
}

/// Tokens so dense that cells pay.
#[test]
fn dense_lists_of_tokens_too() {
    let case = Case::new(AttnShape { head_dim: 32, head_dim_v: 16, ..shape(2, 90, 600) });
    let lists = Lists::new(&case.shape, 150, 1);
    case.check("tokens", &Spec { tiles: by_blocks(&case.shape, 1), ..spec(&lists, &Unchanged) });
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = Case::new(shape(3, 250, 400));
    let lists = Lists::of_blocks(&case.shape, (16, 6), 1, |i| i + 150);
    let key_bias: Vec<f32> = (0..400).map(|j| (j as f32).sin()).collect();
    let tiles = by_blocks(&case.shape, 16);
    let spec = Spec { tiles, key_bias: Some(&key_bias), ..spec(&lists, &Unchanged) };
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
    let shape = shape(2, 45, 160);
    let clean = Case::new(shape);
    let mut lists = Lists::of_blocks(&shape, (16, 4), 2, |i| i + 115);
    lists.keys.iter_mut().for_each(|keys| keys.retain(|j| *j != 17));
    // A row that lists nothing: its query and its gradient reach no key.
    let dead = (0..shape.n_q).find(|i| lists.keys[*i].is_empty()).unwrap();
    for poison in [f32::NAN, f32::INFINITY] {
        let mut case = Case::new(shape);
        for head in 0..4 {
            case.inputs.k[(head * 160 + 17) * 9 + 2] = poison;
            case.inputs.v[(head * 160 + 17) * 5 + 1] = poison;
        }
        for head in 0..2 {
            case.inputs.q[(head * 45 + dead) * 9 + 3] = poison;
            case.grad_out[(head * 45 + dead) * 5 + 3] = poison;
        }
        let spec = Spec { tiles: by_blocks(&shape, 16), ..spec(&lists, &Unchanged) };
        let got = case.backward(case.inputs.qkv().unwrap().into(), &spec, None);
        let want = clean.backward(clean.inputs.qkv().unwrap().into(), &spec, None);
        assert_eq!(got, want, "{poison}");
    }
}

/// bf16 inputs are read as what they are: gradients in f32 are those of the same numbers in f32.
#[test]
fn half_types_are_widened_exactly() {
    let case = Case::new(shape(2, 50, 150));
    let s = &case.shape;
    let lists = Lists::of_blocks(s, (16, 4), 2, |i| i + 100);
    let spec = Spec { tiles: by_blocks(s, 16), ..spec(&lists as &dyn Mask, &Unchanged) };
    let narrow = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let half = [&case.inputs.q, &case.inputs.k, &case.inputs.v, &case.grad_out].map(|x| narrow(x));
    let wide = half.each_ref().map(|x| widen(x));
    let qkv32 = Qkv::new(
        View::contiguous("q", &wide[0], s.q()).unwrap(),
        View::contiguous("k", &wide[1], s.k()).unwrap(),
        View::contiguous("v", &wide[2], s.v()).unwrap(),
    )
    .unwrap();
    let qkv16 = Qkv::new(
        View::contiguous("q", &half[0], s.q()).unwrap(),
        View::contiguous("k", &half[1], s.k()).unwrap(),
        View::contiguous("v", &half[2], s.v()).unwrap(),
    )
    .unwrap();
    let (out, lse) = case.forward(qkv32.into(), &spec);
    let run = |half_types: bool| {
        let mut grads = [s.q(), s.k(), s.v()].map(|axes| vec![f32::NAN; axes.iter().product()]);
        let [q, k, v] = &mut grads;
        let forward =
            ForwardResult { out: View::contiguous("out", &out, s.out()).unwrap().into(), lse: &lse };
        let (grad_out, x) = match half_types {
            false => (View::contiguous("grad_out", &wide[3], s.out()).unwrap().into(), qkv32),
            true => (View::contiguous("grad_out", &half[3], s.out()).unwrap().into(), qkv16),
        };
        let grad = OutputGrad { out: grad_out, lse: None };
        let to = Grads::new(
            ViewMut::contiguous("q", q, s.q()).unwrap().into(),
            ViewMut::contiguous("k", k, s.k()).unwrap().into(),
            ViewMut::contiguous("v", v, s.v()).unwrap().into(),
        );
        attend_backward_any(Problem::batch(x), forward, grad, to, &spec).unwrap();
        grads
    };
    assert_eq!(run(true), run(false));
}

/// Each sequence of a batch without padding has the gradients that it has alone.
#[test]
fn packed_sequences_are_their_own() {
    let lens = [(40, 90), (0, 20), (25, 30)];
    let shape = |n_q, n_kv| AttnShape { batch: 1, ..shape(2, n_q, n_kv) };
    let case = Case::new(shape(65, 140));
    // The keys that a row lists depend on its place in its sequence alone.
    let lists = Lists::of_blocks(&shape(40, 140), (16, 4), 4, |_| 20);
    let tiles = |s: &AttnShape| by_blocks(s, 16);
    let (cu_q, cu_kv) = ([0, 40, 40, 65], [0, 90, 110, 140]);
    let packed = Problem::packed(case.inputs.qkv().unwrap(), &cu_q, &cu_kv).unwrap();
    let all = case.backward(packed, &Spec { tiles: tiles(&case.shape), ..spec(&lists, &Unchanged) }, None);
    let (mut q_start, mut kv_start) = (0, 0);
    for (n_q, n_kv) in lens {
        let mut one = Case::new(shape(n_q, n_kv));
        let cut = |all: &[f32], heads: usize, n: usize, start: usize, len: usize| -> Vec<f32> {
            let width = all.len() / (heads * n).max(1);
            (0..heads).flat_map(|h| all[(h * n + start) * width..][..len * width].to_vec()).collect()
        };
        one.inputs.q = cut(&case.inputs.q, 4, 65, q_start, n_q);
        one.inputs.k = cut(&case.inputs.k, 2, 140, kv_start, n_kv);
        one.inputs.v = cut(&case.inputs.v, 2, 140, kv_start, n_kv);
        one.grad_out = cut(&case.grad_out, 4, 65, q_start, n_q);
        one.grad_lse = cut(&case.grad_lse, 4, 65, q_start, n_q);
        let spec = Spec { tiles: tiles(&one.shape), ..spec(&lists, &Unchanged) };
        let want = one.backward(one.inputs.qkv().unwrap().into(), &spec, None);
        assert_eq!(cut(&all.q, 4, 65, q_start, n_q), want.q);
        assert_eq!(cut(&all.k, 2, 140, kv_start, n_kv), want.k);
        assert_eq!(cut(&all.v, 2, 140, kv_start, n_kv), want.v);
        (q_start, kv_start) = (q_start + n_q, kv_start + n_kv);
    }
}
