//! candle-flash-attn's function for packed queries against keys and values in pages.

use super::drop_in::check_longest;
use super::numbers::{integers, prefix_sums};
use crate::Flash;
use crate::engine::{KvView, PagedKv, Problem};
use attn_core::candle::candle_core::{Result, Tensor, bail};
use attn_core::candle::{AxisOrder, refuse_gradients, tensor_from, with_view};
use attn_core::mask::{BandPerBatch, Cover, Head, Mask, Or, Pair};
use attn_core::{AttnShape, TensorView};
use std::ops::Range;

/// Packed queries against keys and values in pages: `q (total_q, n_heads_q, head_dim)`,
/// `k (pages, page_block_size, n_heads_kv, head_dim)`, `v (pages, page_block_size, n_heads_kv, head_dim_v)` ->
/// `(total_q, n_heads_q, head_dim_v)`. For decoding: a backward pass through the output is an error.
///
/// Key `j` of sequence `s` stands in page `block_table[s, j / page_block_size]`; `seqlens_q` and `seqlens_k` are prefix sums
/// of the lengths, `block_table (sequences, columns)`; all are u32, i32 or i64. `mm_prefix_ranges (sequences, ranges, 2)` are
/// positions `start..end` of which each sees all others, whatever the windows say: an image in a prompt; a range that ends
/// before it starts is none. The rest is as for [`crate::flash_attn_varlen_windowed`].
///
/// Consecutive sequences with the same number of queries run as one batch: decoding is one call.
///
/// Source: Kwon et al. 2023 (PagedAttention).
///
/// # Errors
/// As [`crate::flash_attn_varlen`]; a page that does not exist, a row of the table that does not hold its sequence, a
/// `page_block_size` that is not that of `k`.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let (cu_q, cu_kv) = (prefix_sums("seqlens_q", seqlens_q)?, prefix_sums("seqlens_k", seqlens_k)?);
    let q_rows = with_view("q", q, AxisOrder::Nhd, |q| Ok(q.shape()[2]))?;
    let q_lens: Vec<usize> = lengths("seqlens_q", &cu_q, Some(q_rows))?;
    let kv_lens: Vec<i32> = lengths("seqlens_k", &cu_kv, None)?;
    let n = q_lens.len();
    if kv_lens.len() != n {
        bail!("seqlens_k: entries is {}, expected {} (as seqlens_q)", cu_kv.len(), cu_q.len());
    }
    check_longest("max_seqlen_q", &cu_q, max_seqlen_q)?;
    check_longest("max_seqlen_k", &cu_kv, max_seqlen_k)?;
    let (table, columns) = pages(block_table, &kv_lens, page_block_size)?;
    let ranges = ranges(mm_prefix_ranges, n)?;

    let flash = Flash { softmax_scale: Some(softmax_scale), softcap, ..Flash::full() };
    let [left, right] = [window_size_left, window_size_right].map(|w| w.filter(|keys| *keys <= max_seqlen_k));
    let attend_run = |run: Range<usize>, k: TensorView<'_>, v: TensorView<'_>| -> Result<Tensor> {
        let (n_q, lens) = (q_lens[run.start], &kv_lens[run.clone()]);
        let (_, heads, width) = q.dims3()?;
        let queries = q.narrow(0, cu_q[run.start] as usize, run.len() * n_q)?;
        let queries = queries.reshape((run.len(), n_q, heads, width))?;
        let offsets: Vec<isize> = lens.iter().map(|len| *len as isize - n_q as isize).collect();
        let block_table = &table[run.start * columns..run.end * columns];
        let out = with_view("q", &queries, AxisOrder::Bnhd, |q| {
            let (k, v) = (KvView::from(k), KvView::from(v));
            let problem = Problem::paged(q, PagedKv { k, v, block_table, lens })?;
            let shape = AttnShape { batch: run.len(), ..problem.shape() };
            let band = BandPerBatch::new(offsets.clone(), left, right, &shape)?;
            let together = Together { ranges: &ranges[run.clone()], offsets: &offsets };
            let call = flash.call().mask(Or(band, together));
            tensor_from(q.dtype(), shape.out(), AxisOrder::Bnhd, |out| call.forward(problem, out, None))
        })?;
        out.flatten(0, 1)
    };
    let out = with_view("k", k, AxisOrder::Bnhd, |k| {
        with_view("v", v, AxisOrder::Bnhd, |v| {
            if k.shape()[2] != page_block_size {
                bail!("page_block_size is {page_block_size}, expected {} (as in k)", k.shape()[2]);
            }
            let mut outputs = Vec::new();
            let mut start = 0;
            while start < n {
                let same = q_lens[start..].iter().take_while(|len| **len == q_lens[start]).count();
                outputs.push(attend_run(start..start + same, k, v)?);
                start += same;
            }
            match outputs.as_slice() {
                [] => q.narrow(0, 0, 0)?.contiguous(),
                [one] => Ok(one.clone()),
                several => Tensor::cat(several, 0),
            }
        })
    })?;
    refuse_gradients("flash from pages", out, &[q, k, v])
}

/// The lengths of which `sums` are the prefix sums; those of packed rows end at their `total`.
fn lengths<T: TryFrom<i32>>(name: &str, sums: &[i32], total: Option<usize>) -> Result<Vec<T>> {
    let Some((0, last)) = sums.first().copied().zip(sums.last()) else {
        bail!("{name}: {:?} at the start, expected 0", sums.first());
    };
    if let Some(total) = total
        && usize::try_from(*last) != Ok(total)
    {
        bail!("{name} is last entry {last}, expected {total}, the packed length");
    }
    let length = |w: &[i32]| match T::try_from(w[1].wrapping_sub(w[0])) {
        Ok(length) if w[0] <= w[1] => Ok(length),
        _ => bail!("{name} is {} after {}, expected entries that do not decrease", w[1], w[0]),
    };
    sums.windows(2).map(length).collect()
}

/// The block table and its columns, each row long enough for its sequence.
fn pages(table: &Tensor, lens: &[i32], page_size: usize) -> Result<(Vec<i32>, usize)> {
    let (name, n) = ("block_table", lens.len());
    let [sequences, columns] = table.dims() else {
        bail!("{name}'s shape is {:?}, expected ({n}, columns)", table.dims());
    };
    if *sequences != n {
        bail!("{name}: sequences is {sequences}, expected {n} (as seqlens_q)");
    }
    let holds = columns.saturating_mul(page_size);
    if let Some(len) = lens.iter().find(|len| usize::try_from(**len).is_ok_and(|len| len > holds)) {
        bail!("{name}: a row holds {holds} keys, expected at least {len}, the longest sequence of seqlens_k");
    }
    Ok((integers(name, table)?, *columns))
}

/// The ranges of each sequence that hold anything.
fn ranges(tensor: Option<&Tensor>, sequences: usize) -> Result<Vec<Vec<Range<isize>>>> {
    let Some(tensor) = tensor else { return Ok(vec![Vec::new(); sequences]) };
    let name = "mm_prefix_ranges";
    let [batch, each, 2] = tensor.dims() else {
        bail!("{name}'s shape is {:?}, expected ({sequences}, ranges, 2)", tensor.dims());
    };
    if *batch != sequences {
        bail!("{name}: sequences is {batch}, expected {sequences} (as seqlens_q)");
    }
    let numbers = integers(name, tensor)?;
    let range = |pair: &[i32]| pair[0] as isize..pair[1] as isize;
    let of = |s: usize| numbers[s * each * 2..(s + 1) * each * 2].chunks_exact(2).map(range);
    Ok((0..sequences).map(|s| of(s).filter(|range| !range.is_empty()).collect()).collect())
}

/// Positions of one range see each other.
struct Together<'a> {
    /// Positions on the key axis, of each sequence.
    ranges: &'a [Vec<Range<isize>>],
    /// Position of query 0, of each sequence.
    offsets: &'a [isize],
}

impl Together<'_> {
    /// The ranges that hold one of the query `rows`.
    fn met(&self, batch: usize, rows: &Range<usize>) -> impl Iterator<Item = &Range<isize>> {
        let offset = self.offsets[batch];
        let (first, end) = (rows.start as isize + offset, rows.end as isize + offset);
        self.ranges[batch].iter().filter(move |range| range.start < end && first < range.end)
    }
}

impl Mask for Together<'_> {
    fn sees(&self, p: Pair) -> bool {
        self.met(p.batch, &(p.i..p.i + 1)).any(|range| range.contains(&(p.j as isize)))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let clamp = |at: isize| at.clamp(0, n_kv as isize) as usize;
        let keys = self.met(head.batch, &rows).map(|range| clamp(range.start)..clamp(range.end));
        let mut keys: Vec<_> = keys.filter(|keys| !keys.is_empty()).collect();
        keys.sort_by_key(|keys| keys.start);
        let mut joined: Vec<Range<usize>> = Vec::with_capacity(keys.len());
        for next in keys {
            match joined.last_mut() {
                Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
                _ => joined.push(next),
            }
        }
        joined
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (start, end) = (keys.start as isize, keys.end as isize);
        match self.met(head.batch, &rows).any(|range| range.start < end && start < range.end) {
            true => Cover::Partial,
            false => Cover::Empty,
        }
    }
}
