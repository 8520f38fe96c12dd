//! Sparse attention beside the dense kernel in the same run: rates per useful FLOP of block lists, windows and rows that stand
//! apart.
#![allow(missing_docs, clippy::print_stdout)]

use attn_benches::{Problem, Setting, backward, forward};
use attn_core::mask::{Align, Band};
use attn_core::{AttnShape, Causality, Growth, Qkv, Result};
use attn_flash::Flash;
use attn_sparse::{
    BlockMask, BlockSizes, Builder, Decider, Decision, Promises, SlidingWindow, SparseAttention, Work,
};
use criterion::{Criterion, criterion_group, criterion_main};
use std::sync::Arc;

/// Lists that are there already: what the engine takes, without the choice.
#[derive(Clone)]
struct Listed(Arc<BlockMask>);

impl Decider for Listed {
    const NAME: &'static str = "listed";

    fn decide(&self, _: &Qkv<'_>) -> Result<Decision> {
        Ok(BlockMask::clone(&self.0).into())
    }

    fn promises(&self) -> Promises {
        Promises {
            causality: Causality::Bidirectional,
            key_order_free: false,
            cross_lengths: true,
            time: Growth::Linear,
            memory: Growth::Linear,
            kept: None,
        }
    }

    fn work(&self, _: &AttnShape) -> Work {
        Work { pairs: self.0.n_pairs(), ..Work::default() }
    }
}

/// `share` of the blocks of each row, at random; the row's own among them if `causal`.
fn listed(shape: &AttnShape, block: usize, share: f64, causal: bool) -> SparseAttention<Listed> {
    let mut builder = Builder::new(shape, BlockSizes::square(block));
    if causal {
        builder = builder.inside(Arc::new(Band::causal(shape, Align::BottomRight)));
    }
    let n_cols = shape.n_kv.div_ceil(block);
    let row = |_: usize, _: usize, row: usize| {
        let end = if causal { row + 1 } else { n_cols };
        let n = ((end as f64 * share).round() as usize).max(1);
        let mut blocks = if causal { vec![row] } else { Vec::new() };
        let mut x = (row as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        while blocks.len() < n {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let block = (x >> 33) as usize % end;
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
        blocks
    };
    SparseAttention::new(Listed(Arc::new(builder.from_rows(row).expect("lists that exist"))))
}

/// A tenth of the blocks.
fn blocks(c: &mut Criterion) {
    for head_dim in [64, 128] {
        let problem = Problem::new(AttnShape::square(1, 16384, head_dim));
        for causal in [false, true] {
            let dense = if causal { Flash::causal() } else { Flash::full() };
            let sparse = listed(&problem.shape, 64, 0.1, causal);
            for threads in [1, 2] {
                let name = |what: &str| format!("{what} causal={causal} d={head_dim} n=16384");
                forward(c, &name("dense"), &dense, &problem, Setting::threads(threads));
                forward(c, &name("tenth of the blocks"), &sparse, &problem, Setting::threads(threads));
            }
        }
    }
}

/// Time has to grow with the length alone.
fn windows(c: &mut Criterion) {
    let problem = Problem::new(AttnShape::square(1, 16384, 64));
    forward(c, "dense causal d=64 n=16384", &Flash::causal(), &problem, Setting::threads(1));
    let window = SparseAttention::new(SlidingWindow::causal(512));
    for n in [1 << 16, 1 << 18, 1 << 20] {
        let problem = Problem::new(AttnShape::square(1, n, 64));
        for threads in [1, 2] {
            forward(c, &format!("window 512 n={n}"), &window, &problem, Setting::threads(threads));
        }
    }
}

/// Each query with 64 keys of its own, wherever they lie.
fn rows_apart(c: &mut Criterion) {
    for (group, n) in [(1, 16384), (8, 16384), (1, 65536)] {
        let problem = Problem::new(AttnShape { n_heads_q: group, ..AttnShape::square(1, n, 64) });
        let tokens = listed(&problem.shape, 1, 64.0 / n as f64, false);
        for threads in [1, 2] {
            let name = format!("64 keys a query, {group} heads n={n}");
            forward(c, &name, &tokens, &problem, Setting::threads(threads));
        }
        if n < 65536 {
            backward(
                c,
                &format!("backward 64 keys a query, {group} heads"),
                &tokens,
                &problem,
                Setting::threads(1),
            );
        }
    }
}

/// Counted as 2.5 times the forward pass.
fn gradients(c: &mut Criterion) {
    let problem = Problem::new(AttnShape::square(1, 16384, 64));
    for causal in [false, true] {
        let dense = if causal { Flash::causal() } else { Flash::full() };
        let sparse = listed(&problem.shape, 64, 0.1, causal);
        for threads in [1, 2] {
            let name = |what: &str| format!("backward {what} causal={causal} n=16384");
            backward(c, &name("dense"), &dense, &problem, Setting::threads(threads));
            backward(c, &name("tenth of the blocks"), &sparse, &problem, Setting::threads(threads));
        }
    }
}

criterion_group!(benches, blocks, windows, rows_apart, gradients);
criterion_main!(benches);
