//! candle-flash-attn's function for pages, against the definition on the sequences that the pages hold.

use super::naive::{Naive, max_difference};
use attn_core::candle::candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use attn_flash::flash_attn_varlen_paged_windowed;

const SCALE: f32 = 0.3;
const PAGE: usize = 4;

/// Packed sequences, and the same keys and values in pages that lie in no order among pages of NaN.
struct Paged {
    qkv: [Tensor; 3],
    k: Tensor,
    v: Tensor,
    cu: [Vec<u32>; 2],
    table: Tensor,
}

impl Paged {
    fn new(q_lens: &[u32], kv_lens: &[u32]) -> Result<Self> {
        let sums = |lens: &[u32]| {
            let ends = lens.iter().scan(0, |sum, len| {
                *sum += len;
                Some(*sum)
            });
            std::iter::once(0).chain(ends).collect::<Vec<u32>>()
        };
        let (cu_q, cu_kv) = (sums(q_lens), sums(kv_lens));
        let random =
            |n: u32, heads, width| Tensor::randn(0f32, 1.0, (n as usize, heads, width), &Device::Cpu);
        let (total_q, total_kv) = (cu_q[q_lens.len()], cu_kv[kv_lens.len()]);
        let qkv = [random(total_q, 4, 8)?, random(total_kv, 2, 8)?, random(total_kv, 2, 6)?];
        let columns = kv_lens.iter().map(|len| (*len as usize).div_ceil(PAGE)).max().unwrap_or(0) + 1;
        let n_pages = kv_lens.len() * columns;
        let mut table = vec![-1i64; n_pages];
        let paged = |t: &Tensor, table: &mut [i64]| -> Result<Tensor> {
            let (_, heads, width) = t.dims3()?;
            let nan = Tensor::full(f32::NAN, (PAGE, heads, width), &Device::Cpu)?;
            let mut pages = vec![nan.clone(); n_pages];
            for (s, len) in kv_lens.iter().enumerate() {
                for start in (0..*len as usize).step_by(PAGE) {
                    let n = PAGE.min(*len as usize - start);
                    let rows = t.narrow(0, cu_kv[s] as usize + start, n)?;
                    let row = s * columns + start / PAGE;
                    // Seven has no divisor in common with the numbers of pages below.
                    let page = (row * 7 + 3) % n_pages;
                    table[row] = page as i64;
                    pages[page] = Tensor::cat(&[rows, nan.narrow(0, 0, PAGE - n)?], 0)?;
                }
            }
            Tensor::stack(&pages, 0)
        };
        let (k, v) = (paged(&qkv[1], &mut table)?, paged(&qkv[2], &mut table)?);
        let table = Tensor::from_vec(table, (kv_lens.len(), columns), &Device::Cpu)?;
        Ok(Self { qkv, k, v, cu: [cu_q, cu_kv], table })
    }

    fn run(&self, q: &Tensor, options: Options<'_>) -> Result<Tensor> {
        let Options { ranges, left, right, softcap } = options;
        let [cu_q, cu_kv] = self.cu.each_ref().map(|cu| Tensor::new(cu.as_slice(), &Device::Cpu));
        flash_attn_varlen_paged_windowed(
            q,
            &self.k,
            &self.v,
            &cu_q?,
            &cu_kv?,
            &self.table,
            ranges,
            99,
            99,
            SCALE,
            left,
            right,
            PAGE,
            softcap,
        )
    }
}

#[derive(Clone, Copy, Default)]
struct Options<'a> {
    ranges: Option<&'a Tensor>,
    left: Option<usize>,
    right: Option<usize>,
    softcap: Option<f32>,
}

#[test]
fn pages_equal_packed_sequences() -> Result<()> {
    // Prompts, chunks, single tokens, runs of equal lengths, a sequence without queries.
    let cases: [(&[u32], &[u32]); 3] =
        [(&[1, 1, 1], &[5, 16, 1]), (&[7, 3, 3, 1, 0, 1], &[7, 9, 3, 12, 2, 8]), (&[4], &[11])];
    for (q_lens, kv_lens) in cases {
        let paged = Paged::new(q_lens, kv_lens)?;
        let plain = Naive { scale: f64::from(SCALE), ..Naive::default() };
        for (options, naive) in [
            (Options::default(), plain),
            (Options { right: Some(0), ..Options::default() }, Naive { right: Some(0), ..plain }),
            (
                Options { left: Some(3), right: Some(1), softcap: Some(2.0), ..Options::default() },
                Naive { left: Some(3), right: Some(1), softcap: Some(2.0), ..plain },
            ),
        ] {
            let got = paged.run(&paged.qkv[0], options)?;
            let want = naive.packed(paged.qkv.each_ref(), &paged.cu[0], &paged.cu[1])?;
            let error = max_difference(&got, &want)?;
            assert!(error < 3e-6, "{q_lens:?} on {kv_lens:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn positions_of_a_range_see_each_other() -> Result<()> {
    // Two sequences with an image each; the second image has more queries than one before them.
    let paged = Paged::new(&[9, 6], &[9, 14])?;
    let ranges = [[[2i64, 6], [7, 7]], [[7, 12], [0, 3]]];
    let tensor = Tensor::new(&ranges, &Device::Cpu)?;
    let options = Options { ranges: Some(&tensor), left: Some(3), right: Some(0), ..Options::default() };
    let got = paged.run(&paged.qkv[0], options)?;
    for (s, (n_q, n_kv)) in [(9, 9), (6, 14)].into_iter().enumerate() {
        let bias = (0..n_q * n_kv).map(|at| {
            let (p, j) = ((at / n_kv + n_kv - n_q) as i64, (at % n_kv) as i64);
            let together = ranges[s].iter().any(|[a, b]| (*a..*b).contains(&p) && (*a..*b).contains(&j));
            if together || (p - 3..=p).contains(&j) { 0.0 } else { f32::NEG_INFINITY }
        });
        let bias = Tensor::from_vec(bias.collect::<Vec<f32>>(), (n_q, n_kv), &Device::Cpu)?;
        let naive = Naive { scale: f64::from(SCALE), bias: Some(&bias), ..Naive::default() };
        let cut = |t: &Tensor, at: usize, n: usize| t.narrow(0, paged.cu[at][s] as usize, n)?.unsqueeze(0);
        let [q, k, v] = &paged.qkv;
        let want = naive.bnhd(&cut(q, 0, n_q)?, &cut(k, 1, n_kv)?, &cut(v, 1, n_kv)?)?;
        let error = max_difference(&cut(&got, 0, n_q)?, &want)?;
        assert!(error < 3e-6, "sequence {s}: {error}");
    }
    Ok(())
}

#[test]
fn half_types_and_slices_of_queries_are_taken() -> Result<()> {
    let mut paged = Paged::new(&[2, 2], &[9, 14])?;
    let want = paged.run(&paged.qkv[0], Options::default())?;
    // Heads from the middle of a wider tensor.
    let wide = Tensor::cat(&[&paged.qkv[0], &paged.qkv[0], &paged.qkv[0]], 1)?.i((.., 4..8))?;
    assert_eq!(max_difference(&paged.run(&wide, Options::default())?, &want)?, 0.0);
    (paged.k, paged.v) = (paged.k.to_dtype(DType::BF16)?, paged.v.to_dtype(DType::BF16)?);
    let got = paged.run(&paged.qkv[0].to_dtype(DType::BF16)?, Options::default())?;
    assert_eq!(got.dtype(), DType::BF16);
    assert!(max_difference(&got, &want)? < 2e-2);
    Ok(())
}

#[test]
fn gradients_are_refused_not_dropped() -> Result<()> {
    let paged = Paged::new(&[1, 1], &[5, 6])?;
    let q = Var::from_tensor(&paged.qkv[0])?;
    let out = paged.run(&q, Options::default())?;
    assert_eq!(max_difference(&out, &paged.run(&paged.qkv[0], Options::default())?)?, 0.0);
    let error = out.sum_all()?.backward().unwrap_err().to_string();
    assert!(error.contains("pages"), "{error}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let good = || Paged::new(&[2, 3], &[9, 14]).unwrap();
    let ranges = |numbers: &[usize]| Tensor::zeros(numbers, DType::I64, &Device::Cpu).unwrap();
    let (flat, three) = (ranges(&[2, 2]), ranges(&[3, 1, 2]));
    let with = |ranges| Options { ranges: Some(ranges), ..Options::default() };
    type Change<'a> = &'a dyn Fn(&mut Paged);
    let plain = Options::default();
    let set = |table: &Tensor, page: i64| (table.ones_like().unwrap() * page as f64).unwrap();
    let cases: [(&str, Change<'_>, Options<'_>, &[&str]); 12] = [
        ("rank of q", &|p| p.qkv[0] = p.qkv[0].unsqueeze(0).unwrap(), plain, &["q's shape"]),
        ("rank of pages", &|p| p.k = p.k.flatten(0, 1).unwrap(), plain, &["k's shape"]),
        ("page size", &|p| p.k = p.k.narrow(1, 0, 3).unwrap(), plain, &["page_block_size is 4", "3"]),
        ("pages of v", &|p| p.v = p.v.narrow(0, 0, 1).unwrap(), plain, &["v_cache: pages is 1"]),
        ("end of q", &|p| p.cu[0] = vec![0, 2, 4], plain, &["seqlens_q", "4", "5"]),
        ("start of k", &|p| p.cu[1] = vec![1, 2, 4], plain, &["seqlens_k", "0"]),
        ("decreasing", &|p| p.cu[1] = vec![0, 5, 4], plain, &["seqlens_k is 4 after 5"]),
        ("number of sequences", &|p| p.cu[1] = vec![0, 5], plain, &["seqlens_k", "2", "3"]),
        (
            "a row too short",
            &|p| p.table = p.table.narrow(1, 0, 3).unwrap(),
            plain,
            &["block_table", "12", "14"],
        ),
        ("no such page", &|p| p.table = set(&p.table, 1000), plain, &["block_table", "1000"]),
        ("rank of ranges", &|_| {}, with(&flat), &["mm_prefix_ranges's shape", "(2, ranges, 2)"]),
        ("ranges", &|_| {}, with(&three), &["mm_prefix_ranges: sequences is 3"]),
    ];
    for (what, change, options, words) in cases {
        let mut paged = good();
        change(&mut paged);
        let error = paged.run(&paged.qkv[0], options).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{what}: {error}, expected {words:?}");
    }
    Ok(())
}
