//! Masks of whole sequences: padding, prefixes, spans, documents, buckets, dilated windows, heads that differ.

use super::named::{CAUSAL, list, option, ranges, run};
use super::{at_least_1, attention, build, length};
use crate::{
    BidirectionalSpans, Branch, DilatedWindow, DocumentLayout, Documents, HeadChoice, LocalBuckets, LongNet,
    Padded, Pattern, PerHead, PrefixLm, SinkWindow, SlidingWindow, SpanLayout, SparseAttention,
};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, run_qkv};
use attn_core::{AttnError, Family, Result};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: Padded::NAME,
            family: Family::Sparse,
            summary: "Sequences of different lengths, padded at the end; causal unless told otherwise",
            options: const {
                &[
                    CAUSAL,
                    option("kv_lengths", "", "keys of each batch entry, or one length for all: 64,29"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let (lengths, causal) = (list(options, "kv_lengths")?, options.get_or("causal", true)?);
                build(options, Padded { lengths, causal })
            },
            runner: run_qkv,
        },
        Entry {
            name: PrefixLm::NAME,
            family: Family::Sparse,
            summary: "A prefix that reads itself, then causal text (Dong et al. 2019; Raffel et al. 2020)",
            options: const {
                &[
                    option("prefix", "256", "length of the prefix in each batch entry, or one for all"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let prefix = list(options, "prefix")?;
                build(options, PrefixLm { prefix: if prefix.is_empty() { vec![256] } else { prefix } })
            },
            runner: run_qkv,
        },
        Entry {
            name: BidirectionalSpans::NAME,
            family: Family::Sparse,
            summary: "Causal text with spans (images) that read themselves both ways",
            options: const {
                &[
                    option("spans", "", "ranges of positions: 4..20,40..48; or the tensor span_ids"),
                    option("span_len", "64", "positions of a span, if they are not given"),
                    option("span_every", "256", "from the start of one span to that of the next"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, spans(options)?),
            runner: run_spans,
        },
        Entry {
            name: Documents::NAME,
            family: Family::Sparse,
            summary: "Packed documents, each sees itself alone; causal unless told otherwise",
            options: const {
                &[
                    CAUSAL,
                    option("document_len", "1024", "positions of a document, if no ends are given"),
                    option(
                        "cu_seqlens",
                        "",
                        "offsets of the documents' ends: 0,10,64; or the tensor document_ids",
                    ),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, documents(options)?),
            runner: run_documents,
        },
        Entry {
            name: LocalBuckets::NAME,
            family: Family::Sparse,
            summary: "The query's own bucket of positions and its neighbours (as in Roy et al. 2021)",
            options: const {
                &[
                    OptionSpec::CAUSAL,
                    option("bucket", "256", "positions of a bucket"),
                    option("back", "1", "buckets seen before the query's own"),
                    option("forward", "1", "buckets seen behind it, unless causal"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let causal = options.get_or("causal", false)?;
                let bucket = at_least_1(options, "bucket", 256)?;
                let (back, forward) = (options.get_or("back", 1)?, options.get_or("forward", 1)?);
                build(options, LocalBuckets { bucket, back, forward, causal })
            },
            runner: run_qkv,
        },
        Entry {
            name: DilatedWindow::NAME,
            family: Family::Sparse,
            summary: "Every r-th key near the query (Beltagy et al. 2020)",
            options: const {
                &[
                    OptionSpec::CAUSAL,
                    option("window", "256", "keys seen: in all if causal, else on each side besides its own"),
                    option(
                        "dilation",
                        "4",
                        "from one key seen to the next; one for all heads, or one each: 1,1,4,4",
                    ),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let causal = options.get_or("causal", false)?;
                let window = options.get_or("window", 256)?;
                if causal && window == 0 {
                    return Err(AttnError::value("option `window`", 0, "at least 1 with `causal=true`"));
                }
                let dilation: Vec<usize> = list(options, "dilation")?;
                if dilation.contains(&0) {
                    return Err(AttnError::value("option `dilation`", 0, "at least 1"));
                }
                let dilation = if dilation.is_empty() { vec![4] } else { dilation };
                build(options, DilatedWindow { window, dilation: dilation.into(), causal })
            },
            runner: run_qkv,
        },
        Entry {
            name: "a-shape",
            family: Family::Sparse,
            summary: "The first keys and the last ones, in prefill (MInference, Jiang et al. 2024)",
            options: const {
                &[
                    option("n_sinks", "1024", "keys at the start that every later query sees"),
                    option("window", "4096", "last keys seen, the query's own included"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let n_sinks = options.get_or("n_sinks", 1024)?;
                let pattern = SinkWindow { n_sinks, window: at_least_1(options, "window", 4096)? };
                Ok(Box::new(attention(options, pattern)?.named("a-shape")))
            },
            runner: run_qkv,
        },
        Entry {
            name: "duo-attention",
            family: Family::Sparse,
            summary: "Some heads see all earlier keys, the others the first and the last ones (Xiao et al. 2024)",
            options: const {
                &[
                    option(
                        "full_heads",
                        "0.5",
                        "share of the key/value heads that see all, or query heads: 0,3",
                    ),
                    option("n_sinks", "64", "keys at the start that the other heads see"),
                    option("window", "256", "last keys that the other heads see, the query's own included"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| Ok(Box::new(duo(options)?)),
            runner: run_qkv,
        },
        Entry {
            name: "longnet",
            family: Family::Sparse,
            summary: "Every r-th position of long segments, for several of both, merged (LongNet, Ding et al. 2023)",
            options: const {
                &[
                    OptionSpec::CAUSAL,
                    option("segments", "2048,8192,32768", "positions of a segment, one a branch"),
                    option("dilations", "1,4,16", "from one position kept to the next, one a branch"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| Ok(Box::new(longnet(options)?)),
            runner: run_qkv,
        },
        Entry {
            name: "sink-logit",
            family: Family::Sparse,
            summary: "A learned logit in the normaliser, and no value (gpt-oss, OpenAI 2025)",
            options: const {
                &[
                    CAUSAL,
                    option("window", "", "last keys seen, the query's own included; default all"),
                    option("sink", "0", "the logit of all heads, unless the tensor sinks gives one each"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| {
                let sink: f32 = options.get_or("sink", 0.0)?;
                Ok(Box::new(sink_logit(options)?.with_sinks([sink])))
            },
            runner: run_sinks,
        },
    ]
}

fn spans(options: &Options) -> Result<BidirectionalSpans> {
    let ranges = ranges(options, "spans")?;
    let (len, every) = (options.get_or("span_len", 64)?, at_least_1(options, "span_every", 256)?);
    let spans = match ranges.is_empty() {
        true => SpanLayout::Periodic { len, every },
        false => SpanLayout::Ranges(ranges),
    };
    Ok(BidirectionalSpans { spans })
}

fn run_spans(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "span_ids"])?;
    let mut pattern = spans(options)?;
    if let Some((_, ids)) = tensors.i32("span_ids")? {
        pattern.spans = SpanLayout::Ids(ids.to_vec());
    }
    run(&attention(options, pattern)?, tensors, None)
}

fn documents(options: &Options) -> Result<Documents> {
    let offsets: Vec<usize> = list(options, "cu_seqlens")?;
    let len = at_least_1(options, "document_len", 1024)?;
    let layout =
        if offsets.is_empty() { DocumentLayout::Equal(len) } else { DocumentLayout::Offsets(offsets) };
    Ok(Documents { layout, causal: options.get_or("causal", true)? })
}

fn run_documents(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "document_ids"])?;
    let mut pattern = documents(options)?;
    if let Some((_, ids)) = tensors.i32("document_ids")? {
        pattern.layout = DocumentLayout::Ids(ids.to_vec());
    }
    run(&attention(options, pattern)?, tensors, None)
}

fn duo(options: &Options) -> Result<SparseAttention<PerHead<SlidingWindow, SinkWindow>>> {
    let text = options.get_or("full_heads", "0.5".to_string())?;
    let heads = match text.parse() {
        Ok(share) if text.contains('.') => HeadChoice::Share(share),
        _ => HeadChoice::Listed(list(options, "full_heads")?),
    };
    if matches!(heads, HeadChoice::Share(share) if !(0.0..=1.0).contains(&share)) {
        return Err(AttnError::value("option `full_heads`", text, "a share from 0.0 to 1.0, or heads: 0,3"));
    }
    let second =
        SinkWindow { n_sinks: options.get_or("n_sinks", 64)?, window: at_least_1(options, "window", 256)? };
    let first = SlidingWindow::causal(usize::MAX);
    Ok(attention(options, PerHead { heads, first, second })?.named("duo-attention"))
}

fn longnet(options: &Options) -> Result<LongNet> {
    let given = |name: &str, default: &[usize]| -> Result<Vec<usize>> {
        let list = list(options, name)?;
        Ok(if list.is_empty() { default.to_vec() } else { list })
    };
    let (segments, dilations) = (given("segments", &[2048, 8192, 32768])?, given("dilations", &[1, 4, 16])?);
    if segments.len() != dilations.len() {
        let expected = format!("{}, as many as segments", segments.len());
        return Err(AttnError::value("number of dilations", dilations.len(), expected));
    }
    let branch = |(segment, dilation)| Branch { segment, dilation };
    let branches = segments.into_iter().zip(dilations).map(branch).collect();
    Ok(LongNet::new(branches, options.get_or("causal", false)?)?.with_scale(options.get("scale")?))
}

fn sink_logit(options: &Options) -> Result<SparseAttention<SlidingWindow>> {
    let causal = options.get_or("causal", true)?;
    let left = length(options, "window")?.unwrap_or(usize::MAX) - 1;
    let pattern = SlidingWindow { left, right: if causal { 0 } else { left } };
    Ok(attention(options, pattern)?.named("sink-logit"))
}

fn run_sinks(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "sinks"])?;
    let sink: f32 = options.get_or("sink", 0.0)?;
    let sinks = match tensors.f32("sinks")? {
        Some((_, sinks)) => sinks.to_vec(),
        None => vec![sink],
    };
    run(&sink_logit(options)?.with_sinks(sinks), tensors, None)
}
