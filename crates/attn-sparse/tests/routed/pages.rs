//! Pages and tokens chosen by notes: against the definition in f64, given channels and axes, limits, promises.

use super::choices::{best, check, dot, keys_of, rows};
use super::golden::run;
use super::promises::{parse, tensors};
use attn_core::mask::Head;
use attn_core::registry::{NamedTensor, TensorData, find};
use attn_core::{AttnShape, Qkv};
use attn_sparse::{ArkVale, DoubleSparsity, InfLlmMemory, Loki, Pages, Routed, Volume};
use attn_testkit::inputs::Problem;
use std::sync::Arc;

type Rows = [Vec<f64>];

/// Pages that a query at `p` takes: all, or the first, the last and the best of the others.
fn taken(pages: &Pages, p: usize, score: impl Fn(usize) -> f64) -> Vec<usize> {
    let seen = p / pages.page_len + 1;
    if seen <= pages.n_pages {
        return (0..seen).collect();
    }
    let forced: Vec<usize> = (0..pages.first).chain(seen - pages.last..seen).collect();
    let scores: Vec<f64> =
        (0..seen).map(|page| if forced.contains(&page) { 0.0 } else { score(page) }).collect();
    best(&scores, pages.n_pages, &forced)
}

/// The largest score in a volume around some keys.
fn promise(volume: Volume, q: &[f64], keys: &Rows) -> f64 {
    match volume {
        Volume::Box => {
            (0..q.len()).map(|c| keys.iter().map(|key| q[c] * key[c]).fold(f64::NEG_INFINITY, f64::max)).sum()
        }
        Volume::Ball => {
            let mean: Vec<f64> = (0..q.len())
                .map(|c| keys.iter().map(|key| key[c]).sum::<f64>() / keys.len() as f64)
                .collect();
            let distance =
                |key: &Vec<f64>| key.iter().zip(&mean).map(|(x, m)| (x - m) * (x - m)).sum::<f64>().sqrt();
            let radius = keys.iter().map(distance).fold(0.0, f64::max);
            dot(q, &mean) + dot(q, q).sqrt() * radius
        }
    }
}

#[test]
fn arkvale_takes_the_pages_whose_volumes_promise_most() {
    for volume in [Volume::Box, Volume::Ball] {
        for (page_len, n_pages, first, last) in [(8, 4, 1, 2), (5, 3, 0, 1), (1, 6, 2, 1), (16, 3, 1, 1)] {
            let pages = Pages { page_len, n_pages, first, last };
            check(ArkVale { pages, volume }, |x, (batch, head), i, p| {
                let (q, k) = (rows(x.q(), batch, head), rows(x.k(), batch, x.shape().kv_head(head)));
                let score = |page: usize| promise(volume, &q[i], &k[page * page_len..(page + 1) * page_len]);
                keys_of(&taken(&pages, p, score), page_len, p)
            });
        }
    }
}

/// Every volume bounds every score in it, and a volume of one key is as large as its score.
#[test]
fn volumes_promise_no_less_than_any_key_holds() {
    use attn_sparse::PageScorer;
    let problem = Problem::normal(AttnShape::square(1, 60, 12), 2);
    for volume in [Volume::Box, Volume::Ball] {
        for page_len in [1, 4, 10] {
            let pages = Pages { page_len, n_pages: 3, first: 1, last: 1 };
            let scorer = ArkVale { pages, volume };
            let width = scorer.width(12).unwrap();
            let (mut note, mut question) = (vec![0.0f32; width], vec![0.0f32; width]);
            for (page, q) in problem.k.chunks_exact(page_len * 12).zip(problem.q.chunks_exact(12)) {
                scorer.note(&(), page, &mut note);
                scorer.ask(&(), q, &mut question);
                let product =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                let promised = product(&note, &question);
                let held = page.chunks_exact(12).map(|k| product(q, k)).fold(f64::NEG_INFINITY, f64::max);
                assert!(promised >= held - 1e-5, "{volume:?} of {page_len}: {promised} below {held}");
                assert!(page_len > 1 || (promised - held).abs() < 1e-5, "{volume:?} of one key");
            }
        }
    }
}

/// Channels of the largest mean magnitude over the first keys.
fn loudest(k: &Rows, calibration_len: usize, width: usize) -> Vec<usize> {
    let loudness = |c: usize| k[..calibration_len].iter().map(|key| key[c].abs()).sum::<f64>();
    best(&(0..k[0].len()).map(loudness).collect::<Vec<_>>(), width, &[])
}

#[test]
fn double_sparsity_takes_the_tokens_by_its_channels() {
    for (top_k, label_dim, calibration_len) in [(6, 3, 9), (1, 1, 30), (20, 2, 4)] {
        let router = DoubleSparsity { top_k, label_dim: Some(label_dim), calibration_len, channels: None };
        check(router, |x, (batch, head), i, p| {
            let (q, k) = (rows(x.q(), batch, head), rows(x.k(), batch, x.shape().kv_head(head)));
            if p < calibration_len.max(top_k) {
                return (0..=p).collect();
            }
            let channels = loudest(&k, calibration_len, label_dim);
            let score = |j: usize| channels.iter().map(|c| q[i][*c] * k[j][*c]).sum();
            taken(&Pages { page_len: 1, n_pages: top_k, first: 0, last: 0 }, p, score)
        });
    }
}

/// The keys that a query sees by the `top_k` largest of some scores.
fn check_tokens(x: &Qkv<'_>, got: &[Vec<usize>], top_k: usize, score: impl Fn(usize, usize, usize) -> f64) {
    let s = x.shape();
    for (row, got) in got.iter().enumerate() {
        let (head, i) = (row / s.n_q, row % s.n_q);
        let p = i + s.n_kv - s.n_q;
        let pages = Pages { page_len: 1, n_pages: top_k, first: 0, last: 0 };
        assert_eq!(*got, taken(&pages, p, |j| score(head, i, j)), "row {i} of head {head}");
    }
}

fn seen(attention: &Routed<impl attn_sparse::Router>, x: &Qkv<'_>) -> Vec<Vec<usize>> {
    let (s, decision) = (x.shape(), attention.decide(x).unwrap());
    let row = |row: usize| decision.selected(Head { batch: 0, head: row / s.n_q }, row % s.n_q, s.n_kv);
    (0..s.rows()).map(row).collect()
}

#[test]
fn given_channels_and_axes_are_used() {
    let s = AttnShape { n_heads_kv: 2, n_q: 30, ..AttnShape::square(4, 50, 8) };
    let problem = Problem::normal(s, 6);
    let x = problem.qkv().unwrap();
    let (q, k): (Vec<_>, Vec<_>) =
        ((0..4).map(|h| rows(x.q(), 0, h)).collect(), (0..2).map(|h| rows(x.k(), 0, h)).collect());
    let channels = [5, 0, 7, 2, 3, 1];
    let router = DoubleSparsity {
        channels: Some(Arc::from(channels)),
        label_dim: Some(3),
        top_k: 7,
        ..Default::default()
    };
    check_tokens(&x, &seen(&Routed::new(router), &x), 7, |head, i, j| {
        channels[head / 2 * 3..][..3].iter().map(|c| q[head][i][*c] * k[head / 2][j][*c]).sum()
    });
    let axes: Vec<f32> = (0..2 * 8 * 3).map(|at| (at as f32 * 1.3).cos()).collect();
    let router = Loki { axes: Some(axes.clone().into()), rank: Some(3), top_k: 5, ..Default::default() };
    let along = |row: &[f64], head: usize| -> Vec<f64> {
        (0..3).map(|r| (0..8).map(|c| row[c] * f64::from(axes[(head * 8 + c) * 3 + r])).sum()).collect()
    };
    check_tokens(&x, &seen(&Routed::new(router), &x), 5, |head, i, j| {
        dot(&along(&q[head][i], head / 2), &along(&k[head / 2][j], head / 2))
    });

    // As named tensors.
    let mut given = tensors(&problem);
    let data = TensorData::I32(channels.map(|c| c as i32).to_vec());
    given.0.insert("channels".into(), NamedTensor { shape: vec![2, 3], data });
    let with = run("double-sparsity", &parse("top_k=7"), &given);
    let without = run("double-sparsity", &parse("top_k=7 label_dim=3"), &tensors(&problem));
    assert_ne!(with.require("o").unwrap(), without.require("o").unwrap());
    given.0.remove("channels");
    given.0.insert("axes".into(), NamedTensor::f32("axes", &[2, 8, 3], axes).unwrap());
    let with = run("loki", &parse("top_k=5"), &given);
    let without = run("loki", &parse("top_k=5 rank=3"), &tensors(&problem));
    assert_ne!(with.require("o").unwrap(), without.require("o").unwrap());
}

/// Keys in a subspace of three dimensions: three axes tell the scores but for a constant, so the largest are found.
#[test]
fn principal_axes_find_the_subspace_of_the_keys() {
    let s = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 120, 10) };
    let mut problem = Problem::normal(s, 8);
    let directions = [[1.0, -0.5, 0.3], [0.2, 0.9, -1.1], [0.7, 0.1, 0.4]];
    for key in problem.k.chunks_exact_mut(10) {
        let (a, b, c) = (key[0], key[1], key[2]);
        for (at, x) in key.iter_mut().enumerate() {
            let [d, e, f] = directions.map(|row| (row[at % 3] as f32) * ((at * at) as f32 * 0.4).cos());
            *x = a * d + b * e + c * f;
        }
    }
    let x = problem.qkv().unwrap();
    let (q, k): (Vec<_>, Vec<_>) = ((0..2).map(|h| rows(x.q(), 0, h)).collect(), rows(x.k(), 0, 0));
    let router = Loki { rank: Some(3), top_k: 12, calibration_len: 12, axes: None };
    check_tokens(&x, &seen(&Routed::new(router), &x), 12, |head, i, j| dot(&q[head][i], &k[j]));
    // All axes: any keys.
    let problem = Problem::normal(s, 9);
    let x = problem.qkv().unwrap();
    let (q, k): (Vec<_>, Vec<_>) = ((0..2).map(|h| rows(x.q(), 0, h)).collect(), rows(x.k(), 0, 0));
    let router = Loki { rank: Some(10), top_k: 12, calibration_len: 12, axes: None };
    check_tokens(&x, &seen(&Routed::new(router), &x), 12, |head, i, j| dot(&q[head][i], &k[j]));
}

#[test]
fn infllm_takes_the_blocks_by_their_representatives() {
    for (block_len, n_representatives, n_blocks, init_blocks, local_blocks) in
        [(4, 2, 5, 1, 2), (7, 3, 4, 0, 2), (3, 1, 6, 2, 3), (2, 5, 4, 1, 2)]
    {
        let router = InfLlmMemory { block_len, n_representatives, n_blocks, init_blocks, local_blocks };
        let pages = Pages { page_len: block_len, n_pages: n_blocks, first: init_blocks, last: local_blocks };
        let scoring = (local_blocks - 1) * block_len;
        check(router, |x, (batch, head), i, p| {
            let s = x.shape();
            let k = rows(x.k(), batch, s.kv_head(head));
            let group = s.kv_head(head) * s.group_size()..(s.kv_head(head) + 1) * s.group_size();
            let all: Vec<_> = group.map(|h| rows(x.q(), batch, h)).collect();
            let summed = |row: usize| -> Vec<f64> {
                (0..s.head_dim).map(|c| all.iter().map(|q| q[row][c]).sum()).collect()
            };
            let query_at = |position: usize| (position + s.n_q).checked_sub(s.n_kv).map(summed);
            let represents = |m: usize| -> f64 {
                (m + 1..=m + scoring).filter_map(query_at).map(|q| dot(&q, &k[m])).sum()
            };
            let similarity = |block: usize| {
                let of_block: Vec<f64> =
                    (block * block_len..(block + 1) * block_len).map(represents).collect();
                let chosen = best(&of_block, n_representatives.min(block_len), &[]);
                chosen.iter().map(|at| dot(&summed(i), &k[block * block_len + at])).sum()
            };
            keys_of(&taken(&pages, p, similarity), block_len, p)
        });
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let entries = attn_sparse::registry();
    let build = |name: &str, options: &str| {
        find(&entries, name).unwrap().build(&parse(options)).map(drop).map_err(|e| e.to_string())
    };
    for (name, options, word) in [
        ("arkvale", "token_budget=64", "at least 4"),
        ("arkvale", "last_pages=0", "last pages"),
        ("arkvale", "volume=cone", "box or ball"),
        ("double-sparsity", "label_dim=0", "label_dim"),
        ("loki", "rank=0", "rank"),
        ("loki", "causal=false", "causal"),
        ("infllm", "local_blocks=1", "local_blocks"),
        ("infllm", "top_k=8", "at least 33"),
    ] {
        let message = build(name, options).unwrap_err();
        assert!(message.contains(word), "{name} {options}: {message}");
    }
    let problem = Problem::normal(AttnShape::square(1, 5, 4), 1);
    let x = problem.qkv().unwrap();
    let decide = |channels: Vec<usize>| {
        let channels = Some(Arc::from(channels));
        let router = DoubleSparsity { channels, label_dim: Some(2), ..Default::default() };
        Routed::new(router).decide(&x).map(drop).map_err(|e| e.to_string())
    };
    assert!(decide(vec![0, 4]).unwrap_err().contains("below 4"));
    assert!(decide(vec![0]).unwrap_err().contains("channels"));
    let router = Loki { axes: Some(Arc::from([0.5; 3])), ..Default::default() };
    assert!(Routed::new(router).decide(&x).unwrap_err().to_string().contains("axes"));
}
