//! Against the definition in f64: masks, score mods, sizes, dropout, norms.

use super::case::{Case, spec};
use attn_core::AttnShape;
use attn_core::dropout::Dropout;
use attn_core::mask::{And, Band, DenseMask, Documents, KeysBelow, Mask, Or, Pair, Predicate, SeeAll};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::score::{Alibi, Bias, RelativeBias, ScoreFnWithDerivative, SoftCap, Then, Unchanged};
use attn_flash::engine::Spec;

pub(crate) fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 1, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

#[test]
fn every_mask_at_every_tile_edge_equals_the_definition() {
    for (n_q, n_kv) in [(0, 3), (3, 0), (1, 1), (63, 65), (64, 64), (65, 257), (130, 129), (300, 40)] {
        let case = Case::new(shape(n_q, n_kv));
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        let check = |what: &str, mask: &dyn Mask| case.check(what, &spec(mask, &Unchanged));
        check("all", &SeeAll);
        check("causal", &causal);
        check("top-left", &Band { offset: 0, ..causal });
        check("window", &Band { left: Some(5), right: Some(3), ..causal });
        check("sinks", &And(causal, Or(KeysBelow(3), Band { left: Some(7), ..causal })));
        check("closure", &Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2));
        check("nobody", &Predicate(|_| false));
        let seen: Vec<bool> = (0..n_q * n_kv).map(|x| x % 3 == 0 && (x / n_kv) % 4 != 1).collect();
        check("dense", &DenseMask::new(&seen, &[n_q, n_kv], &case.shape).unwrap());
    }
}

#[test]
fn every_width_equals_the_definition() {
    for (head_dim, head_dim_v) in [(1, 1), (8, 3), (16, 16), (40, 72), (64, 64), (128, 128)] {
        let case = Case::new(AttnShape { head_dim, head_dim_v, ..shape(70, 90) });
        case.check("all", &spec(&SeeAll, &Unchanged));
        case.check("causal", &spec(&Band { offset: 20, left: None, right: Some(0) }, &Unchanged));
    }
}

#[test]
fn several_blocks_and_groups_equal_the_definition() {
    // Blocks have 256 rows.
    for (n_q, n_kv) in [(600, 530), (257, 1000), (700, 90)] {
        let shape =
            AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q, n_kv, head_dim: 8, head_dim_v: 8 };
        let case = Case::new(shape);
        case.check("all", &spec(&SeeAll, &Unchanged));
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        case.check("causal", &spec(&causal, &Unchanged));
        case.check("window", &spec(&Band { left: Some(100), ..causal }, &Unchanged));
        let ids = |n: usize| (0..n).map(|i| (i / 190) as i32).collect::<Vec<_>>();
        let documents = Documents::new(&ids(n_q), &ids(n_kv), &case.shape).unwrap();
        case.check("documents", &spec(&documents, &Unchanged));
    }
}

#[test]
fn score_mods_equal_the_definition() {
    let case = Case::new(shape(80, 150));
    let s = &case.shape;
    let causal = Band { offset: 70, left: None, right: Some(0) };
    let mut bias: Vec<f32> = (0..s.n_heads_q * s.n_q * s.n_kv).map(|x| (x as f32).sin()).collect();
    bias.iter_mut().step_by(11).for_each(|b| *b = f32::NEG_INFINITY);
    bias[5 * s.n_kv..6 * s.n_kv].fill(f32::NEG_INFINITY); // a row hidden by its bias alone
    let bias = Bias::new(&bias, &[s.n_heads_q, s.n_q, s.n_kv], s).unwrap();
    let cap = SoftCap::new(2.0).unwrap();
    case.check("softcap", &spec(&SeeAll, &cap));
    case.check("alibi", &spec(&causal, &Alibi::new(Alibi::default_slopes(2), s, 70).unwrap()));
    case.check_bias("bias", &spec(&causal, &bias), Some(&bias));
    case.check_bias("cap then bias", &spec(&SeeAll, &Then(cap, bias)), Some(&bias));
    let fades = ScoreFnWithDerivative(
        |score: f32, p: Pair| score * (1.0 + 0.1 * p.head as f32) + score * score * 0.05,
        |score: f32, p: Pair| 1.0 + 0.1 * p.head as f32 + score * 0.1,
    );
    case.check("closure", &spec(&causal, &fades));
}

#[test]
fn key_bias_and_sinks_have_gradients() {
    let case = Case::new(AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(100, 300) });
    let mut key_bias: Vec<f32> = (0..300).map(|j| (j as f32).cos()).collect();
    key_bias[7] = f32::NEG_INFINITY;
    let sinks = [0.5, -1.0, 2.0, f32::NEG_INFINITY];
    let causal = Band { offset: 200, left: Some(150), right: Some(0) };
    for mask in [&SeeAll as &dyn Mask, &causal] {
        let plain = spec(mask, &Unchanged);
        case.check("key bias", &Spec { key_bias: Some(&key_bias), ..plain });
        case.check("sinks", &Spec { sinks: Some(&sinks), ..plain });
        let cap = SoftCap::new(3.0).unwrap();
        case.check("both", &Spec { key_bias: Some(&key_bias), sinks: Some(&sinks), ..spec(mask, &cap) });
    }
}

#[test]
fn biases_large_and_small_have_gradients() {
    // 2 x 200 x 300 elements are summed one by one, tables and broadcasts in shares.
    let case = Case::new(AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(200, 300) });
    let s = &case.shape;
    let causal = Band { offset: 100, left: None, right: Some(0) };
    let numbers: Vec<f32> = (0..2 * 4 * 200 * 300).map(|x| (x as f32 * 0.7).sin()).collect();
    for axes in [&[2, 1, 200, 300][..], &[4, 200, 300], &[200, 1], &[300], &[4, 1, 1]] {
        let bias = Bias::new(&numbers[..axes.iter().product()], axes, s).unwrap();
        case.check_bias(&format!("bias {axes:?}"), &spec(&causal, &bias), Some(&bias));
    }
    let table = RelativeBias::new(&numbers[..4 * 21], 10, s, 100).unwrap();
    case.check_bias("table", &spec(&SeeAll, &Then(SoftCap::new(3.0).unwrap(), table)), Some(&table));
}

#[test]
fn dropout_and_norms_have_gradients() {
    let case = Case::new(AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(300, 270) });
    let causal = Band { offset: -30, left: None, right: Some(0) };
    let (gamma_q, gamma_k): (Vec<f32>, Vec<f32>) =
        (0..9).map(|c| ((c as f32).cos() + 1.5, (c as f32).sin() + 1.5)).unzip();
    let weighted = |kind| QkNorm { kind, gamma_q: Some(&gamma_q), gamma_k: Some(&gamma_k) };
    let numbers = gamma_q.repeat(4);
    let table = RelativeBias::new(&numbers[..4 * 7], 3, &case.shape, 0).unwrap();
    for dropout in [None, Some(Dropout::new(0.3, 5).unwrap())] {
        for norm in [
            None,
            Some(weighted(NormKind::Rms { eps: 1e-6 })),
            Some(QkNorm { kind: NormKind::L2 { eps: 1e-12 }, gamma_q: None, gamma_k: None }),
        ] {
            let what = format!("{norm:?} dropout {}", dropout.is_some());
            case.check(&what, &Spec { dropout, qk_norm: norm, ..spec(&causal, &Unchanged) });
            let capped = Then(SoftCap::new(2.0).unwrap(), table);
            case.check_bias(&what, &Spec { dropout, qk_norm: norm, ..spec(&SeeAll, &capped) }, Some(&table));
        }
    }
}
