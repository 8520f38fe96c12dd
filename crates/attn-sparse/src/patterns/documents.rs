//! Packed documents: `A(i) = { j : doc(j) = doc(p) }`, causal also `j <= p`, with `p = i + n_kv - n_q`.
//!
//! The same as attending each document by itself. Positions go on over the documents; whether they restart in each is the
//! business of the rotary embedding.

use super::positions::of_queries;
use crate::Pattern;
use attn_core::mask::{Align, And, Band, Spans};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
use std::collections::HashMap;

/// Keys of the query's own document. Time `O(sum of document lengths squared)`; tiles between documents are never visited.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_sparse::{DocumentLayout, Documents, Pattern};
///
/// let packed = Documents { layout: DocumentLayout::Offsets(vec![0, 3, 5]), causal: true };
/// assert_eq!(packed.pairs(&AttnShape::square(1, 5, 8)), (1 + 2 + 3) + (1 + 2));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    /// Where documents end.
    pub layout: DocumentLayout,
    /// No key after the query's position.
    pub causal: bool,
}

/// Which positions belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentLayout {
    /// Documents of so many positions, the last one may be shorter; at least 1.
    Equal(usize),
    /// Ascending offsets from 0 to the number of keys (`cu_seqlens`): document `t` has the positions from offset `t` to
    /// offset `t + 1`.
    Offsets(Vec<usize>),
    /// For each key position the id of its document, negative for none (padding, which sees nothing and is not seen):
    /// `[n_kv]`, or `[batch, n_kv]`, row-major.
    Ids(Vec<i32>),
}

impl DocumentLayout {
    /// The ids of the key positions.
    fn ids(&self, n_kv: usize) -> Result<Vec<i32>> {
        match self {
            Self::Equal(0) => Err(AttnError::value("document_len", 0, "at least 1")),
            Self::Equal(len) => Ok((0..n_kv).map(|j| (j / len) as i32).collect()),
            Self::Offsets(offsets) => {
                let ends = (offsets.first(), offsets.last());
                if ends != (Some(&0), Some(&n_kv)) || !offsets.is_sorted() {
                    let expected = format!("ascending from 0 to n_kv = {n_kv}");
                    return Err(AttnError::value("cu_seqlens", format!("{offsets:?}"), expected));
                }
                let documents = offsets.windows(2).zip(0..);
                Ok(documents.flat_map(|(ends, id)| std::iter::repeat_n(id, ends[1] - ends[0])).collect())
            }
            Self::Ids(ids) => Ok(ids.clone()),
        }
    }
}

impl Pattern for Documents {
    type Mask = And<Band, Spans>;

    const NAME: &'static str = "document";

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        let ids = self.layout.ids(shape.n_kv)?;
        let documents = Spans::new(&of_queries("document_ids", &ids, shape)?, &ids, shape)?;
        let band = Band { right: self.causal.then_some(0), ..Band::causal(shape, Align::BottomRight) };
        Ok(And(band, documents))
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let Ok(ids) = self.layout.ids(shape.n_kv) else { return 0 };
        let n = shape.n_kv.max(1);
        let first_query = shape.n_kv.saturating_sub(shape.n_q);
        let of_entry = |ids: &[i32]| {
            // Keys of each document so far; causal queries see those, others all there will be.
            let (mut keys, mut queries, mut pairs) = (HashMap::new(), HashMap::new(), 0u64);
            for (position, id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
                let keys = keys.entry(id).or_insert(0u64);
                *keys += 1;
                if position >= first_query {
                    pairs += *keys;
                    *queries.entry(id).or_insert(0u64) += 1;
                }
            }
            match self.causal {
                true => pairs,
                false => queries.into_iter().map(|(id, queries)| queries * keys[&id]).sum(),
            }
        };
        let entries: u64 = ids.chunks(n).map(of_entry).sum();
        let times = if ids.len() > n { 1 } else { shape.batch };
        entries * (times * shape.n_heads_q) as u64
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    /// Ends that are known beforehand can be streamed.
    fn kept(&self) -> Option<Kept> {
        matches!(self.layout, DocumentLayout::Equal(_)).then_some(Kept { sinks: 0, last: None })
    }

    fn growth(&self) -> Growth {
        if matches!(self.layout, DocumentLayout::Equal(_)) { Growth::Linear } else { Growth::Quadratic }
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}
