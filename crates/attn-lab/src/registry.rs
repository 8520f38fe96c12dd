//! The variants of all crates.

use crate::Result;
use attn_core::registry::{Entry, Options, find};

/// Every registered variant, crate by crate.
pub fn all() -> Vec<Entry> {
    let crates =
        [attn_flash::registry(), attn_sparse::registry(), attn_linear::registry(), attn_hier::registry()];
    crates.into_iter().flatten().collect()
}

/// The variant called `name`.
///
/// # Errors
/// [`attn_core::AttnError::Value`] that lists the known names.
pub fn get(name: &str) -> Result<Entry> {
    Ok(*find(&all(), name)?)
}

/// Options from `key=value` arguments.
///
/// # Errors
/// [`attn_core::AttnError::Value`] for an argument without `=` or a key given twice.
pub fn options(pairs: &[String]) -> Result<Options> {
    Ok(Options::parse(pairs.iter().map(String::as_str))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_default_builds() {
        let entries = all();
        for (i, entry) in entries.iter().enumerate() {
            assert!(entries[..i].iter().all(|e| e.name != entry.name), "{} twice", entry.name);
            let built = entry.build(&Options::new()).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
            assert_eq!(built.name(), entry.name);
            assert_eq!(built.profile().family, entry.family, "{}", entry.name);
            entry
                .build(&entry.defaults())
                .unwrap_or_else(|e| panic!("{} with its defaults: {e}", entry.name));
        }
    }
}
