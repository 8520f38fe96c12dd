//! Options of a variant, as text.

use crate::{AttnError, Result};
use std::collections::BTreeMap;

/// `key=value` options, as given.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Options(pub BTreeMap<String, String>);

impl Options {
    /// No options: all defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses `key=value` pairs.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a pair without `=` or a key given twice.
    pub fn parse<'a>(pairs: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut options = Self::new();
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| AttnError::value("option", pair, "key=value"))?;
            if options.0.insert(key.trim().into(), value.trim().into()).is_some() {
                return Err(AttnError::value(format!("option `{key}`"), "given twice", "once"));
            }
        }
        Ok(options)
    }

    /// With one more option; an existing value is replaced.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.0.insert(key.into(), value.to_string());
        self
    }

    /// The value of `key`, or `None` if it is absent, empty or `none`.
    ///
    /// # Errors
    /// [`AttnError::Value`] naming the option and what it should look like.
    pub fn get<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        match self.0.get(key).map(String::as_str) {
            None | Some("" | "none") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                let wanted = std::any::type_name::<T>().rsplit("::").next().unwrap_or("value");
                AttnError::value(format!("option `{key}`"), format!("`{text}`"), format!("a {wanted}"))
            }),
        }
    }

    /// The value of `key`, or `default`.
    ///
    /// # Errors
    /// As [`Options::get`].
    pub fn get_or<T: std::str::FromStr>(&self, key: &str, default: T) -> Result<T> {
        Ok(self.get(key)?.unwrap_or(default))
    }
}
