//! `flash` on named tensors.
//!
//! | tensors | what they are |
//! |---|---|
//! | those of a [`Layout`] | queries, keys and values |
//! | `mask`, `keep` | booleans as u8: 1 is seen, is kept by the dropout |
//! | `bias` | f32; this and the two above broadcast to `(batch, n_heads_q, n_q, n_kv)` from the right |
//! | `documents_q [n_q]`, `documents_kv [n_kv]` | i32 ids, or with a batch axis in front; equal ids see each other |
//! | `alibi_slopes [n_heads_q]`, `relative_table [n_heads_q, 2 max + 1]`, `t5_table [buckets, n_heads_q]` | f32 |
//! | `key_bias [n_kv]`, `sinks [n_heads_q]`, `q_weight [head_dim]`, `k_weight [head_dim]` | f32 |
//!
//! All may be given together, except that packed sequences take no tensor over rows and keys. Out come `o` and `lse`; with
//! sinks, which `lse` includes, also `lse_without_sink`; with `grad_o` the gradients of [`super::gradients`].

use super::biases::Biases;
use super::gradients::Called;
use super::sequences::Layout;
use super::{biases, dropout, masks, norm, options};
use attn_core::Result;
use attn_core::mask::Mask;
use attn_core::registry::{NamedTensors, Options};
use attn_core::score::ScoreMod;

pub(super) fn run(options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let layout = Layout::of(tensors);
    check_names(layout, tensors)?;
    let mut flash = options::flash(options)?;
    if options.get::<usize>("prefix")?.is_some() {
        flash.causal = false; // the prefix' own mask is causal behind it
    }
    let problem = layout.problem(tensors)?;
    let dense = masks::dense(tensors)?;
    let mask = masks::masks(&flash, options, tensors, &dense, &problem)?;
    let biases = Biases::read(&flash, options, tensors, &problem)?;
    let score_mod = biases.score_mod();
    // Looked up through a table at run time: a file's mask is not worth a kernel of its own.
    let mut call = flash.call().mask(&mask as &dyn Mask).score_mod(&score_mod as &dyn ScoreMod);
    if let Some((_, key_bias)) = tensors.f32("key_bias")? {
        call = call.key_bias(key_bias);
    }
    let keep = dropout::keep(tensors)?;
    if let Some(dropout) = dropout::dropout(options, &keep, &problem.shape())? {
        call = call.dropout(dropout);
    }
    if let Some(norm) = norm::norm(options, tensors)? {
        call = call.qk_norm(norm);
    }

    let mut given = NamedTensors::default();
    let mut out = layout.output(&problem);
    let mut lse = vec![f32::NAN; problem.shape().rows()];
    if let Some((_, sinks)) = tensors.f32("sinks")? {
        call.forward(problem, layout.view_mut("o", &mut out)?, Some(&mut lse))?;
        given.0.insert("lse_without_sink".into(), layout.lse(&problem, lse.clone())?);
        call = call.sinks(sinks);
    }
    call.forward(problem, layout.view_mut("o", &mut out)?, Some(&mut lse))?;
    if let Some(grad_o) = tensors.get("grad_o") {
        let called = Called { call: &call, layout, problem, tensors, biases: &biases, out: &out, lse: &lse };
        given.0.extend(called.gradients(grad_o)?.0);
    }
    given.0.insert("lse".into(), layout.lse(&problem, lse)?);
    given.0.insert("o".into(), out);
    Ok(given)
}

fn check_names(layout: Layout, tensors: &NamedTensors) -> Result<()> {
    let mut known = layout.tensors().to_vec();
    known.extend(biases::TENSORS);
    known.extend(norm::TENSORS);
    known.extend(["key_bias", "sinks", "grad_o"]);
    if layout != Layout::Packed {
        known.extend(masks::TENSORS);
        known.extend(["bias", "keep"]);
    }
    tensors.only("flash", &known)
}
