//! What a variant is given: q, k, v and named f32 tensors beside them.

use attn_core::registry::NamedTensors;
use attn_core::view::{Rows, contiguous_strides};
use attn_core::{AttnError, Qkv, Result, TensorView, View};
use std::ops::Range;

/// Width of a row of an extra input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// One number.
    One,
    /// `head_dim`.
    Key,
    /// `head_dim_v`.
    Value,
    /// One number, or one a key channel.
    OneOrKey,
    /// One number, or one a value channel.
    OneOrValue,
    /// Any; the variant checks it.
    Any,
}

/// What has a row of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    /// Every query.
    Token,
    /// Every key.
    Key,
    /// Every head.
    Head,
}

/// An input beside q, k and v. Its heads divide those of the output, as those of q, k and v do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extra {
    /// Its name.
    pub name: &'static str,
    /// What has a row.
    pub per: Per,
    /// Width of a row.
    pub width: Width,
}

impl Extra {
    /// A number for every query.
    pub const fn scalar(name: &'static str) -> Self {
        Self { name, per: Per::Token, width: Width::One }
    }

    /// A row of this width for every query.
    pub const fn rows(name: &'static str, width: Width) -> Self {
        Self { name, per: Per::Token, width }
    }

    /// A row of this width for every head.
    pub const fn head(name: &'static str, width: Width) -> Self {
        Self { name, per: Per::Head, width }
    }
}

/// Sizes of a problem, and the widths of the extra inputs given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Independent problems.
    pub batch: usize,
    /// Heads of the output: each has a state.
    pub heads: usize,
    /// Queries.
    pub tokens: usize,
    /// Keys and values.
    pub keys: usize,
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values.
    pub head_dim_v: usize,
    pub(super) widths: Vec<(&'static str, usize)>,
}

impl Sizes {
    /// Without extra inputs, as many keys as queries.
    pub fn new(batch: usize, heads: usize, tokens: usize, head_dim: usize, head_dim_v: usize) -> Self {
        Self { batch, heads, tokens, keys: tokens, head_dim, head_dim_v, widths: Vec::new() }
    }

    /// Width of the extra input `name`, if it is given.
    pub fn width(&self, name: &str) -> Option<usize> {
        self.widths.iter().find(|(known, _)| *known == name).map(|(_, width)| *width)
    }
}

/// q, k, v with heads of their own number, and the extra inputs.
///
/// Shapes: `q [batch, heads_q, tokens, head_dim]`, `k [batch, heads_k, keys, head_dim]`,
/// `v [batch, heads_v, keys, head_dim_v]`. The output has as many heads as the largest of them; the others divide it,
/// and consecutive output heads share theirs.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    extras: Vec<(&'static str, View<'a, f32>)>,
}

impl<'a> From<Qkv<'a>> for Inputs<'a> {
    fn from(x: Qkv<'a>) -> Self {
        Self::new(*x.q(), *x.k(), *x.v())
    }
}

impl<'a> Inputs<'a> {
    /// Without extra inputs.
    pub fn new(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
    ) -> Self {
        Self { q: q.into(), k: k.into(), v: v.into(), extras: Vec::new() }
    }

    /// With the extra input `name`, `[batch, heads, rows, width]`; a stride of 0 repeats a row.
    #[must_use]
    pub fn with(mut self, name: &'static str, view: View<'a, f32>) -> Self {
        self.extras.retain(|(known, _)| *known != name);
        self.extras.push((name, view));
        self
    }

    /// With `view` as `name`, if there is one.
    #[must_use]
    pub fn with_some(self, name: &'static str, view: Option<View<'a, f32>>) -> Self {
        match view {
            Some(view) => self.with(name, view),
            None => self,
        }
    }

    /// From tensors called `q`, `k`, `v` and those of `extras`. An extra input is `(batch, heads, rows, width)`; a number a
    /// row may leave out the last axis, the same row for all tokens of a head is `(heads)` or `(heads, width)`.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor that is missing, of another dtype or rank.
    pub fn of(tensors: &'a NamedTensors, extras: &[Extra]) -> Result<Self> {
        let [q, k, v] = ["q", "k", "v"].map(|name| tensors.require(name)?.view(name));
        let mut inputs = Self::new(q?, k?, v?);
        let (batch, tokens, keys) = (inputs.q.shape()[0], inputs.q.shape()[2], inputs.k.shape()[2]);
        let rows = |extra: &Extra| if extra.per == Per::Key { keys } else { tokens };
        for extra in extras {
            let Some((shape, data)) = tensors.f32(extra.name)? else { continue };
            let (shape, strides) = match (shape, extra.per) {
                (&[b, h, n, w], _) => {
                    let shape = [b, h, n, w];
                    (shape, contiguous_strides(shape))
                }
                (&[b, h, n], Per::Token | Per::Key) => ([b, h, n, 1], [h * n, n, 1, 1]),
                (&[h], _) => ([batch, h, rows(extra).max(1), 1], [0, 1, 0, 1]),
                (&[h, w], _) => ([batch, h, rows(extra).max(1), w], [0, w, 0, 1]),
                _ => {
                    let expected = match extra.per {
                        Per::Head => "(heads) or (heads, width)",
                        _ => "(batch, heads, length) or (batch, heads, length, width)",
                    };
                    return Err(AttnError::value(
                        format!("{}'s shape", extra.name),
                        format!("{shape:?}"),
                        expected,
                    ));
                }
            };
            inputs.extras.push((extra.name, View::new(extra.name, data, shape, strides)?));
        }
        Ok(inputs)
    }

    /// The sizes, checked against `extras`: every extra input is one of them and fits.
    ///
    /// # Errors
    /// [`AttnError`] naming what does not fit.
    pub fn sizes(&self, variant: &str, extras: &[Extra]) -> Result<Sizes> {
        let (q, k, v) = (self.q.shape(), self.k.shape(), self.v.shape());
        let heads = q[1].max(k[1]).max(v[1]);
        let equal = |tensor: &str, axis, found, expected: usize| {
            if found == expected { Ok(()) } else { Err(AttnError::shape(tensor, axis, found, expected)) }
        };
        let divides = |tensor: &str, found: usize| {
            let fits = if found == 0 { heads == 0 } else { heads.is_multiple_of(found) };
            if fits {
                return Ok(());
            }
            Err(AttnError::shape(tensor, "heads", found, format!("a divisor of the output's {heads} heads")))
        };
        for (name, shape) in [("k", k), ("v", v)] {
            equal(name, "batch", shape[0], q[0])?;
            equal(name, "n_kv", shape[2], k[2])?;
        }
        equal("k", "head_dim", k[3], q[3])?;
        for (name, shape) in [("q", q), ("k", k), ("v", v)] {
            divides(name, shape[1])?;
            if shape[3] == 0 {
                return Err(AttnError::shape(name, "width", 0, "at least 1"));
            }
        }
        for (name, view) in [("k", &self.k), ("v", &self.v)] {
            if view.dtype() != self.q.dtype() {
                let (found, expected) = (view.dtype().to_string(), format!("{} (as in q)", self.q.dtype()));
                return Err(AttnError::DType { tensor: name.into(), found, expected });
            }
        }
        let mut widths = Vec::new();
        for (name, view) in &self.extras {
            let Some(extra) = extras.iter().find(|extra| extra.name == *name) else {
                return Err(AttnError::unsupported(variant, format!("an input `{name}`")));
            };
            let [batch, own, rows, width] = view.shape();
            equal(name, "batch", batch, q[0])?;
            divides(name, own)?;
            match extra.per {
                Per::Key => equal(name, "length", rows, k[2])?,
                Per::Token => equal(name, "length", rows, q[2])?,
                // Without queries there is a row all the same.
                Per::Head => equal(name, "length", rows, q[2].max(1))?,
            }
            let fits = match extra.width {
                Width::One => width == 1,
                Width::Key => width == q[3],
                Width::Value => width == v[3],
                Width::OneOrKey => width == 1 || width == q[3],
                Width::OneOrValue => width == 1 || width == v[3],
                Width::Any => width > 0,
            };
            if !fits {
                let expected = format!("{:?} (head_dim {}, head_dim_v {})", extra.width, q[3], v[3]);
                return Err(AttnError::shape(*name, "width", width, expected));
            }
            widths.push((*name, width));
        }
        let (tokens, keys) = (q[2], k[2]);
        Ok(Sizes { batch: q[0], heads, tokens, keys, head_dim: q[3], head_dim_v: v[3], widths })
    }

    /// The extra input `name`, if it is given.
    pub fn extra(&self, name: &str) -> Option<View<'a, f32>> {
        self.extras.iter().find(|(known, _)| *known == name).map(|(_, view)| *view)
    }

    /// Some tokens and keys of all of them.
    pub(super) fn narrow(&self, extras: &[Extra], tokens: Range<usize>, keys: Range<usize>) -> Self {
        let per = |name: &str| extras.iter().find(|extra| extra.name == name).map(|extra| extra.per);
        let own = |name: &str, view: &View<'a, f32>| match per(name) {
            Some(Per::Key) => view.narrow(keys.clone()),
            // All rows are the same, and one is there even without tokens.
            Some(Per::Head) => view.narrow(0..tokens.len().max(1)),
            _ => view.narrow(tokens.clone()),
        };
        let extras = self.extras.iter().map(|(name, view)| (*name, own(name, view))).collect();
        let (q, k) = (self.q.narrow(tokens.clone()), self.k.narrow(keys.clone()));
        Self { q, k, v: self.v.narrow(keys.clone()), extras }
    }

    /// Names and shapes of the extra inputs.
    pub(super) fn extra_shapes(&self) -> impl Iterator<Item = (&'static str, [usize; 4])> {
        self.extras.iter().map(|(name, view)| (*name, view.shape()))
    }

    /// The extra inputs' rows of one output head.
    pub(super) fn head_extras(
        &self,
        heads: usize,
        batch: usize,
        head: usize,
    ) -> Vec<(&'static str, Rows<'a, f32>)> {
        let rows = |view: &View<'a, f32>| view.head(batch, head / (heads / view.shape()[1]));
        self.extras.iter().map(|(name, view)| (*name, rows(view))).collect()
    }
}
