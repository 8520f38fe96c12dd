//! Orders of rows, and rows in them.

use attn_core::parallel::for_each_task;
use attn_core::view::View;
use attn_core::{AttnError, Element, Result, TensorView};
use std::sync::Arc;

/// Rows that one task gathers.
const BLOCK: usize = 4096;

/// Some rows in some order: all as they are, one list for all batch entries, or one for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order(Option<Arc<[Vec<u32>]>>);

impl Order {
    /// Every row, as it is.
    pub fn natural() -> Self {
        Self(None)
    }

    /// These rows.
    pub fn of(rows: Vec<u32>) -> Self {
        Self(Some([rows].into()))
    }

    /// These rows of each batch entry. Shorter lists are filled up with rows of zeros, which the mask must not let see a key.
    pub fn per_batch(rows: Vec<Vec<u32>>) -> Self {
        Self(Some(rows.into()))
    }

    /// The rows of a batch entry, `n` in all.
    #[cfg(test)]
    pub(crate) fn rows(&self, batch: usize, n: usize) -> Vec<usize> {
        self.places(batch, n).map(|(_, row)| row).collect()
    }

    /// Checks that all rows exist and that there is a list for every batch entry.
    pub(super) fn check(&self, name: &str, batch: usize, n: usize) -> Result<()> {
        let Some(lists) = &self.0 else { return Ok(()) };
        if lists.len() != 1 && lists.len() != batch {
            return Err(AttnError::shape(name, "batch", lists.len(), format!("1 or {batch}")));
        }
        match lists.iter().flatten().find(|row| **row as usize >= n) {
            Some(row) => Err(AttnError::value(name, format!("row {row}"), format!("below {n}"))),
            None => Ok(()),
        }
    }

    /// Length of the longest list; `n` if it is all rows.
    pub(super) fn len(&self, n: usize) -> usize {
        self.0.as_ref().map_or(n, |lists| lists.iter().map(Vec::len).max().unwrap_or(0))
    }

    pub(super) fn is_natural(&self) -> bool {
        self.0.is_none()
    }

    /// The rows of a batch entry; `None` is all.
    pub(super) fn list(&self, batch: usize) -> Option<&[u32]> {
        let lists = self.0.as_ref()?;
        Some(lists.get(if lists.len() == 1 { 0 } else { batch }).map_or(&[], Vec::as_slice))
    }

    /// Each place of a batch entry's list with its row, `n` rows in all.
    pub(super) fn places(&self, batch: usize, n: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let list = self.list(batch);
        let len = list.map_or(n, <[u32]>::len);
        (0..len).map(move |place| (place, list.map_or(place, |list| list[place] as usize)))
    }
}

/// A tensor `[batch, heads, rows, width]` in some order.
pub(super) enum Gathered<'a> {
    InPlace(TensorView<'a>),
    Copied { data: Vec<f32>, shape: [usize; 4] },
}

impl<'a> Gathered<'a> {
    /// The rows of `x`; copied and widened to f32 unless they are f32 in the order that is asked for.
    pub(super) fn new(x: TensorView<'a>, order: &Order) -> Self {
        match x {
            TensorView::F32(_) if order.is_natural() => Self::InPlace(x),
            TensorView::F32(view) => Self::copy(view, order),
            TensorView::Bf16(view) => Self::copy(view, order),
            TensorView::F16(view) => Self::copy(view, order),
        }
    }

    fn copy<E: Element>(x: View<'_, E>, order: &Order) -> Self {
        let [batch, heads, n, width] = x.shape();
        let len = order.len(n);
        let mut data = vec![0.0f32; batch * heads * len * width];
        let blocks = data.chunks_mut((len * width).max(1)).enumerate().flat_map(|(head, rows)| {
            rows.chunks_mut(BLOCK * width).enumerate().map(move |(block, rows)| (head, block * BLOCK, rows))
        });
        for_each_task(
            blocks,
            || (),
            |(), (head, first, rows)| {
                let (batch, head) = (head / heads, head % heads);
                let (from, list) = (x.head(batch, head), order.list(batch));
                for (place, to) in (first..).zip(rows.chunks_exact_mut(width)) {
                    let row = match list {
                        None => place,
                        Some(list) if place < list.len() => list[place] as usize,
                        Some(_) => return,
                    };
                    to.iter_mut().zip(from.row(row)).for_each(|(to, from)| *to = from.load());
                }
            },
        );
        Self::Copied { data, shape: [batch, heads, len, width] }
    }

    pub(super) fn view(&self) -> Result<TensorView<'_>> {
        match self {
            Self::InPlace(view) => Ok(*view),
            Self::Copied { data, shape } => Ok(View::contiguous("rows", data, *shape)?.into()),
        }
    }
}

/// Numbers of rows `[batch, heads, n]` in some order; `rest` where a list is shorter.
pub(super) fn gather_numbers(
    numbers: &[f32],
    [batch, heads, n]: [usize; 3],
    order: &Order,
    rest: f32,
) -> Vec<f32> {
    let len = order.len(n);
    let mut gathered = vec![rest; batch * heads * len];
    if n > 0 && len > 0 {
        let pairs = gathered.chunks_exact_mut(len).zip(numbers.chunks_exact(n));
        for (head, (to, from)) in pairs.enumerate() {
            order.places(head / heads, n).for_each(|(place, row)| to[place] = from[row]);
        }
    }
    gathered
}
