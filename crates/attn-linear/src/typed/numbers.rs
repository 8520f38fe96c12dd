//! Typed inputs on borrowed numbers.

use super::InputsOf;
use crate::matrix_state::{Inputs, Per, StateAttention, StateVariant};
use attn_core::registry::Options;
use attn_core::{AttnError, Result, TensorView, View};

/// A tensor of a call on borrowed numbers.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// Rows `[batch, heads, n, width]`; q, k and v in any storage type, the others in f32.
    Rows(TensorView<'a>),
    /// `[heads, width]`, the same for all tokens.
    Heads(&'a [f32], usize),
}

impl<'a, X: Into<TensorView<'a>>> From<X> for Numbers<'a> {
    fn from(view: X) -> Self {
        Self::Rows(view.into())
    }
}

impl<V: StateVariant> StateAttention<V> {
    /// The variant with the options of its registry entry, `(name, value)`; those that are not given have their defaults.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that the variant does not have, or whose value makes no sense.
    pub fn configured<'o>(options: impl IntoIterator<Item = (&'o str, &'o str)>) -> Result<Self> {
        let mut all = Options::new();
        for (name, value) in options {
            if !V::OPTIONS.iter().any(|option| option.name == name) {
                let known: Vec<&str> = V::OPTIONS.iter().map(|option| option.name).collect();
                let name = format!("option `{name}` of {}", V::NAME);
                return Err(AttnError::value(name, "unknown", format!("one of: {}", known.join(", "))));
            }
            all = all.with(name, value);
        }
        V::from_options(&all).map(Self::new)
    }

    /// The engine's inputs of typed ones.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor that is missing, of another storage type, or has one row a head where the variant takes one
    /// a token.
    pub fn typed<'a>(&self, inputs: impl InputsOf<V, Tensor = Numbers<'a>>) -> Result<Inputs<'a>> {
        let all = inputs.fields();
        let rows = |name: &str| match all.iter().find(|(known, _)| *known == name) {
            Some((_, Numbers::Rows(view))) => Ok(*view),
            Some(_) => Err(AttnError::value(name, "one row a head", "rows of tokens")),
            None => Err(AttnError::Missing { name: name.into(), found: "the other inputs".into() }),
        };
        let (q, k, v) = (rows("q")?, rows("k")?, rows("v")?);
        let mut inputs = Inputs::new(q, k, v);
        let ([batch, _, tokens, _], keys) = (q.shape(), k.shape()[2]);
        for (name, numbers) in all.into_iter().filter(|(name, _)| !["q", "k", "v"].contains(name)) {
            let view = match numbers {
                Numbers::Rows(TensorView::F32(view)) => view,
                Numbers::Rows(other) => {
                    let found = other.dtype().to_string();
                    return Err(AttnError::DType { tensor: name.into(), found, expected: "f32".into() });
                }
                Numbers::Heads(data, width) => {
                    if width == 0 || !data.len().is_multiple_of(width) {
                        return Err(AttnError::shape(name, "width", width, "a divisor of its numbers"));
                    }
                    let is_key = V::EXTRAS.iter().any(|extra| extra.name == name && extra.per == Per::Key);
                    let rows = if is_key { keys } else { tokens };
                    View::new(name, data, [batch, data.len() / width, rows.max(1), width], [0, width, 0, 1])?
                }
            };
            inputs = inputs.with(name, view);
        }
        Ok(inputs)
    }
}
