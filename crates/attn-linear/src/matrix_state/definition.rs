//! The definition of a whole problem: the variant's front end and back end around the recurrence in f64.

use super::head::{blind, fill, rows};
use super::inputs::{Inputs, Sizes};
use super::memory::Memory;
use super::run::{check_blind, prepare};
use super::variant::{AnyVariant, Given, Plan, Reads, Tokens, copy};
use super::{Chunk, Options, naive};
use attn_core::exact::Reference;
use attn_core::simd::Isa;
use attn_core::view::Rows;
use attn_core::{Result, TensorView};

/// Outputs by the recurrence over each head's whole sequence.
pub(super) fn definition(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    memory: Option<&Memory>,
) -> Result<Reference> {
    let (sizes, plan) = prepare(variant, x)?;
    if memory.is_some() {
        check_blind(variant, &plan, &sizes)?;
    }
    let mut memory = memory.cloned().unwrap_or_else(|| Memory::new(&plan, &sizes));
    memory.check(&plan, &sizes)?;
    let heads = (0..sizes.batch).flat_map(|batch| (0..sizes.heads).map(move |head| (batch, head)));
    let mut out = Vec::new();
    for ((batch, head), memory) in heads.zip(memory.heads_mut()) {
        let rows = |view: &TensorView<'_>| {
            let own = head / (sizes.heads / view.shape()[1]);
            view.head_f64(batch, own).iter().map(|x| *x as f32).collect::<Vec<_>>()
        };
        let (q, k, v) = (rows(&x.q), rows(&x.k), rows(&x.v));
        let extras = x.head_extras(sizes.heads, batch, head);
        let blind = blind(&plan, sizes.tokens, sizes.keys);
        let whole = Rows::new(&q, sizes.tokens, sizes.head_dim, sizes.head_dim);
        let tokens = Tokens {
            q: whole.slice(blind..sizes.tokens),
            k: Rows::new(&k, sizes.keys, sizes.head_dim, sizes.head_dim),
            v: Rows::new(&v, sizes.keys, sizes.head_dim_v, sizes.head_dim_v),
            head,
            heads: sizes.heads,
            isa: Isa::current(),
            extras: &extras,
        };
        out.extend(std::iter::repeat_n(0.0, blind * sizes.head_dim_v));
        out.extend(one_head(variant, &plan, &sizes, &tokens, memory));
    }
    Ok(Reference { out, lse: None })
}

fn one_head(
    variant: &dyn AnyVariant,
    plan: &Plan,
    sizes: &Sizes,
    x: &Tokens<'_>,
    memory: &mut [f32],
) -> Vec<f64> {
    let (mut matrices, carry) = memory.split_at_mut(plan.matrices_len());
    let (mut read, mut chunk, mut scale) = (naive::Sequence::default(), Chunk::default(), 1.0);
    for (stage, options) in plan.stages.iter().enumerate() {
        let first = std::mem::replace(&mut chunk, Chunk::new(options, rows(variant, x)));
        if stage == 0 {
            fill(variant, plan, x, carry, &mut chunk);
            copy_given(variant.given(), x, &mut chunk);
        } else {
            let reads: Vec<f32> = read.out.iter().map(|x| *x as f32).collect();
            variant.refill(x, &first, &reads, &mut chunk);
        }
        let (matrix, rest) = std::mem::take(&mut matrices).split_at_mut(options.state_len());
        let initial: Vec<f64> = matrix.iter().map(|s| f64::from(*s)).collect();
        matrices = rest;
        read = sequence(plan.causal, options, &mut chunk, x, &initial);
        scale = options.scale;
    }
    if !variant.finishes() {
        return read.out;
    }
    // A back end scales by itself.
    let unscaled = |x: &[f64]| x.iter().map(|x| (x / f64::from(scale)) as f32).collect::<Vec<_>>();
    let (rows, norms) = (unscaled(&read.out), unscaled(&read.norms));
    let mut done = vec![0.0; x.q.len() * sizes.head_dim_v];
    variant.finish(x, &chunk, Reads { rows: &rows, norms: &norms, scale }, &mut done);
    done.into_iter().map(f64::from).collect()
}

fn copy_given(given: Given, x: &Tokens<'_>, chunk: &mut Chunk) {
    if given.q {
        copy(x.q, &mut chunk.q);
    }
    if given.k {
        copy(x.k, &mut chunk.k);
    }
    if given.v {
        copy(x.v, &mut chunk.v);
    }
}

/// What the queries read, wherever they stand: the last of them together with the last keys, or all behind all keys.
fn sequence(
    causal: bool,
    o: &Options,
    chunk: &mut Chunk,
    x: &Tokens<'_>,
    initial: &[f64],
) -> naive::Sequence {
    let (queries, keys) = (x.q.len(), x.k.len());
    if causal && queries == chunk.len {
        return naive::recurrence(o, chunk, initial);
    }
    // Queries of zeros for the keys that come first, and with them nothing to tell.
    let q = chunk.q[..queries * o.key_dim].to_vec();
    chunk.len = keys;
    chunk.q.clear();
    chunk.q.resize(keys * o.key_dim, 0.0);
    if causal {
        let first = keys - queries;
        chunk.q[first * o.key_dim..].copy_from_slice(&q);
        let mut all = naive::recurrence(o, chunk, initial);
        all.out.drain(..first * o.value_dim);
        all.norms.drain(..first.min(all.norms.len()));
        return all;
    }
    let state = naive::recurrence(o, chunk, initial).state;
    // What has been written already is the state of tokens that write nothing.
    let silent = Chunk {
        len: queries,
        q,
        k: vec![0.0; queries * o.key_dim],
        v: vec![0.0; queries * o.value_dim],
        ..Chunk::default()
    };
    naive::recurrence(o, &silent, &state)
}
