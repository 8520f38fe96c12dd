//! Selection and eviction for decoding.

use super::named::list;
use super::{at_least_1, build};
use crate::{Decider, EvictionPolicy, Importance, KvEviction, Pooling, Quest, Share, Survivors};
use attn_core::registry::{
    Entry, NamedTensor, NamedTensors, OptionSpec, Options, TensorData, output_like, run_qkv,
};
use attn_core::{AttnError, Family, Qkv, Result};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: Quest::NAME,
            family: Family::Sparse,
            summary: "Pages whose bounds promise the largest scores (Tang et al. 2024)",
            options: &[
                OptionSpec { name: "page_len", default: "16", help: "keys of a page" },
                OptionSpec {
                    name: "token_budget",
                    default: "1024",
                    help: "keys that a query attends, in whole pages, three at least",
                },
                OptionSpec {
                    name: "keep_own",
                    default: "false",
                    help: "a query takes the page that it stands in, whatever its bound (true|false)",
                },
                OptionSpec::CAUSAL,
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                let quest = Quest {
                    page_len: at_least_1(options, "page_len", 16)?,
                    token_budget: at_least_1(options, "token_budget", 1024)?,
                    keep_own: options.get_or("keep_own", false)?,
                    causal: options.get_or("causal", false)?,
                };
                build(options, quest)
            },
            runner: run_qkv,
        },
        Entry {
            name: KvEviction::NAME,
            family: Family::Sparse,
            summary: "A cache held down to a budget: H2O, SnapKV, TOVA, StreamingLLM, key norms, KeyDiff, AdaKV, Duo",
            options: &[
                OptionSpec {
                    name: "policy",
                    default: "h2o",
                    help: "h2o|observed-attention|snapkv|tova|streaming-llm|key-norm|key-diff|duo",
                },
                OptionSpec { name: "budget", default: "512", help: "positions that a key/value head keeps" },
                OptionSpec {
                    name: "n_sinks",
                    default: "",
                    help: "first positions that always stay; default 4 for streaming-llm and duo, else 0",
                },
                OptionSpec {
                    name: "n_recent",
                    default: "",
                    help: "last positions that stay; default half the budget for h2o, 1 for tova, else 0",
                },
                OptionSpec {
                    name: "window",
                    default: "",
                    help: "snapkv: last queries that are asked, default 32",
                },
                OptionSpec {
                    name: "kernel",
                    default: "",
                    help: "snapkv: neighbours smoothed over, default 5",
                },
                OptionSpec { name: "pooling", default: "", help: "snapkv: how they are smoothed, mean|max" },
                OptionSpec {
                    name: "share",
                    default: "",
                    help: "head: each for itself; layer: the same positions (tova's default); budget: one for all (AdaKV)",
                },
                OptionSpec {
                    name: "safeguard",
                    default: "",
                    help: "share=budget: share of its budget that each head keeps, default 0.2",
                },
                OptionSpec {
                    name: "full_heads",
                    default: "",
                    help: "key/value heads that keep everything, such as 0,3 (DuoAttention)",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| Ok(Box::new(eviction(options)?)),
            runner: run_eviction,
        },
    ]
}

/// `text` as one of `known`.
fn one_of<T: Copy>(options: &Options, name: &str, known: &[(&str, T)]) -> Result<Option<T>> {
    let Some(text) = options.get::<String>(name)? else { return Ok(None) };
    match known.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(Some(*value)),
        None => {
            let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
            Err(AttnError::value(format!("option `{name}`"), format!("`{text}`"), words.join(", ")))
        }
    }
}

/// An option that only some policies have.
fn only_for<T>(name: &str, value: Option<T>, applies: bool, whom: &str) -> Result<Option<T>> {
    if value.is_some() && !applies {
        return Err(AttnError::unsupported(KvEviction::NAME, format!("`{name}` without {whom}")));
    }
    Ok(value)
}

fn eviction(options: &Options) -> Result<KvEviction> {
    let budget = at_least_1(options, "budget", 512)?;
    let (n_sinks, n_recent) = (options.get("n_sinks")?, options.get("n_recent")?);
    let (window, kernel) = (options.get("window")?, options.get("kernel")?);
    let pooling = one_of(options, "pooling", &[("mean", Pooling::Mean), ("max", Pooling::Max)])?;
    let safeguard = options.get("safeguard")?;
    let kinds = [
        ("head", Share::Head),
        ("layer", Share::Layer),
        ("budget", Share::Budget { safeguard: safeguard.unwrap_or(0.2) }),
    ];
    let share = one_of(options, "share", &kinds)?;
    let full_heads = list(options, "full_heads")?;
    let policies = [
        ("h2o", EvictionPolicy::h2o as fn(usize, usize) -> EvictionPolicy),
        ("observed-attention", |_, budget| EvictionPolicy::observed_attention(budget)),
        ("snapkv", |_, budget| EvictionPolicy::snap_kv(32, 5, budget)),
        ("tova", |_, budget| EvictionPolicy::tova(budget)),
        ("streaming-llm", |_, budget| EvictionPolicy::streaming_llm(4, budget)),
        ("key-norm", |_, budget| EvictionPolicy::key_norm(budget)),
        ("key-diff", |_, budget| EvictionPolicy::key_diff(budget)),
        ("duo", |_, budget| EvictionPolicy::duo(Vec::new(), 4, budget)),
    ];
    let named = one_of(options, "policy", &policies)?.unwrap_or(EvictionPolicy::h2o);
    let mut policy = named(budget / 2, budget);
    let window = only_for("window", window, is_window(&policy), "policy=snapkv")?;
    let kernel = only_for("kernel", kernel, is_window(&policy), "policy=snapkv")?;
    let pooling = only_for("pooling", pooling, is_window(&policy), "policy=snapkv")?;
    if let Importance::WindowMass { window: w, kernel: k, pooling: p } = &mut policy.importance {
        *w = window.unwrap_or(*w);
        *k = kernel.unwrap_or(*k);
        *p = pooling.unwrap_or(*p);
        policy.n_recent = *w;
    }
    policy.n_sinks = n_sinks.unwrap_or(policy.n_sinks);
    policy.n_recent = n_recent.unwrap_or(policy.n_recent);
    policy.share = share.unwrap_or(policy.share);
    policy.full_heads = full_heads;
    let shares = matches!(policy.share, Share::Budget { .. });
    only_for("safeguard", safeguard, shares, "share=budget")?;
    policy.check(usize::MAX)?;
    Ok(KvEviction { policy, softmax_scale: options.get("scale")? })
}

fn is_window(policy: &EvictionPolicy) -> bool {
    matches!(policy.importance, Importance::WindowMass { .. })
}

/// Token by token, or, with `q_next (batch, n_heads_q, m, head_dim)`, after a prompt: `q`, `k`, `v` are the prompt, and
/// `q_next` attends what survives of it. Gives `o`, `lse`, the positions `kept (batch, n_heads_kv, most)`, ascending and
/// filled up with -1 where heads keep fewer, and `score (batch, n_heads_kv, n_kv)`, what each position was worth. With
/// `kept` given, these positions are attended, and there is no `score`.
fn run_eviction(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let Some(q_next) = tensors.get("q_next") else { return run_qkv(entry, options, tensors) };
    tensors.only(entry.name, &["q", "k", "v", "q_next", "kept"])?;
    let eviction = eviction(options)?;
    let x = tensors.qkv()?;
    let (s, mut given) = (x.shape(), NamedTensors::default());
    let survivors = match tensors.get("kept") {
        Some(kept) => given_survivors(kept, [s.batch, s.n_heads_kv])?,
        None => {
            let survivors = eviction.compress(&x)?;
            let worth = survivors.worth.iter().flatten().map(|worth| *worth as f32).collect();
            let worth = NamedTensor::f32("score", &[s.batch, s.n_heads_kv, s.n_kv], worth)?;
            given.0.insert("score".into(), worth);
            survivors
        }
    };
    let most = survivors.positions.iter().map(Vec::len).max().unwrap_or(0);
    let padded = |kept: &Vec<usize>| {
        let kept: Vec<i32> =
            kept.iter().map(|at| *at as i32).chain(std::iter::repeat(-1)).take(most).collect();
        kept
    };
    let kept = TensorData::I32(survivors.positions.iter().flat_map(padded).collect());
    given.0.insert("kept".into(), NamedTensor { shape: vec![s.batch, s.n_heads_kv, most], data: kept });

    let next = Qkv::new(q_next.view("q_next")?, *x.k(), *x.v())?;
    let (mut out, mut lse) = (output_like(&next), vec![f32::NAN; next.shape().rows()]);
    eviction.attend(next, &survivors, out.as_out()?, Some(&mut lse))?;
    let [batch, heads, n_q, _] = next.shape().out();
    given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    given.0.insert("o".into(), out);
    Ok(given)
}

/// The survivors that a tensor `(batch, n_heads_kv, most)` lists; negative entries are none.
fn given_survivors(kept: &NamedTensor, [batch, heads]: [usize; 2]) -> Result<Survivors> {
    let data = kept.integers("kept")?;
    let &[b, h, most] = kept.shape.as_slice() else {
        let expected = "(batch, n_heads_kv, most)";
        return Err(AttnError::value("kept's shape", format!("{:?}", kept.shape), expected));
    };
    for (axis, found, expected) in [("batch", b, batch), ("n_heads_kv", h, heads)] {
        if found != expected {
            return Err(AttnError::shape("kept", axis, found, expected));
        }
    }
    let list = |at: usize| {
        let list = &data[at * most..(at + 1) * most];
        list.iter().filter_map(|at| usize::try_from(*at).ok()).collect()
    };
    Ok(Survivors::new((0..batch * heads).map(list).collect()))
}
