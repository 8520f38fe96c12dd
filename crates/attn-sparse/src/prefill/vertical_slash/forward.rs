//! The forward pass of lines: tiles for columns and bands of distances, then the other distances one by one.
//!
//! Both parts see pairs that the other does not, see [`Cut`]; a row's result of the first, `(out, lse)`, is the state from which
//! the second goes on: accumulator `out`, maximum `lse`, sum 1.

use super::cut::Cut;
use super::diagonals::{Diagonals, Segment};
use super::lines::Lines;
use super::rows::RowsOf;
use crate::store::store;
use attn_core::mask::Head;
use attn_core::parallel::for_each_task;
use attn_core::score::Unchanged;
use attn_core::simd::Isa;
use attn_core::{LargeVec, OutMut, Qkv, Result, ViewMut};
use attn_flash::engine::{AnySpec, Problem, attend_any};

/// Queries that one task attends.
const BLOCK: usize = 512;
/// Time of a pair that is attended apart, in pairs of a tile that is seen in part, where rows fill their vectors.
const PAIR_COST: f64 = 1.6;

/// Attends the pairs of `lines`; inputs, output and lines have been checked to fit.
pub(crate) fn forward(
    lines: &Lines,
    softmax_scale: f32,
    x: Qkv<'_>,
    out: OutMut<'_>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let shape = x.shape();
    let width = shape.head_dim.max(shape.head_dim_v);
    let padded = if width <= 64 { 64 } else { 128 };
    // Wider heads are left to the tiles.
    let pair_cost = if width <= 128 && shape.head_dim.min(shape.head_dim_v) > 0 {
        PAIR_COST * (2 * padded) as f64 / (shape.head_dim + shape.head_dim_v) as f64
    } else {
        f64::INFINITY
    };
    match Cut::cheapest(lines, &shape, pair_cost) {
        None => attend_any(Problem::batch(x), out, lse, &AnySpec::new(softmax_scale, lines, &Unchanged)),
        Some(cut) if padded == 64 => in_parts::<64>(lines, &cut, softmax_scale, x, out, lse),
        Some(cut) => in_parts::<128>(lines, &cut, softmax_scale, x, out, lse),
    }
}

/// [`forward`] with rows of `W` numbers.
pub(super) fn in_parts<const W: usize>(
    lines: &Lines,
    cut: &Cut,
    softmax_scale: f32,
    x: Qkv<'_>,
    mut out: OutMut<'_>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let shape = x.shape();
    let [q, k, v] = [(x.q(), false), (x.k(), true), (x.v(), true)]
        .map(|(tensor, aligned)| RowsOf::<W>::new(*tensor, aligned));
    let x = Qkv::new(q.view(shape.head_dim)?, k.view(shape.head_dim)?, v.view(shape.head_dim_v)?)?;
    let mut own_lse = Vec::new();
    let lse = lse.unwrap_or_else(|| {
        own_lse.resize(shape.rows(), 0.0);
        &mut own_lse
    });
    let mut wide = LargeVec::zeroed(0);
    let mut rows = match &mut out {
        OutMut::F32(out) => out.reborrow(),
        _ => {
            wide.resize(shape.rows() * shape.head_dim_v);
            ViewMut::contiguous("rows", &mut wide, shape.out())?
        }
    };
    let spec = AnySpec::new(softmax_scale, &cut.tiles, &Unchanged);
    attend_any(Problem::batch(x), rows.reborrow().into(), Some(&mut *lse), &spec)?;

    let isa = Isa::current();
    let segments: Vec<Vec<Segment>> = cut.apart.iter().map(|apart| Segment::cut::<W>(apart)).collect();
    let offset = shape.n_kv as isize - shape.n_q as isize;
    let lse = lse.chunks_mut(shape.n_q.max(1)).flat_map(|head| head.chunks_mut(BLOCK));
    let blocks: Vec<_> = rows.into_blocks(BLOCK).zip(lse).collect();
    for_each_task(blocks.into_iter(), Default::default, |workspace, (block, lse)| {
        let (batch, head) = (block.batch, block.head);
        let segments = &segments[lines.list(Head { batch, head })];
        if segments.is_empty() {
            return;
        }
        let kv_head = shape.kv_head(head);
        let (k, v) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let q = &q.head(batch, head)[block.rows.clone()];
        let position = block.rows.start as isize + offset;
        isa.run(Diagonals { q, k, v, position, segments, softmax_scale, workspace, out: block.out, lse });
    });
    match out {
        OutMut::F32(_) => Ok(()),
        out => store(out, &wide),
    }
}
