//! Which variants take part, configured for the sweep's mode.

use crate::{LabError, Result, registry};
use attn_core::registry::{Entry, Options};
use attn_core::{Attention, AttnError, AttnShape, Causality, DType, Family};

/// What every variant of a sweep has to do.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// A query sees no later key.
    pub causal: bool,
    /// Storage type.
    pub dtype: DType,
    /// Sizes, of any length.
    pub shape: AttnShape,
}

/// A variant that takes part.
pub struct Chosen {
    /// Its registry entry.
    pub entry: Entry,
    /// All of its options.
    pub options: Options,
    /// Built from them.
    pub attention: Box<dyn Attention>,
}

/// What `usual` stands for: a few of each family, so that a sweep of minutes reaches long sequences.
const USUAL: &[&str] = &[
    "flash",
    "naive",
    "sliding-window",
    "sink-window",
    "chunked-causal",
    "linear-elu",
    "retnet",
    "gla",
    "gated-deltanet",
    "h-transformer-1d",
];

/// The variants called by one of the names that stand for many.
fn many(name: &str) -> Option<Vec<Entry>> {
    let all = registry::all();
    let family: Option<Family> = name.parse().ok();
    let taken = |entry: &Entry| match (name, family) {
        ("all", _) => true,
        ("usual", _) => USUAL.contains(&entry.name),
        (_, Some(family)) => entry.family == family,
        _ => false,
    };
    let chosen: Vec<Entry> = all.into_iter().filter(taken).collect();
    if chosen.is_empty() { None } else { Some(chosen) }
}

/// The variants called by `names` (comma-separated, or one word for many: `all`, `usual`, a family), with options
/// `variant.key=value`; and, for such a word, why others were left out.
///
/// # Errors
/// [`LabError`] for unknown variants or options, and for a named variant that cannot do what is demanded.
pub fn choose(names: &str, set: &[String], demand: &Demand) -> Result<(Vec<Chosen>, Vec<String>)> {
    let many = many(names.trim());
    let all = many.is_some();
    let mut entries = many.unwrap_or_default();
    if !all {
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let entry = registry::get(name)?;
            if entries.iter().all(|known| known.name != entry.name) {
                entries.push(entry);
            }
        }
    }
    if entries.is_empty() {
        return Err(LabError::Argument(
            "--variants names no variant; expected `usual`, `all`, a family, or names of `attn list`".into(),
        ));
    }
    let given = given_options(set, &entries)?;
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    for entry in entries {
        let of_this: Vec<_> = given.iter().filter(|(name, ..)| *name == entry.name).collect();
        let own_options = of_this.iter().fold(Options::new(), |all, (_, key, value)| all.with(key, value));
        let why = match configure(entry, own_options, demand.causal) {
            Ok(variant) => match refusal(&variant, demand) {
                None => {
                    chosen.push(variant);
                    continue;
                }
                Some(why) => format!("{} {why}", entry.name),
            },
            Err(AttnError::Unsupported { variant, what }) => format!("{variant} does not support {what}"),
            Err(other) => return Err(other.into()),
        };
        if !all || !of_this.is_empty() {
            return Err(LabError::Argument(format!("variant {why}")));
        }
        left_out.push(format!("left out: {why}"));
    }
    if chosen.is_empty() {
        return Err(LabError::Argument(format!("no variant can take part: {}", left_out.join("; "))));
    }
    Ok((chosen, left_out))
}

fn given_options(set: &[String], entries: &[Entry]) -> Result<Vec<(String, String, String)>> {
    let parse = |pair: &String| {
        let parts = pair.split_once('=').and_then(|(path, value)| Some((path.split_once('.')?, value)));
        let Some(((variant, key), value)) = parts else {
            return Err(LabError::Argument(format!("--set `{pair}`: expected variant.key=value")));
        };
        if entries.iter().all(|entry| entry.name != variant.trim()) {
            registry::get(variant.trim())?;
            return Err(LabError::Argument(format!("--set `{pair}`: {variant} is not among --variants")));
        }
        Ok((variant.trim().to_string(), key.trim().to_string(), value.trim().to_string()))
    };
    set.iter().map(parse).collect()
}

fn configure(entry: Entry, given: Options, causal: bool) -> attn_core::Result<Chosen> {
    let mut options = entry.defaults();
    if entry.options.iter().any(|option| option.name == "causal") {
        options = options.with("causal", causal);
    }
    options.0.extend(given.0);
    Ok(Chosen { attention: entry.build(&options)?, entry, options })
}

/// Why a variant cannot do what is demanded.
fn refusal(variant: &Chosen, demand: &Demand) -> Option<String> {
    let profile = variant.attention.profile();
    match (profile.causality, demand.causal) {
        (Causality::Strict | Causality::Masked, false) => {
            return Some("is causal as configured; sweep it with --causal".into());
        }
        (Causality::Bidirectional, true) => {
            return Some("is bidirectional as configured; sweep it with --bidirectional".into());
        }
        _ => {}
    }
    if !profile.dtypes.contains(&demand.dtype) {
        let known: Vec<String> = profile.dtypes.iter().map(ToString::to_string).collect();
        return Some(format!("does not read {}; it reads {}", demand.dtype, known.join(", ")));
    }
    let grouped = demand.shape.group_size() > 1;
    (grouped && !profile.grouped_heads).then(|| "has no grouped heads".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(causal: bool) -> Demand {
        Demand { causal, dtype: DType::F32, shape: AttnShape::square(2, 64, 64) }
    }

    #[test]
    fn the_mode_reaches_every_variant() {
        for causal in [false, true] {
            let (chosen, _) = choose("all", &[], &demand(causal)).unwrap();
            assert!(chosen.iter().any(|c| c.entry.name == "flash"));
            assert!(chosen.iter().all(|c| c.attention.profile().causality.is_causal() == causal));
        }
    }

    #[test]
    fn one_word_stands_for_many() {
        let names = |word: &str, causal| -> Vec<&str> {
            choose(word, &[], &demand(causal)).unwrap().0.iter().map(|c| c.entry.name).collect()
        };
        assert_eq!(names("usual", true), USUAL);
        assert!(names("sparse", true).contains(&"sink-window") && !names("sparse", true).contains(&"flash"));
        let (_, left_out) = choose("usual", &[], &demand(false)).unwrap();
        assert!(left_out.iter().any(|why| why.contains("sink-window")), "{left_out:?}");
    }

    #[test]
    fn options_reach_their_variant_alone() {
        let set = ["flash.softcap=30".to_string()];
        let (chosen, _) = choose("naive, flash,flash", &set, &demand(true)).unwrap();
        assert_eq!(chosen.iter().map(|c| c.entry.name).collect::<Vec<_>>(), ["naive", "flash"]);
        assert_eq!(chosen[0].options.0.get("softcap"), None);
        assert_eq!(chosen[1].options.0["softcap"], "30");
    }

    #[test]
    fn mistakes_are_named() {
        let complaint = |names: &str, set: &str| {
            let set: Vec<String> = (!set.is_empty()).then(|| set.to_string()).into_iter().collect();
            choose(names, &set, &demand(true)).err().unwrap().to_string()
        };
        assert!(complaint("flsh", "").contains("flash"));
        assert!(complaint("", "").contains("--variants"));
        assert!(complaint("flash", "flash.x=1").contains("`x`"));
        assert!(complaint("flash", "naive.scale=1").contains("not among"));
        assert!(complaint("flash", "scale=1").contains("variant.key=value"));
        assert!(complaint("flash", "flash.causal=false").contains("--bidirectional"));
    }
}
