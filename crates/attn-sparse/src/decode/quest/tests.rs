//! The bounds, and the choice against brute force.

use super::*;
use attn_core::View;
use attn_core::mask::Head;
use attn_testkit::inputs::Problem;

const SHAPE: AttnShape =
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 67, n_kv: 67, head_dim: 12, head_dim_v: 5 };

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `U` in f64 over some keys of a head.
fn bound(q: &[f32], keys: &[f32], d: usize) -> f64 {
    let of =
        |c: usize| keys.chunks_exact(d).map(|k| f64::from(q[c]) * f64::from(k[c])).fold(f64::MIN, f64::max);
    (0..d).map(of).sum()
}

#[test]
fn a_page_bounds_every_score_in_it_and_one_key_reaches_it() {
    let problem = Problem::normal(SHAPE, 1);
    let (s, d) = (SHAPE, SHAPE.head_dim);
    for page_len in [1, 3, 8, 67, 100] {
        let quest = Quest { page_len, ..Quest::default() };
        let all = quest.page_bounds(&problem.qkv().unwrap()).unwrap();
        let n_pages = s.n_kv.div_ceil(page_len);
        assert_eq!(all.len(), s.rows() * n_pages);
        for (row, bounds) in all.chunks_exact(n_pages).enumerate() {
            let q = &problem.q[row * d..][..d];
            let head = row / s.n_q / s.group_size();
            let keys = &problem.k[head * s.n_kv * d..][..s.n_kv * d];
            for (page, bound) in keys.chunks(page_len * d).zip(bounds) {
                let largest = page.chunks_exact(d).map(|k| dot(q, k)).fold(f64::MIN, f64::max);
                assert!(f64::from(*bound) >= largest - 1e-5, "page of {page_len}: {bound} below {largest}");
                let is_sharp = (f64::from(*bound) - largest).abs() < 1e-5;
                assert!(page_len > 1 || is_sharp, "a page of one key is bounded by its score");
            }
        }
    }
}

/// The choice of a row in f64.
fn brute_force(quest: &Quest, problem: &Problem, row: usize) -> Vec<usize> {
    let (s, d) = (problem.shape, problem.shape.head_dim);
    let (head, i) = (row / s.n_q / s.group_size(), row % s.n_q);
    let seen = if quest.causal { (i + 1 + s.n_kv).saturating_sub(s.n_q).min(s.n_kv) } else { s.n_kv };
    let keys = &problem.k[head * s.n_kv * d..][..seen * d];
    let pages = keys.chunks(quest.page_len * d).enumerate();
    let mut pages: Vec<_> =
        pages.map(|(at, page)| (at, bound(&problem.q[row * d..][..d], page, d))).collect();
    if quest.keep_own
        && let Some(own) = pages.last_mut()
    {
        own.1 = f64::INFINITY;
    }
    pages.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    pages.truncate(quest.n_pages());
    let keys = |(page, _): (usize, f64)| page * quest.page_len..((page + 1) * quest.page_len).min(seen);
    let mut keys: Vec<usize> = pages.into_iter().flat_map(keys).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn the_choice_is_that_of_brute_force() {
    let shapes = [
        SHAPE,
        AttnShape { n_q: 3, n_kv: 150, ..SHAPE },
        AttnShape { n_q: 40, n_kv: 9, ..SHAPE },
        AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 1, n_q: 1, n_kv: 20_011, head_dim: 4, head_dim_v: 3 },
    ];
    for (seed, shape) in shapes.into_iter().enumerate() {
        let problem = Problem::normal(shape, seed as u64);
        for (page_len, token_budget) in [(1, 4), (4, 16), (5, 1), (16, 33), (200, 1)] {
            for (causal, keep_own) in [(false, false), (true, false), (true, true), (false, true)] {
                let quest = Quest { page_len, token_budget, keep_own, causal };
                let decision = quest.decide(&problem.qkv().unwrap()).unwrap();
                for row in 0..shape.rows() {
                    let head = row / shape.n_q;
                    let head = Head { batch: head / shape.n_heads_q, head: head % shape.n_heads_q };
                    let got = decision.selected(head, row % shape.n_q, shape.n_kv);
                    assert_eq!(got, brute_force(&quest, &problem, row), "{quest:?}, row {row} of {shape:?}");
                }
            }
        }
    }
}

#[test]
fn pages_of_no_keys_are_refused() {
    let x = [0f32; 8];
    let view = || View::contiguous("x", &x, [1, 1, 2, 4]).unwrap();
    let x = Qkv::new(view(), view(), view()).unwrap();
    let error = Quest { page_len: 0, ..Quest::default() }.decide(&x).unwrap_err().to_string();
    assert!(error.contains("page_len is 0"), "{error}");
}
