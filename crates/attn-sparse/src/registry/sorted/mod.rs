//! Variants that sort or cluster tokens.

mod runs;

use super::length;
use crate::sorted::{Reformer, Routing, Sinkhorn, SinkhornKind};
use attn_core::registry::{Entry, OptionSpec, Options};
use attn_core::{AttnError, Family, Result};

const CAUSAL: OptionSpec = OptionSpec {
    name: "causal",
    default: "false",
    help: "no later key is attended; not strictly causal, as groups depend on all tokens (true|false)",
};

const SHARED_QK: OptionSpec = OptionSpec {
    name: "shared_qk",
    default: "false",
    help: "keys are the queries scaled to unit length, those given are not read (true|false)",
};

const SELF_LOGIT: OptionSpec = OptionSpec {
    name: "self_logit",
    default: "-50000",
    help: "with shared_qk, the score of a token with itself",
};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: Reformer::NAME,
            family: Family::Sparse,
            summary: "Chunks of tokens sorted by random hashes, several rounds (Kitaev et al. 2020)",
            options: &[
                CAUSAL,
                OptionSpec { name: "bucket_size", default: "64", help: "tokens of a chunk" },
                OptionSpec { name: "n_hashes", default: "4", help: "rounds of hashing" },
                OptionSpec {
                    name: "n_buckets",
                    default: "",
                    help: "buckets of a round, or even factors as 64x64; default about n / bucket_size",
                },
                OptionSpec {
                    name: "attend_across_buckets",
                    default: "true",
                    help: "tokens of other buckets in the same chunks are seen (true|false)",
                },
                OptionSpec {
                    name: "allow_duplicate_attention",
                    default: "true",
                    help: "a pair that several rounds meet counts several times (true|false)",
                },
                SHARED_QK,
                SELF_LOGIT,
                OptionSpec { name: "seed", default: "0", help: "what rotations are drawn with" },
                OptionSpec::SCALE,
            ],
            constructor: |options| Ok(Box::new(reformer(options)?)),
            runner: runs::reformer,
        },
        Entry {
            name: Routing::NAME,
            family: Family::Sparse,
            summary: "Clusters of the queries and keys nearest to centroids (Roy et al. 2021)",
            options: &[
                CAUSAL,
                OptionSpec {
                    name: "num_clusters",
                    default: "",
                    help: "clusters; default half of sqrt(n), or as the centroids say",
                },
                OptionSpec {
                    name: "window",
                    default: "",
                    help: "queries and keys that a cluster takes; default n / num_clusters",
                },
                SHARED_QK,
                SELF_LOGIT,
                OptionSpec {
                    name: "mean_eps",
                    default: "0",
                    help: "added to the number of clusters that a query's outputs are divided by",
                },
                OptionSpec { name: "seed", default: "0", help: "what centroids are drawn with" },
                OptionSpec::SCALE,
            ],
            constructor: |options| Ok(Box::new(routing(options)?)),
            runner: runs::routing,
        },
        Entry {
            name: Sinkhorn::NAME,
            family: Family::Sparse,
            summary: "The own bucket and mixtures of sorted ones (Tay et al. 2020)",
            options: &[
                OptionSpec { name: "causal", default: "", help: "the kind `causal`, or not (true|false)" },
                OptionSpec {
                    name: "kind",
                    default: "",
                    help: "soft, causal or sortcut; default soft, or as `causal` says",
                },
                OptionSpec {
                    name: "bucket_size",
                    default: "",
                    help: "tokens of a bucket; default the power of two from sqrt(n) on",
                },
                OptionSpec {
                    name: "n_top",
                    default: "1",
                    help: "buckets chosen by the kinds causal and sortcut",
                },
                OptionSpec {
                    name: "temperature",
                    default: "0.75",
                    help: "what logits of the sort network are divided by",
                },
                OptionSpec { name: "iterations", default: "8", help: "normalisations of the kind soft" },
                OptionSpec::SCALE,
            ],
            constructor: |options| Ok(Box::new(sinkhorn(options)?)),
            runner: runs::sinkhorn,
        },
    ]
}

fn reformer(options: &Options) -> Result<Reformer> {
    let default = Reformer::default();
    let n_buckets = options.get::<String>("n_buckets")?.unwrap_or_default();
    let factor = |text: &str| text.trim().parse::<usize>().ok().filter(|f| *f > 0 && f.is_multiple_of(2));
    let factors: Option<Vec<usize>> =
        if n_buckets.is_empty() { Some(Vec::new()) } else { n_buckets.split('x').map(factor).collect() };
    let wrong = || {
        AttnError::value("option `n_buckets`", format!("`{n_buckets}`"), "even factors of a number, as 64x64")
    };
    Ok(Reformer {
        bucket_size: super::at_least_1(options, "bucket_size", default.bucket_size)?,
        n_hashes: super::at_least_1(options, "n_hashes", default.n_hashes)?,
        n_buckets: factors.ok_or_else(wrong)?,
        causal: options.get_or("causal", false)?,
        attend_across_buckets: options.get_or("attend_across_buckets", true)?,
        allow_duplicate_attention: options.get_or("allow_duplicate_attention", true)?,
        shared_qk: options.get_or("shared_qk", false)?,
        self_logit: options.get_or("self_logit", default.self_logit)?,
        seed: options.get_or("seed", 0)?,
        softmax_scale: options.get("scale")?,
    })
}

fn routing(options: &Options) -> Result<Routing> {
    Ok(Routing {
        num_clusters: length(options, "num_clusters")?,
        window: length(options, "window")?,
        causal: options.get_or("causal", false)?,
        shared_qk: options.get_or("shared_qk", false)?,
        self_logit: options.get_or("self_logit", Routing::default().self_logit)?,
        mean_eps: options.get_or("mean_eps", 0.0)?,
        seed: options.get_or("seed", 0)?,
        softmax_scale: options.get("scale")?,
    })
}

fn sinkhorn(options: &Options) -> Result<Sinkhorn> {
    let default = Sinkhorn::default();
    let causal: Option<bool> = options.get("causal")?;
    let kind = match (options.get::<String>("kind")?.as_deref(), causal) {
        (None, Some(true)) | (Some("causal"), None | Some(true)) => SinkhornKind::Causal,
        (None, _) | (Some("soft"), None | Some(false)) => SinkhornKind::Soft,
        (Some("sortcut"), None | Some(false)) => SinkhornKind::SortCut,
        (Some(kind @ ("soft" | "causal" | "sortcut")), Some(causal)) => {
            return Err(AttnError::unsupported(
                Sinkhorn::NAME,
                format!("`causal={causal}` with `kind={kind}`"),
            ));
        }
        (Some(other), _) => {
            return Err(AttnError::value("option `kind`", format!("`{other}`"), "soft, causal or sortcut"));
        }
    };
    Ok(Sinkhorn {
        kind,
        bucket_size: length(options, "bucket_size")?,
        n_top: super::at_least_1(options, "n_top", default.n_top)?,
        temperature: options.get_or("temperature", default.temperature)?,
        iterations: super::at_least_1(options, "iterations", default.iterations)?,
        softmax_scale: options.get("scale")?,
    })
}
