//! Where queries, keys and values lie: a batch, packed sequences, a cache, pages; also such that do not fit.

use super::bytes::Bytes;
use super::numbers::{all_finite, largest};
use super::tensor::{Layout, Tensor};
use attn_core::{AttnShape, DType, Qkv, Result, View};
use attn_flash::engine::{KvView, PagedKv, Problem};
use std::ops::Range;

/// Keys or values: plain, or whole numbers with scales.
#[derive(Debug, Clone)]
pub enum Kv {
    Plain(Tensor),
    Int8 { layout: Layout, data: Vec<i8>, scales: Tensor, block: usize },
}

impl Kv {
    fn draw(bytes: &mut Bytes<'_>, shape: [usize; 4], dtype: DType, int8: bool) -> Self {
        let layout = Layout::of(bytes, shape, true);
        if !int8 {
            return Self::Plain(Tensor::filled(bytes, dtype, layout));
        }
        let block = bytes.within(1..=9);
        let n_blocks = bytes.about(shape[2].div_ceil(block));
        let scales = Layout::of(bytes, [shape[0], shape[1], n_blocks, 1], true);
        let seed = bytes.word();
        let data =
            (0..layout.len as u64).map(|x| ((x ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as i8);
        let block = if bytes.one_in(32) { bytes.pick(&[0, usize::MAX]) } else { block };
        Self::Int8 { data: data.collect(), scales: Tensor::filled(bytes, DType::F32, scales), block, layout }
    }

    fn view(&self, name: &str) -> Result<KvView<'_>> {
        match self {
            Self::Plain(tensor) => Ok(tensor.view(name)?.into()),
            Self::Int8 { layout, data, scales, block } => {
                let Tensor::F32(numbers) = scales else { unreachable!("scales are drawn as f32") };
                let scales =
                    View::new("scales", &numbers.data, numbers.layout.shape, numbers.layout.strides)?;
                Ok(KvView::Int8 {
                    data: View::new(name, data, layout.shape, layout.strides)?,
                    scales,
                    block: *block,
                })
            }
        }
    }

    fn shape(&self) -> [usize; 4] {
        match self {
            Self::Plain(tensor) => tensor.layout().shape,
            Self::Int8 { layout, .. } => layout.shape,
        }
    }

    fn row(&self, batch: usize, head: usize, j: usize) -> Vec<f32> {
        match self {
            Self::Plain(tensor) => tensor.row(batch, head, j),
            Self::Int8 { layout, data, scales, block } => {
                let scale = scales.row(batch, head, j / block)[0];
                let number = |c| scale * f32::from(data[layout.place([batch, head, j, c])]);
                (0..layout.shape[3]).map(number).collect()
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Kind {
    Batch,
    Packed { q: Vec<i32>, kv: Vec<i32> },
    Cached { lens: Option<Vec<i32>> },
    Paged { table: Vec<i32>, lens: Vec<i32> },
}

/// All tensors of a call that are read.
#[derive(Debug, Clone)]
pub struct Sequences {
    pub q: Tensor,
    k: Kv,
    v: Kv,
    kind: Kind,
    /// What masks and score mods should see: a batch entry a sequence, padded to the longest.
    pub seen: AttnShape,
}

impl Sequences {
    pub fn draw(bytes: &mut Bytes<'_>) -> Self {
        let kind = bytes.within(0..=6);
        let batch = if kind == 4 { 1 } else { bytes.pick(&[1, 1, 2, 3, 0]) };
        let (n_heads_kv, group) = (bytes.pick(&[1, 2, 1, 3, 0]), bytes.within(1..=3));
        // Few queries against many keys are split along the keys.
        let long = bytes.one_in(24);
        let (n_q, n_kv) = if long {
            (bytes.within(0..=2), bytes.within(2047..=2400))
        } else {
            (bytes.within(0..=70), bytes.within(0..=140))
        };
        let (head_dim, head_dim_v) = (bytes.within(1..=if long { 6 } else { 40 }), bytes.within(1..=40));
        let shape =
            AttnShape { batch, n_heads_q: n_heads_kv * group, n_heads_kv, n_q, n_kv, head_dim, head_dim_v };
        let page_size = bytes.within(1..=17);
        let columns = n_kv.div_ceil(page_size);
        let n_pages = columns * batch + bytes.within(0..=2);
        let (mut q, mut k, mut v) = match kind {
            6 => (
                shape.q(),
                [n_pages, n_heads_kv, page_size, head_dim],
                [n_pages, n_heads_kv, page_size, head_dim_v],
            ),
            _ => (shape.q(), shape.k(), shape.v()),
        };
        if bytes.one_in(12) {
            let (tensor, axis) = (bytes.within(0..=2), bytes.within(0..=3));
            let axes = [&mut q, &mut k, &mut v].into_iter().nth(tensor).expect("three tensors");
            axes[axis] = bytes.about(axes[axis] + 1);
        }
        for axes in [&mut q, &mut k, &mut v] {
            // An empty tensor may have any sizes.
            if axes.contains(&0) && bytes.one_in(6) {
                let axis = bytes.within(0..=3);
                if axes[axis] != 0 {
                    axes[axis] = bytes.pick(&[usize::MAX, 1 << 62, isize::MAX as usize]);
                }
            }
        }

        let axis = |n: usize| if n > 1 << 16 { 3 } else { n };
        let n_kv = if kind == 6 { n_kv } else { axis(k[2]) };
        let mut seen = AttnShape {
            batch: axis(q[0]),
            n_heads_q: axis(q[1]),
            n_heads_kv: axis(k[1]),
            n_q: axis(q[2]),
            n_kv,
            head_dim: axis(q[3]),
            head_dim_v: axis(v[3]),
        };

        let dtype = bytes.pick(&DType::ALL);
        let cached = kind >= 5;
        let kv_dtype = if cached || bytes.one_in(32) { bytes.pick(&DType::ALL) } else { dtype };
        let v_dtype = if cached || bytes.one_in(32) { bytes.pick(&DType::ALL) } else { kv_dtype };
        let [k_int8, v_int8] = [0, 1].map(|_| cached && bytes.one_in(3));
        let layout = Layout::of(bytes, q, true);
        let q = Tensor::filled(bytes, dtype, layout);
        let (k, v) = (Kv::draw(bytes, k, kv_dtype, k_int8), Kv::draw(bytes, v, v_dtype, v_int8));

        let (batch, n_q) = (seen.batch, seen.n_q);
        let kind = match kind {
            4 => {
                let n = bytes.within(1..=4);
                let (q, kv) = (prefix_sums(bytes, n, n_q), prefix_sums(bytes, n, n_kv));
                let longest = |sums: &[i32]| {
                    sums.windows(2).map(|w| w[1].saturating_sub(w[0]).max(0)).max().unwrap_or(0)
                };
                seen = AttnShape {
                    batch: q.len().saturating_sub(1),
                    n_q: n_q.min(longest(&q) as usize),
                    n_kv: n_kv.min(longest(&kv) as usize),
                    ..seen
                };
                Kind::Packed { q, kv }
            }
            5 => Kind::Cached { lens: (!bytes.one_in(4)).then(|| lens(bytes, batch, n_kv)) },
            6 => {
                let mut table: Vec<i32> =
                    (0..columns * batch).map(|_| bytes.within(0..=n_pages.max(1) - 1) as i32).collect();
                let lens = lens(bytes, batch, columns * page_size);
                if bytes.one_in(2) {
                    // By convention -1 where nothing is.
                    for (row, len) in lens.iter().enumerate().take(batch) {
                        let used = (*len).max(0) as usize / page_size + 1;
                        table[row * columns..][..columns].iter_mut().skip(used).for_each(|page| *page = -1);
                    }
                }
                if bytes.one_in(12) {
                    table.resize(bytes.about(table.len() + 1), 0);
                }
                if bytes.one_in(12) && !table.is_empty() {
                    let at = bytes.within(0..=table.len() - 1);
                    table[at] = bytes.pick(&[-1, n_pages as i32, i32::MAX, i32::MIN]);
                }
                seen.n_kv = table.len().checked_div(batch).unwrap_or(0) * page_size;
                Kind::Paged { table, lens }
            }
            _ => Kind::Batch,
        };
        Self { q, k, v, kind, seen }
    }

    pub fn problem(&self) -> Result<Problem<'_>> {
        let (q, k, v) = (self.q.view("q")?, self.k.view("k")?, self.v.view("v")?);
        match &self.kind {
            Kind::Batch => Ok(Problem::batch(self.plain()?)),
            Kind::Packed { q, kv } => Problem::packed(self.plain()?, q, kv),
            Kind::Cached { lens } => Problem::cached(q, k, v, lens.as_deref()),
            Kind::Paged { table, lens } => Problem::paged(q, PagedKv { k, v, block_table: table, lens }),
        }
    }

    /// The plain tensors of a batch or of packed sequences.
    fn plain(&self) -> Result<Qkv<'_>> {
        let (Kv::Plain(k), Kv::Plain(v)) = (&self.k, &self.v) else { unreachable!("only caches are int8") };
        Qkv::new(self.q.view("q")?, k.view("k")?, v.view("v")?)
    }

    /// Axes of q, k and v.
    pub fn shapes(&self) -> [[usize; 4]; 3] {
        [self.q.layout().shape, self.k.shape(), self.v.shape()]
    }

    /// Keys that a bias is counted over: those of the longest sequence, or of all packed ones.
    pub fn n_keys(&self) -> usize {
        if let Kind::Packed { .. } = self.kind { self.k.shape()[2].min(1 << 16) } else { self.seen.n_kv }
    }

    /// Batch entries of the tensors.
    pub fn n_entries(&self) -> usize {
        if let Kind::Packed { .. } = self.kind { 1 } else { self.seen.batch }
    }

    /// The shape of `out`, if all fits.
    pub fn out_shape(&self) -> [usize; 4] {
        let [batch, heads, n, _] = self.q.layout().shape;
        [batch, heads, n, self.v.shape()[3]]
    }

    /// Rows of a sequence on the axes of `q` and of `k`: `(batch entry, rows, keys)`. Only where [`Sequences::problem`] gave
    /// no error.
    pub fn ranges(&self, s: usize) -> (usize, Range<usize>, Range<usize>) {
        let [n_q, n_kv] = [self.seen.n_q, self.seen.n_kv];
        match &self.kind {
            Kind::Batch | Kind::Cached { lens: None } => (s, 0..n_q, 0..n_kv),
            Kind::Packed { q, kv } => {
                (0, q[s] as usize..q[s + 1] as usize, kv[s] as usize..kv[s + 1] as usize)
            }
            Kind::Cached { lens: Some(lens) } | Kind::Paged { lens, .. } => (s, 0..n_q, 0..lens[s] as usize),
        }
    }

    /// A copy in f32 with a batch entry a sequence, zeros beyond their ends.
    pub fn padded(&self) -> Padded {
        let shape = self.seen;
        let len = |axes: [usize; 4]| vec![0.0; axes.iter().product()];
        let (mut q, mut k, mut v) = (len(shape.q()), len(shape.k()), len(shape.v()));
        for s in 0..shape.batch {
            let (batch, rows, keys) = self.ranges(s);
            for head in 0..shape.n_heads_q {
                for (i, row) in rows.clone().enumerate() {
                    let at = ((s * shape.n_heads_q + head) * shape.n_q + i) * shape.head_dim;
                    q[at..][..shape.head_dim].copy_from_slice(&self.q.row(batch, head, row));
                }
            }
            for head in 0..shape.n_heads_kv {
                for (j, key) in keys.clone().enumerate() {
                    let (page, slot) = match &self.kind {
                        Kind::Paged { table, .. } => {
                            let (page_size, columns) = (self.k.shape()[2], table.len() / shape.batch);
                            (table[s * columns + key / page_size] as usize, key % page_size)
                        }
                        _ => (batch, key),
                    };
                    let at = (s * shape.n_heads_kv + head) * shape.n_kv + j;
                    k[at * shape.head_dim..][..shape.head_dim].copy_from_slice(&self.k.row(page, head, slot));
                    v[at * shape.head_dim_v..][..shape.head_dim_v]
                        .copy_from_slice(&self.v.row(page, head, slot));
                }
            }
        }
        Padded { q, k, v, shape }
    }
}

/// See [`Sequences::padded`].
pub struct Padded {
    q: Vec<f32>,
    k: Vec<f32>,
    pub v: Vec<f32>,
    shape: AttnShape,
}

impl Padded {
    pub fn qkv(&self) -> Result<Qkv<'_>> {
        let (s, view) = (&self.shape, View::contiguous);
        Qkv::new(view("q", &self.q, s.q())?, view("k", &self.k, s.k())?, view("v", &self.v, s.v())?)
    }

    pub fn all_finite(&self) -> bool {
        all_finite(&self.q) && all_finite(&self.k) && all_finite(&self.v)
    }

    /// The longest query and the longest key, over their finite elements.
    pub fn lengths(&self) -> [f64; 2] {
        [&self.q, &self.k].map(|rows| {
            let length = |row: &[f32]| {
                row.iter().filter(|x| x.is_finite()).map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
            };
            rows.chunks_exact(self.shape.head_dim).map(length).fold(0.0, f64::max)
        })
    }

    pub fn largest_value(&self) -> f64 {
        largest(&self.v)
    }
}

fn prefix_sums(bytes: &mut Bytes<'_>, sequences: usize, total: usize) -> Vec<i32> {
    let mut cuts: Vec<i32> = (1..sequences).map(|_| bytes.within(0..=total) as i32).collect();
    cuts.sort_unstable();
    let mut sums = [vec![0], cuts, vec![total as i32]].concat();
    if bytes.one_in(10) {
        let at = bytes.within(0..=sums.len() - 1);
        sums[at] = bytes.pick(&[-1, total as i32 + 1, 0, i32::MIN, i32::MAX]);
    }
    if bytes.one_in(16) {
        sums.truncate(bytes.within(0..=sums.len()));
    }
    sums
}

fn lens(bytes: &mut Bytes<'_>, batch: usize, most: usize) -> Vec<i32> {
    let entries = bytes.about(batch);
    let wrong = bytes.one_in(16);
    let one = |_| {
        if wrong {
            bytes.pick(&[-1, most as i32 + 1, i32::MIN, i32::MAX])
        } else {
            bytes.within(0..=most) as i32
        }
    };
    (0..entries).map(one).collect()
}
