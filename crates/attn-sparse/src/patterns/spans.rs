//! Causal text with spans that read themselves in both directions, as decoders of text and images use them:
//! `A(i) = { j <= p, or p and j in one span }`, with `p = i + n_kv - n_q`.

use super::positions::of_queries;
use crate::Pattern;
use crate::pairs::{Alike, count_pairs};
use attn_core::mask::{Align, Band, Or, Spans};
use attn_core::{AttnError, AttnShape, Growth, Result};
use std::ops::Range;

/// Keys up to the query, and the query's own span. Time `O(n^2)`.
///
/// Not causal in the strict sense: a token of a span reads the whole of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BidirectionalSpans {
    /// Where the spans lie.
    pub spans: SpanLayout,
}

/// Where spans lie among the positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpanLayout {
    /// The first `len` positions of every `every`: images of one size at a steady pace.
    Periodic {
        /// Positions of a span.
        len: usize,
        /// From the start of one span to the start of the next; at least 1.
        every: usize,
    },
    /// Ascending, disjoint ranges of positions.
    Ranges(Vec<Range<usize>>),
    /// For each key position the id of its span, negative for none: `[n_kv]`, or `[batch, n_kv]`, row-major.
    Ids(Vec<i32>),
}

impl SpanLayout {
    /// The ids of the key positions.
    fn ids(&self, n_kv: usize) -> Result<Vec<i32>> {
        match self {
            Self::Periodic { every: 0, .. } => Err(AttnError::value("span_every", 0, "at least 1")),
            Self::Periodic { len, every } => {
                Ok((0..n_kv).map(|j| if j % every < *len { (j / every) as i32 } else { -1 }).collect())
            }
            Self::Ranges(ranges) => {
                let (mut ids, mut before) = (vec![-1; n_kv], 0);
                for (id, range) in ranges.iter().enumerate() {
                    if range.start < before || range.end < range.start || range.end > n_kv {
                        let expected = format!("ascending, disjoint, at most n_kv = {n_kv}");
                        return Err(AttnError::value(format!("spans[{id}]"), format!("{range:?}"), expected));
                    }
                    ids[range.clone()].fill(id as i32);
                    before = range.end;
                }
                Ok(ids)
            }
            Self::Ids(ids) => Ok(ids.clone()),
        }
    }
}

impl Pattern for BidirectionalSpans {
    type Mask = Or<Band, Spans>;

    const NAME: &'static str = "causal-with-bidirectional-spans";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let ids = self.spans.ids(shape.n_kv)?;
        let spans = Spans::new(&of_queries("span_ids", &ids, shape)?, &ids, shape)?;
        Ok(Or(Band::causal(shape, Align::BottomRight), spans))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let alike = Alike { batch: !matches!(self.spans, SpanLayout::Ids(_)), heads: true };
        self.mask(shape).map_or(0, |mask| count_pairs(&mask, shape, alike))
    }

    fn is_causal(&self) -> bool {
        false
    }

    fn growth(&self) -> Growth {
        Growth::Quadratic
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}
