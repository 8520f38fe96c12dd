//! Rows of one length that vectors run over.

use attn_core::parallel::for_each_task;
use attn_core::view::View;
use attn_core::{Element, LargeVec, Result, TensorView};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Rows that one task copies.
const BLOCK: usize = 4096;

/// Zeros that start where a cache line does: vectors then never lie across two.
#[derive(Debug)]
pub(super) struct Aligned {
    store: LargeVec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(super) fn zeroed(len: usize) -> Self {
        let before = LINE / size_of::<f32>();
        let store = LargeVec::<f32>::zeroed(len + before);
        let start = store.as_ptr().align_offset(LINE).min(before);
        Self { store, start, len }
    }

    pub(super) fn numbers(&self) -> &[f32] {
        &self.store[self.start..][..self.len]
    }

    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.store[self.start..][..self.len]
    }
}

/// The rows of a tensor `[batch, heads, n, width]`, in f32 and `W` numbers long, with zeros behind `width`: where they are that
/// already, in place.
pub(super) enum RowsOf<'a, const W: usize> {
    InPlace(View<'a, f32>),
    Copied { rows: Aligned, of: TensorView<'a> },
}

impl<'a, const W: usize> RowsOf<'a, W> {
    /// `aligned`: each row is to start a cache line.
    pub(super) fn new(tensor: TensorView<'a>, aligned: bool) -> Self {
        match tensor {
            TensorView::F32(view) if serves::<W>(&view, aligned) => Self::InPlace(view),
            TensorView::F32(view) => Self::Copied { rows: copy::<W, _>(&view), of: tensor },
            TensorView::Bf16(view) => Self::Copied { rows: copy::<W, _>(&view), of: tensor },
            TensorView::F16(view) => Self::Copied { rows: copy::<W, _>(&view), of: tensor },
        }
    }

    /// The rows of a head.
    pub(super) fn head(&self, batch: usize, head: usize) -> &[[f32; W]] {
        match self {
            Self::InPlace(view) => view.head(batch, head).data().as_chunks().0,
            Self::Copied { rows, of } => {
                let [_, heads, n, _] = of.shape();
                &rows.numbers().as_chunks().0[(batch * heads + head) * n..][..n]
            }
        }
    }

    /// The tensor in f32.
    pub(super) fn view(&self, width: usize) -> Result<TensorView<'_>> {
        match self {
            Self::InPlace(view) => Ok((*view).into()),
            Self::Copied { of: TensorView::F32(view), .. } => Ok((*view).into()),
            Self::Copied { rows, of } => {
                let [batch, heads, n, _] = of.shape();
                let strides = [heads * n * W, n * W, W, 1];
                Ok(View::new("rows", rows.numbers(), [batch, heads, n, width], strides)?.into())
            }
        }
    }
}

/// Whether the rows of a tensor can be read as they lie.
fn serves<const W: usize>(view: &View<'_, f32>, aligned: bool) -> bool {
    let [batch, heads, n, width] = view.shape();
    let mut all = (0..batch).flat_map(|batch| (0..heads).map(move |head| view.head(batch, head)));
    width == W
        && all.all(|rows| {
            (n < 2 || rows.stride() == W) && (!aligned || rows.data().as_ptr().align_offset(LINE) == 0)
        })
}

fn copy<const W: usize, E: Element>(view: &View<'_, E>) -> Aligned {
    let [batch, heads, n, _] = view.shape();
    let mut rows = Aligned::zeroed(batch * heads * n * W);
    let blocks = rows.numbers_mut().as_chunks_mut::<W>().0.chunks_mut(n.max(1)).enumerate();
    let blocks = blocks.flat_map(|(head, rows)| {
        rows.chunks_mut(BLOCK).enumerate().map(move |(block, rows)| (head, block * BLOCK, rows))
    });
    for_each_task(
        blocks,
        || (),
        |(), (head, first, rows)| {
            let from = view.head(head / heads, head % heads);
            for (i, row) in (first..).zip(rows) {
                row.iter_mut().zip(from.row(i)).for_each(|(to, from)| *to = from.load());
            }
        },
    );
    rows
}
