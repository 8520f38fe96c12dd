//! Who is evicted when, against a simulation in f64 that follows the definitions.

use super::*;
use attn_core::mask::Head;
use attn_testkit::inputs::Problem;

/// Everything that a layer remembers, nothing thrown away.
struct Simulation<'a> {
    policy: &'a EvictionPolicy,
    problem: &'a Problem,
    batch: usize,
    /// Held by each key/value head, ascending.
    held: Vec<Vec<usize>>,
    /// `[kv head][query][key]`: the group's mean weight, 0 if not seen.
    weights: Vec<Vec<Vec<f64>>>,
}

impl<'a> Simulation<'a> {
    fn new(policy: &'a EvictionPolicy, problem: &'a Problem, batch: usize) -> Self {
        let heads = problem.shape.n_heads_kv;
        Self { policy, problem, batch, held: vec![Vec::new(); heads], weights: vec![Vec::new(); heads] }
    }

    fn key(&self, head: usize, j: usize) -> Vec<f64> {
        let (s, d) = (self.problem.shape, self.problem.shape.head_dim);
        let at = ((self.batch * s.n_heads_kv + head) * s.n_kv + j) * d;
        self.problem.k[at..at + d].iter().map(|x| f64::from(*x)).collect()
    }

    /// The group's mean weights of query `t` over what the head holds.
    fn attend(&mut self, head: usize, t: usize) {
        let (s, d) = (self.problem.shape, self.problem.shape.head_dim);
        let mut mean = vec![0.0; s.n_kv];
        for g in 0..s.group_size() {
            let at = ((self.batch * s.n_heads_q + head * s.group_size() + g) * s.n_q + t) * d;
            let q = &self.problem.q[at..at + d];
            let score = |j: &usize| -> f64 {
                self.key(head, *j).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>()
                    / (d as f64).sqrt()
            };
            let weights: Vec<f64> = self.held[head].iter().map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (j, weight) in self.held[head].iter().zip(weights) {
                mean[*j] += weight / sum / s.group_size() as f64;
            }
        }
        self.weights[head].push(mean);
    }

    /// What the positions held are worth after query `t`.
    fn worth(&self, head: usize, t: usize) -> Vec<f64> {
        let unit = |j: usize| {
            let k = self.key(head, j);
            let norm = k.iter().map(|k| k * k).sum::<f64>().sqrt();
            k.into_iter().map(|k| k / norm).collect::<Vec<_>>()
        };
        let held = &self.held[head];
        let mass = |j: usize, from: usize| (from..=t).map(|i| self.weights[head][i][j]).sum::<f64>();
        match self.policy.importance {
            Importance::Recency => held.iter().map(|j| *j as f64).collect(),
            Importance::KeyNorm => {
                held.iter().map(|j| -self.key(head, *j).iter().map(|k| k * k).sum::<f64>().sqrt()).collect()
            }
            Importance::KeyDifference => {
                let units: Vec<Vec<f64>> = held.iter().map(|j| unit(*j)).collect();
                let anchor: Vec<f64> =
                    (0..units[0].len()).map(|c| units.iter().map(|unit| unit[c]).sum()).collect();
                let norm = anchor.iter().map(|a| a * a).sum::<f64>().sqrt();
                units.iter().map(|u| -u.iter().zip(&anchor).map(|(u, a)| u * a / norm).sum::<f64>()).collect()
            }
            Importance::LastQuery => held.iter().map(|j| mass(*j, t)).collect(),
            Importance::TotalMass => held.iter().map(|j| mass(*j, *j)).collect(),
            Importance::MeanMass => held.iter().map(|j| mass(*j, *j) / (t - j + 1) as f64).collect(),
            Importance::WindowMass { window, kernel, pooling } => {
                let from = (t + 1).saturating_sub(window);
                let before = held.iter().filter(|j| **j + self.policy.recent() <= t).count();
                let mean = held[..before].iter().map(|j| mass(*j, from) / window as f64).collect::<Vec<_>>();
                let side = kernel as isize / 2;
                let at = |at: isize| usize::try_from(at).ok().and_then(|at| mean.get(at).copied());
                let smoothed = |slot: isize| {
                    let around = slot - side..=slot + side;
                    match pooling {
                        Pooling::Mean => around.map(|s| at(s).unwrap_or(0.0)).sum::<f64>() / kernel as f64,
                        Pooling::Max => around.filter_map(at).fold(0.0, f64::max),
                    }
                };
                let forced = vec![f64::INFINITY; held.len() - before];
                (0..before as isize).map(smoothed).chain(forced).collect()
            }
        }
    }

    /// `(head, position)` that goes after query `t`, of heads that decide together.
    fn least(&self, heads: &[usize], worth: &[Vec<f64>], t: usize) -> (usize, usize) {
        let mut all = Vec::new();
        for (&head, worth) in heads.iter().zip(worth) {
            for (j, worth) in self.held[head].iter().zip(worth) {
                let forced = *j < self.policy.n_sinks || j + self.policy.recent() > t;
                if !forced && self.held[head].len() > self.policy.safe() {
                    all.push((*worth, head, *j));
                }
            }
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
        (all[0].1, all[0].2)
    }

    fn step(&mut self, t: usize) -> Vec<Vec<usize>> {
        let heads: Vec<usize> = (0..self.held.len()).collect();
        for &head in &heads {
            self.held[head].push(t);
            self.attend(head, t);
        }
        let seen = self.held.clone();
        let mut worth: Vec<Vec<f64>> = heads.iter().map(|head| self.worth(*head, t)).collect();
        match self.policy.share {
            Share::Head => {
                for &head in heads.iter().filter(|head| !self.policy.full_heads.contains(head)) {
                    if self.held[head].len() > self.policy.budget {
                        let mut one = self.policy.clone();
                        one.share = Share::Budget { safeguard: 0.0 };
                        let (_, j) = self.least(&[head], &worth[head..=head], t);
                        self.held[head].retain(|held| *held != j);
                    }
                }
            }
            Share::Layer => {
                let mean =
                    (0..worth[0].len()).map(|at| worth.iter().map(|w| w[at]).sum()).collect::<Vec<f64>>();
                worth.fill(mean);
                if self.held[0].len() > self.policy.budget {
                    let (_, j) = self.least(&[0], &worth[..1], t);
                    self.held.iter_mut().for_each(|held| held.retain(|held| *held != j));
                }
            }
            Share::Budget { .. } => {
                while self.held.iter().map(Vec::len).sum::<usize>() > self.policy.budget * heads.len() {
                    let (head, j) = self.least(&heads, &worth, t);
                    let at = self.held[head].iter().position(|held| *held == j).unwrap();
                    self.held[head].remove(at);
                    worth[head].remove(at);
                }
            }
        }
        seen
    }
}

fn policies() -> Vec<EvictionPolicy> {
    let all = [
        EvictionPolicy::streaming_llm(3, 10),
        EvictionPolicy::h2o(4, 12),
        EvictionPolicy::observed_attention(9),
        EvictionPolicy::tova(8),
        EvictionPolicy { share: Share::Head, ..EvictionPolicy::tova(1) },
        EvictionPolicy::snap_kv(5, 3, 14),
        EvictionPolicy {
            importance: Importance::WindowMass { window: 3, kernel: 5, pooling: Pooling::Max },
            n_sinks: 1,
            ..EvictionPolicy::snap_kv(3, 5, 20)
        },
        EvictionPolicy::key_norm(7),
        EvictionPolicy::key_diff(17),
        EvictionPolicy::duo(vec![1], 2, 6),
    ];
    let shared =
        |safeguard| EvictionPolicy { share: Share::Budget { safeguard }, ..EvictionPolicy::h2o(2, 10) };
    all.into_iter().chain([shared(0.2), shared(1.0)]).collect()
}

#[test]
fn the_least_worthy_goes_after_each_query() {
    let shape =
        AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 61, n_kv: 61, head_dim: 6, head_dim_v: 3 };
    let problem = Problem::normal(shape, 4);
    for policy in policies() {
        let eviction = KvEviction::new(policy.clone());
        let decision = eviction.decide(&problem.qkv().unwrap()).unwrap();
        for batch in 0..shape.batch {
            let mut simulation = Simulation::new(&policy, &problem, batch);
            for t in 0..shape.n_q {
                for (kv_head, seen) in simulation.step(t).into_iter().enumerate() {
                    for g in 0..2 {
                        let head = Head { batch, head: 2 * kv_head + g };
                        let got = decision.selected(head, t, shape.n_kv);
                        assert_eq!(got, seen, "{policy:?}: batch {batch}, head {kv_head}, query {t}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_prompt_is_judged_by_its_dense_weights() {
    // As the token-by-token form judges with a budget that never evicts.
    let shape = AttnShape { n_heads_kv: 2, ..AttnShape::square(4, 90, 6) };
    let problem = Problem::normal(shape, 5);
    for policy in policies() {
        let mut all = policy.clone();
        all.budget = 1000;
        let mut simulation = Simulation::new(&all, &problem, 0);
        (0..shape.n_q).for_each(|t| drop(simulation.step(t)));
        let survivors = KvEviction::new(policy.clone()).compress(&problem.qkv().unwrap()).unwrap();
        for head in 0..2 {
            let want = simulation.worth(head, shape.n_q - 1);
            let want = match policy.share {
                Share::Layer => {
                    let other = simulation.worth(1 - head, shape.n_q - 1);
                    want.iter().zip(other).map(|(a, b)| (a + b) / 2.0).collect()
                }
                _ => want,
            };
            for (at, (got, want)) in survivors.worth[head].iter().zip(&want).enumerate() {
                let close = (got - want).abs() <= 1e-6 * (1.0 + want.abs());
                assert!(close || want.is_infinite(), "{policy:?}: {at} is worth {got}, not {want}");
            }
        }
        let kept: Vec<usize> = survivors.positions.iter().map(Vec::len).collect();
        match policy.share {
            Share::Budget { .. } => {
                assert_eq!(kept.iter().sum::<usize>(), 2 * policy.budget);
                assert!(kept.iter().all(|kept| *kept >= policy.safe()), "{kept:?}");
            }
            _ if policy.keeps_all(1) => assert_eq!(kept, [policy.budget, 90]),
            _ => assert_eq!(kept, [policy.budget; 2]),
        }
        for positions in &survivors.positions {
            let forced = (0..90).filter(|at| policy.is_forced(*at, 89));
            assert!(forced.into_iter().all(|at| positions.contains(&at)), "{policy:?}: forced ones stay");
        }
    }
}

#[test]
fn settings_that_cannot_be_met_are_refused() {
    let refused = |policy: EvictionPolicy, word: &str| {
        let message = policy.check(2).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(EvictionPolicy::tova(0), "budget");
    refused(EvictionPolicy::streaming_llm(9, 8), "n_sinks");
    refused(EvictionPolicy::snap_kv(16, 5, 8), "window");
    refused(EvictionPolicy::snap_kv(4, 2, 8), "kernel");
    refused(EvictionPolicy::duo(vec![2], 0, 8), "full_heads");
    let shared =
        |safeguard| EvictionPolicy { share: Share::Budget { safeguard }, ..EvictionPolicy::h2o(1, 8) };
    refused(shared(1.5), "safeguard");
    refused(EvictionPolicy { full_heads: vec![0], ..shared(0.5) }, "share");
    assert!(pyramid_budgets(0, 10, 5, 20.0, 1).is_err() && pyramid_budgets(2, 10, 5, 0.5, 1).is_err());
    assert_eq!(pyramid_budgets(3, 100, 20, 20.0, 32).unwrap(), [20; 3], "the last would be below the window");
    assert_eq!(pyramid_budgets(3, 100, 60, 20.0, 8).unwrap(), [92, 60, 28], "the first is the whole prompt");
}
