//! What the variants promise, and what they must equal.

use crate::{entry, set};
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::registry::Options;
use attn_core::{AttnShape, View, ViewMut};
use attn_sparse::{Hashing, Reformer, Routing};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::inputs::Problem;

#[test]
fn small_groups_keep_their_promises() {
    let reformer: &[&[&str]] = &[
        &["bucket_size=8", "n_hashes=3"],
        &["bucket_size=5", "n_hashes=2", "n_buckets=4x2x2", "causal=true"],
        &["bucket_size=16", "n_hashes=1", "attend_across_buckets=false", "n_buckets=4"],
        &["bucket_size=7", "n_hashes=3", "allow_duplicate_attention=false"],
        &["bucket_size=40", "n_hashes=3", "allow_duplicate_attention=false", "shared_qk=true"],
        &["bucket_size=12", "n_hashes=2", "shared_qk=true", "causal=true"],
        &[
            "bucket_size=9",
            "n_hashes=3",
            "n_buckets=6",
            "allow_duplicate_attention=false",
            "attend_across_buckets=false",
            "shared_qk=true",
        ],
    ];
    let routing: &[&[&str]] = &[
        &["num_clusters=3", "window=16"],
        &["num_clusters=40", "window=5", "causal=true"],
        &["num_clusters=1"],
        &["num_clusters=5", "window=30", "shared_qk=true", "causal=true", "mean_eps=1e-5"],
    ];
    let sinkhorn: &[&[&str]] = &[
        &["bucket_size=8"],
        &["bucket_size=7", "causal=true", "n_top=2"],
        &["bucket_size=16", "kind=sortcut", "n_top=3"],
    ];
    for (name, configs) in [("reformer-lsh", reformer), ("routing", routing), ("sinkhorn", sinkhorn)] {
        let configs: Vec<Options> = configs.iter().map(|pairs| set(pairs)).collect();
        conformance::check_with(&entry(name), &configs);
    }
}

/// Output of an entry on a problem.
fn run(name: &str, options: &Options, problem: &Problem) -> Vec<f32> {
    let attention = entry(name).build(options).unwrap();
    let mut out = vec![f32::NAN; problem.shape.out().iter().product()];
    let view = ViewMut::contiguous("out", &mut out, problem.shape.out()).unwrap();
    attention.forward(problem.qkv().unwrap(), view.into()).unwrap();
    out
}

fn dense(problem: &Problem, causal: bool) -> Vec<f64> {
    let band = Band::causal(&problem.shape, Align::BottomRight);
    let mask: &dyn Mask = if causal { &band } else { &SeeAll };
    Exact { mask, ..Exact::default() }.all(&problem.qkv().unwrap()).unwrap().out
}

#[test]
fn one_group_of_everything_is_dense_attention() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 7, ..AttnShape::square(2, 90, 8) };
    let problem = Problem::normal(shape, 3);
    let tol = Tol::ScaledMax(4e-6);
    for causal in [false, true] {
        let options = |pairs: &[&str]| set(pairs).with("causal", causal);
        let want = dense(&problem, causal);
        for rounds in ["n_hashes=1", "n_hashes=3"] {
            let got = run("reformer-lsh", &options(&["bucket_size=90", rounds]), &problem);
            assert_close(rounds, &got, &want, tol);
            // Two chunks see each other; met in every round, each pair counts once.
            let halves = ["bucket_size=45", rounds, "allow_duplicate_attention=false"];
            assert_close(rounds, &run("reformer-lsh", &options(&halves), &problem), &want, tol);
        }
        for clusters in ["num_clusters=1", "num_clusters=4"] {
            let got = run("routing", &options(&[clusters, "window=1000"]), &problem);
            assert_close(clusters, &got, &want, tol);
        }
    }
    let cross = Problem::normal(AttnShape { n_q: 20, ..shape }, 4);
    for causal in [false, true] {
        let options = set(&["num_clusters=2", "window=90"]).with("causal", causal);
        assert_close("cross lengths", &run("routing", &options, &cross), &dense(&cross, causal), tol);
    }
}

#[test]
fn later_values_never_reach_earlier_rows_under_the_mask() {
    // Values take no part in sorting.
    let shape = AttnShape::square(2, 130, 8);
    let problem = Problem::normal(shape, 5);
    let mut changed = problem.clone();
    let t = 61;
    changed.v.chunks_exact_mut(130 * 8).for_each(|head| head[t * 8..].iter_mut().for_each(|x| *x += 100.0));
    for (name, pairs) in [
        ("reformer-lsh", &["bucket_size=8", "shared_qk=true"][..]),
        ("reformer-lsh", &["bucket_size=8"]),
        ("routing", &["num_clusters=6", "window=40"]),
    ] {
        let options = set(pairs).with("causal", true);
        let (before, after) = (run(name, &options, &problem), run(name, &options, &changed));
        for (row, (a, b)) in before.chunks(8).zip(after.chunks(8)).enumerate() {
            assert!(row % 130 >= t || a == b, "{name}: row {row}");
        }
        let open = set(pairs);
        let (before, after) = (run(name, &open, &problem), run(name, &open, &changed));
        let reached =
            before.chunks(8).zip(after.chunks(8)).enumerate().any(|(row, (a, b))| row % 130 < t && a != b);
        assert!(reached, "{name}: without the mask, later values reach earlier rows");
    }
}

#[test]
fn a_token_attends_itself_only_where_nothing_else_is_seen() {
    let mut problem = Problem::normal(AttnShape::square(1, 64, 8), 6);
    problem.v.chunks_exact_mut(8).enumerate().for_each(|(i, row)| row.fill(if i == 20 { 1e4 } else { 0.0 }));
    let shared = set(&["bucket_size=16", "shared_qk=true"]);
    let out = run("reformer-lsh", &shared, &problem);
    assert_eq!(out[20 * 8], 0.0);
    assert!(out.iter().any(|x| *x > 0.0), "others see token 20");
    let causal = shared.with("causal", true);
    problem.v.iter_mut().enumerate().for_each(|(at, x)| *x = at as f32);
    assert_eq!(run("reformer-lsh", &causal, &problem)[..8], problem.v[..8], "the first token sees itself");
}

#[test]
fn sinkhorn_without_other_buckets_is_attention_inside_buckets() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 7, ..AttnShape::square(2, 48, 8) };
    let problem = Problem::normal(shape, 12);
    let own = |at: attn_core::mask::Pair| at.i / 16 == at.j / 16;
    let mask = attn_core::mask::Predicate(own);
    let want = Exact { mask: &mask, ..Exact::default() }.all(&problem.qkv().unwrap()).unwrap().out;
    // Every bucket mixed into itself: each key is there twice.
    let identity = (0..2 * 9).map(|e| f32::from(u8::from(e % 9 / 3 == e % 3))).collect();
    let mut tensors = crate::named(&problem);
    let sort = attn_core::registry::NamedTensor::f32("sort", &[1, 2, 3, 3], identity).unwrap();
    tensors.0.insert("sort".into(), sort);
    let got = entry("sinkhorn").run(&set(&["bucket_size=16"]), &tensors).unwrap();
    assert_close("identity", &got.require("o").unwrap().data.to_f64(), &want, Tol::ScaledMax(4e-6));
}

#[test]
fn sinkhorn_of_one_bucket_is_dense_attention() {
    let problem = Problem::normal(AttnShape::square(2, 30, 8), 13);
    let options = set(&["bucket_size=30"]);
    assert_close("soft", &run("sinkhorn", &options, &problem), &dense(&problem, false), Tol::ScaledMax(4e-6));
    let options = set(&["bucket_size=30", "kind=sortcut", "n_top=5"]);
    assert_close(
        "sortcut",
        &run("sinkhorn", &options, &problem),
        &dense(&problem, false),
        Tol::ScaledMax(4e-6),
    );
}

#[test]
fn centroids_move_to_their_tokens() {
    let shape = AttnShape { batch: 2, ..AttnShape::square(1, 40, 2) };
    // Two bundles of directions.
    let bundle = |i: usize| if i.is_multiple_of(2) { [1.0, 0.1] } else { [-0.1, -3.0] };
    let rows: Vec<f32> = (0..80).flat_map(bundle).collect();
    let view = |name| View::contiguous(name, &rows, shape.q()).unwrap();
    let x = attn_core::Qkv::new(view("q"), view("k"), view("v")).unwrap();
    let config = Routing::default();
    let mut means = vec![0.6, 0.8, 0.6, -0.8, -0.8, 0.6];
    config.update_means(&x, &mut means, 0.0).unwrap();
    let unit = |x: f32, y: f32| [x / x.hypot(y), y / x.hypot(y)];
    let want: Vec<f64> =
        [unit(1.0, 0.1), unit(-0.1, -3.0), [-0.8, 0.6]].concat().iter().map(|x| f64::from(*x)).collect();
    assert_close("decay 0", &means, &want, Tol::ScaledMax(1e-6));
    let mut slow = vec![0.6, 0.8];
    config.update_means(&x, &mut slow, 1.0).unwrap();
    assert_eq!(slow, [0.6, 0.8]);
    assert!(config.update_means(&x, &mut means, 1.5).unwrap_err().to_string().contains("decay is 1.5"));
    assert!(config.update_means(&x, &mut [0.0; 3], 0.5).unwrap_err().to_string().contains("means"));
}

/// The keys of each query in each round, as sets: those of its chunk and of the chunk before, where the chunk before the first
/// one is the last of the round before.
fn chunk_sets(of_q: &[i32], of_k: &[i32], n: usize, chunk: usize) -> Vec<Vec<Vec<usize>>> {
    let sorted = |buckets: &[i32]| {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|i| (buckets[*i], *i));
        order
    };
    let orders = |all: &[i32]| all.chunks_exact(n).map(sorted).collect::<Vec<_>>();
    let (q, k) = (orders(of_q), orders(of_k));
    let (rounds, chunks) = (q.len(), n.div_ceil(chunk));
    let members = |round: usize, at: usize| &k[round][at * chunk..((at + 1) * chunk).min(n)];
    let of_round = |round: usize| {
        let mut sets = vec![Vec::new(); n];
        for (rank, i) in q[round].iter().enumerate() {
            let own = rank / chunk;
            let before =
                if own == 0 { ((round + rounds - 1) % rounds, chunks - 1) } else { (round, own - 1) };
            sets[*i] = [members(round, own), members(before.0, before.1)].concat();
            sets[*i].sort_unstable();
            sets[*i].dedup();
        }
        sets
    };
    (0..rounds).map(of_round).collect()
}

/// The paper's equations 4 to 6: each round's softmax with `ln N_ij` taken off, `N_ij` the number of rounds whose set for `i`
/// holds `j`, merged by the rounds' normalisers. Sets that meet a pair twice, by the wrap to the round before, hold it once.
#[test]
fn pairs_that_several_rounds_meet_count_once_as_in_the_paper() {
    let (n, d, chunk) = (45, 6, 8);
    let problem = Problem::normal(AttnShape::square(1, n, d), 21);
    let x = problem.qkv().unwrap();
    for shared in [false, true] {
        let config = Reformer {
            bucket_size: chunk,
            n_hashes: 3,
            allow_duplicate_attention: false,
            shared_qk: shared,
            ..Reformer::default()
        };
        let of_q = config.buckets(&x, false, Hashing::Drawn).unwrap();
        let of_k = if shared { of_q.clone() } else { config.buckets(&x, true, Hashing::Drawn).unwrap() };
        let rounds = chunk_sets(&of_q, &of_k, n, chunk);
        let row = |of: &[f32], i: usize| of[i * d..][..d].iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let score = |i: usize, j: usize| {
            let q = row(&problem.q, i);
            let k = row(if shared { &problem.q } else { &problem.k }, j);
            let length = if shared { dot(&k, &k).sqrt() } else { 1.0 };
            if shared && i == j { -5e4 } else { dot(&q, &k) / length / (d as f64).sqrt() }
        };
        let (mut want, mut repeated) = (Vec::new(), 0);
        for i in 0..n {
            let count = |j: usize| rounds.iter().filter(|round| round[i].contains(&j)).count();
            let parts: Vec<(f64, Vec<f64>)> = rounds
                .iter()
                .map(|round| {
                    let set = &round[i];
                    let scores: Vec<f64> = set
                        .iter()
                        .map(|j| score(i, *j) - if shared && *j == i { 0.0 } else { (count(*j) as f64).ln() })
                        .collect();
                    repeated += set.iter().filter(|j| count(**j) > 1).count();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let z = most + scores.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
                    let mut out = vec![0.0; d];
                    for (j, score) in set.iter().zip(&scores) {
                        let weight = (score - z).exp();
                        out.iter_mut().zip(row(&problem.v, *j)).for_each(|(sum, v)| *sum += weight * v);
                    }
                    (z, out)
                })
                .collect();
            let most = parts.iter().map(|(z, _)| *z).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = parts.iter().map(|(z, _)| (z - most).exp()).sum();
            for c in 0..d {
                want.push(parts.iter().map(|(z, out)| (z - most).exp() / total * out[c]).sum::<f64>());
            }
        }
        assert!(repeated > n, "pairs are met again");
        let options = set(&["bucket_size=8", "n_hashes=3", "allow_duplicate_attention=false"]);
        let options = options.with("shared_qk", shared);
        assert_close("once", &run("reformer-lsh", &options, &problem), &want, Tol::ScaledMax(4e-6));
        let again = run("reformer-lsh", &options.with("allow_duplicate_attention", true), &problem);
        let furthest = again.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(furthest > 1e-2, "counted again, they weigh more");
    }
}
