//! A sparse mask of one's own: five lines from a predicate to attention with gradients.
//!
//! ```text
//! cargo run --release -p attn-sparse --no-default-features --example predicate
//! ```
//!
//! The predicate is compiled once to lists of blocks. Blocks without a pair are never visited, full ones pay nothing for the
//! mask, and only those on an edge ask the predicate again.
#![allow(clippy::print_stdout)]

use attn_core::mask::Head;
use attn_core::{Attention, AttnShape, Qkv, View, ViewMut};
use attn_sparse::{BlockMask, BlockSizes, SparseAttention};
use std::time::Instant;

const N: usize = 2048;
const BLOCK: usize = 64;

fn main() -> attn_core::Result<()> {
    let shape = AttnShape::square(4, N, 64);

    // The five lines. Causal text in pages of 512 tokens: a query sees its own page, and the first 32 tokens of each
    // earlier one.
    let mask = BlockMask::from_predicate(&shape, BlockSizes::square(BLOCK), |pair| {
        let (own, earlier) = (pair.i / 512 == pair.j / 512, pair.j % 512 < 32);
        pair.j <= pair.i && (own || earlier)
    })?;
    let attention = SparseAttention::new(mask.clone());

    let numbers = |seed: f32| (0..4 * N * 64).map(|at| (at as f32 * seed).sin()).collect::<Vec<f32>>();
    let (q, k, v) = (numbers(0.137), numbers(0.291), numbers(0.173));
    let mut out = vec![0.0; q.len()];
    let x = Qkv::new(
        View::contiguous("q", &q, shape.q())?,
        View::contiguous("k", &k, shape.k())?,
        View::contiguous("v", &v, shape.v())?,
    )?;
    let start = Instant::now();
    attention.forward(x, ViewMut::contiguous("out", &mut out, shape.out())?.into())?;
    let time = start.elapsed();

    let head = Head { batch: 0, head: 0 };
    println!(
        "Which blocks of {BLOCK} keys (across) the blocks of {BLOCK} queries (down) see: # all, + some pairs\n"
    );
    for row in 0..mask.n_block_rows() {
        let mut line = vec!['.'; mask.n_block_cols()];
        mask.row(head, row).for_each(|(block, partial)| line[block] = if partial { '+' } else { '#' });
        println!("  {}", line.iter().collect::<String>());
    }
    let dense = (shape.n_heads_q * N * N) as f64;
    let visited = (mask.n_blocks() * BLOCK * BLOCK) as f64;
    println!(
        "\n{:.1} % of all pairs are seen, {:.1} % are visited.",
        100.0 * mask.n_pairs() as f64 / dense,
        100.0 * visited / dense
    );
    let decision = attention.decide(&x)?;
    let keys = decision.selected(head, N - 1, N);
    println!("The last query sees {} keys, the first five of them {:?}.", keys.len(), &keys[..5]);
    println!(
        "Attention took {:.1} ms; the last output is {:.4}.",
        1e3 * time.as_secs_f64(),
        out[out.len() - 1]
    );
    Ok(())
}
