//! Packed sequences, caches with lengths, pages, grouped heads, sinks and key-split tasks against the f64 oracle, which
//! sees each sequence alone.

use attn_core::dropout::Dropout;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{And, Band, Mask, Pair, Predicate};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::{AttnShape, Qkv, TensorView, View, ViewMut};
use attn_flash::engine::{KvView, PagedKv, Problem};
use attn_flash::{Flash, FlashCall};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;

const TOL: Tol = Tol::AllClose { atol: 4e-6, rtol: 4e-6 };

/// What the oracle says about one sequence.
fn alone(flash: &Flash, x: &Qkv<'_>, sinks: Option<&[f32]>) -> Reference {
    let band = flash.band(&x.shape());
    let sinks: Option<Vec<f64>> = sinks.map(|s| s.iter().map(|x| f64::from(*x)).collect());
    Exact { mask: &band, sinks: sinks.as_deref(), ..Exact::default() }.all(x).unwrap()
}

/// Runs `call` into buffers full of NaN, so that a row nobody writes is seen.
fn run(
    call: FlashCall<'_, impl Mask, impl attn_core::score::ScoreMod>,
    problem: Problem<'_>,
) -> (Vec<f32>, Vec<f32>) {
    let shape = problem.shape();
    let (mut out, mut lse) = (vec![f32::NAN; shape.out().iter().product()], vec![f32::NAN; shape.rows()]);
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    call.forward(problem, view.into(), Some(&mut lse)).unwrap();
    (out, lse)
}

fn narrow<'a>(x: &TensorView<'a>, rows: std::ops::Range<usize>) -> TensorView<'a> {
    x.narrow(rows)
}

#[test]
fn packed_sequences_equal_each_alone() {
    let (cu_q, cu_kv) = ([0, 5, 5, 70, 71, 80], [0, 9, 12, 80, 80, 200]);
    let shape =
        AttnShape { n_q: 80, n_kv: 200, n_heads_q: 4, n_heads_kv: 2, head_dim: 16, head_dim_v: 24, batch: 1 };
    let data = inputs::Problem::normal(shape, 7);
    let x = data.qkv().unwrap();
    let window = Flash { window_left: Some(6), ..Flash::causal() };
    for (name, flash) in [("full", Flash::full()), ("causal", Flash::causal()), ("window", window)] {
        let (out, lse) = run(flash.call(), Problem::packed(x, &cu_q, &cu_kv).unwrap());
        for s in 0..cu_q.len() - 1 {
            let (rows, keys) =
                (cu_q[s] as usize..cu_q[s + 1] as usize, cu_kv[s] as usize..cu_kv[s + 1] as usize);
            let part =
                Qkv::new(narrow(x.q(), rows.clone()), narrow(x.k(), keys.clone()), narrow(x.v(), keys))
                    .unwrap();
            let want = alone(&flash, &part, None);
            let (d, n) = (shape.head_dim_v, rows.len());
            for head in 0..shape.n_heads_q {
                let first = head * shape.n_q + rows.start;
                let what = format!("{name}, sequence {s}, head {head}");
                assert_close(&what, &out[first * d..][..n * d], &want.out[head * n * d..][..n * d], TOL);
                assert_close(&what, &lse[first..][..n], &want.lse.as_ref().unwrap()[head * n..][..n], TOL);
            }
        }
    }
}

#[test]
fn caches_are_read_up_to_their_length_only() {
    let shape =
        AttnShape { batch: 3, n_q: 2, n_kv: 50, n_heads_q: 6, n_heads_kv: 2, head_dim: 8, head_dim_v: 8 };
    let mut data = inputs::Problem::normal(shape, 3);
    let lens = [50, 0, 17];
    for (batch, len) in lens.iter().enumerate() {
        for head in 0..shape.n_heads_kv {
            for j in *len as usize..shape.n_kv {
                data.k_row(batch, head, j).fill(f32::NAN);
                data.v_row(batch, head, j).fill(f32::NAN);
            }
        }
    }
    let x = data.qkv().unwrap();
    let sinks = [0.5, -1.0, 2.0, 0.0, 3.0, -4.0];
    let flash = Flash::causal();
    let problem = Problem::cached(*x.q(), *x.k(), *x.v(), Some(&lens)).unwrap();
    let (out, lse) = run(flash.call().sinks(&sinks), problem);
    for (batch, len) in lens.iter().enumerate() {
        let one = |view: &[f32], heads: usize, n: usize, width: usize| -> Vec<f32> {
            let head = |h: usize| view[(batch * heads + h) * n * width..][..n * width].to_vec();
            (0..heads).flat_map(head).collect()
        };
        let (q, k) = (one(&data.q, 6, 2, 8), one(&data.k, 2, 50, 8));
        let v = one(&data.v, 2, 50, 8);
        let view = |name, data, heads, n| View::contiguous(name, data, [1, heads, n, 8]).unwrap();
        let keys = 0..*len as usize;
        let part = Qkv::new(
            view("q", &q, 6, 2),
            view("k", &k, 2, 50).narrow(keys.clone()),
            view("v", &v, 2, 50).narrow(keys),
        );
        let want = alone(&flash, &part.unwrap(), Some(&sinks));
        assert_close(&format!("batch {batch}"), &out[batch * 96..][..96], &want.out, TOL);
        assert_close(&format!("batch {batch}"), &lse[batch * 12..][..12], want.lse.as_ref().unwrap(), TOL);
    }
}

#[test]
fn pages_equal_the_contiguous_cache() {
    let (page_size, lens) = (8, [21, 64, 0]);
    let shape =
        AttnShape { batch: 3, n_q: 3, n_kv: 64, n_heads_q: 4, n_heads_kv: 2, head_dim: 16, head_dim_v: 12 };
    let data = inputs::Problem::normal(shape, 5);
    // Pages in a scrambled order, stored [page, slot, head, width]; what no sequence owns is NaN.
    let (n_pages, columns) = (20, shape.n_kv / page_size);
    let mut table = vec![-1; shape.batch * columns];
    let fill = |rows: &[f32], width: usize| {
        vec![f32::NAN; n_pages * page_size * shape.n_heads_kv * width * rows.len().min(1)]
    };
    let (mut k_pages, mut v_pages) = (fill(&data.k, 16), fill(&data.v, 12));
    let mut next = 0;
    for (batch, len) in lens.iter().enumerate() {
        for t in 0..*len as usize {
            let entry = batch * columns + t / page_size;
            if t % page_size == 0 {
                next += 1;
                table[entry] = next * 7 % n_pages as i32;
            }
            for head in 0..shape.n_heads_kv {
                let at = (table[entry] as usize * page_size + t % page_size) * shape.n_heads_kv + head;
                let from = (batch * shape.n_heads_kv + head) * shape.n_kv + t;
                k_pages[at * 16..][..16].copy_from_slice(&data.k[from * 16..][..16]);
                v_pages[at * 12..][..12].copy_from_slice(&data.v[from * 12..][..12]);
            }
        }
    }
    let view = |name, data, width: usize| {
        let strides = [page_size * shape.n_heads_kv * width, width, shape.n_heads_kv * width, 1];
        KvView::from(View::new(name, data, [n_pages, shape.n_heads_kv, page_size, width], strides).unwrap())
    };
    let paged = PagedKv {
        k: view("k_cache", &k_pages, 16),
        v: view("v_cache", &v_pages, 12),
        block_table: &table,
        lens: &lens,
    };
    let x = data.qkv().unwrap();
    for flash in [Flash::full(), Flash::causal(), Flash { window_left: Some(10), ..Flash::causal() }] {
        let got = run(flash.call(), Problem::paged(*x.q(), paged).unwrap());
        let want = run(flash.call(), Problem::cached(*x.q(), *x.k(), *x.v(), Some(&lens)).unwrap());
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
        assert_close("out", &got.0, &wide(want.0), TOL);
        assert_close("lse", &got.1, &wide(want.1), TOL);
    }
    let lost = PagedKv { block_table: &table.iter().map(|p| p + 15).collect::<Vec<_>>(), ..paged };
    let error = Problem::paged(*x.q(), lost).unwrap_err().to_string();
    assert!(error.contains("block_table, row 0") && error.contains("below 20"), "{error}");
}

#[test]
fn few_queries_against_many_keys_are_split_and_merged() {
    // Windows so far back that some shares of the keys see nothing.
    for (heads, n_q) in [(4, 1), (2, 3), (1, 40)] {
        let shape = AttnShape {
            n_q,
            n_kv: 5000,
            n_heads_q: heads,
            n_heads_kv: heads.min(2),
            ..AttnShape::square(1, 1, 24)
        };
        let data = inputs::Problem::normal(shape, 11);
        let x = data.qkv().unwrap();
        let sinks = vec![1.5; heads];
        let late = Predicate(|p: Pair| p.j > 4200 || p.j.is_multiple_of(7));
        let band = Band { offset: 4000, left: Some(3000), right: None };
        let mask = And(band, late);
        let call = Flash::full().call().mask(&mask).sinks(&sinks);
        let (out, lse) = run(call, x.into());
        let want = call.definition(&x).unwrap();
        assert_close("out", &out, &want.out, TOL);
        assert_close("lse", &lse, want.lse.as_ref().unwrap(), TOL);
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let again = pool.install(|| run(call, x.into()));
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&again.0), bits(&out), "{threads} threads");
            assert_eq!(bits(&again.1), bits(&lse), "{threads} threads");
        }
    }
}

/// Every query sees its own scattered keys.
struct Scattered;

impl Mask for Scattered {
    fn sees(&self, p: Pair) -> bool {
        (p.j * 13 + p.i / 32 * 5 + p.head * 3).is_multiple_of(17)
    }

    fn spans(
        &self,
        head: attn_core::mask::Head,
        rows: std::ops::Range<usize>,
        n_kv: usize,
    ) -> Vec<std::ops::Range<usize>> {
        (0..n_kv).filter(|j| rows.clone().any(|i| self.sees(head.pair(i, *j)))).map(|j| j..j + 1).collect()
    }
}

#[test]
fn single_keys_are_gathered() {
    for (group, n_q) in [(1, 100), (4, 5), (8, 1)] {
        let shape =
            AttnShape { n_q, n_kv: 3000, n_heads_q: group, n_heads_kv: 1, ..AttnShape::square(1, 1, 16) };
        let mut data = inputs::Problem::normal(shape, 2);
        // Key 1 is seen by nobody of the first block of head 0.
        data.v_row(0, 0, 1).fill(f32::NAN);
        let x = data.qkv().unwrap();
        let call = Flash::full().call().mask(&Scattered);
        let (out, lse) = run(call, x.into());
        let want = call.definition(&x).unwrap();
        assert_close("out", &out, &want.out, TOL);
        assert_close("lse", &lse, want.lse.as_ref().unwrap(), TOL);
    }
}

#[test]
fn malformed_sequences_are_refused() {
    let data = inputs::Problem::normal(AttnShape { n_kv: 6, ..AttnShape::square(1, 4, 8) }, 1);
    let x = data.qkv().unwrap();
    let error = |cu_q: &[i32], cu_kv: &[i32]| Problem::packed(x, cu_q, cu_kv).unwrap_err().to_string();
    assert!(error(&[], &[0, 6]).contains("cu_seqlens_q is empty"));
    assert!(error(&[1, 4], &[0, 6]).contains("first entry 1"));
    assert!(error(&[0, 3], &[0, 6]).contains("last entry 3, expected 4"));
    assert!(error(&[0, 3, 2, 4], &[0, 1, 2, 6]).contains("2 after 3"));
    assert!(error(&[0, 4], &[0, 3, 6]).contains("cu_seqlens_kv: entries is 3, expected 2"));
    let cached = |lens: &[i32]| Problem::cached(*x.q(), *x.k(), *x.v(), Some(lens)).unwrap_err().to_string();
    assert!(cached(&[7]).contains("from 0 to 6"));
    assert!(cached(&[-1]).contains("from 0 to 6"));
    assert!(cached(&[1, 2]).contains("lens: batch is 2, expected 1"));
}

#[test]
fn dropout_and_norms_equal_the_definition() {
    let shape =
        AttnShape { batch: 2, n_q: 70, n_kv: 150, n_heads_q: 4, n_heads_kv: 2, head_dim: 20, head_dim_v: 9 };
    let data = inputs::Problem::normal(shape, 9).scale_queries(3.0);
    let x = data.qkv().unwrap();
    let gamma: Vec<f32> = (0..20).map(|c| 0.5 + c as f32 / 10.0).collect();
    let rms = QkNorm { kind: NormKind::Rms { eps: 1e-6 }, gamma_q: Some(&gamma), gamma_k: Some(&gamma) };
    let l2 = QkNorm { kind: NormKind::L2 { eps: 1e-12 }, gamma_q: None, gamma_k: None };
    let dropout = Dropout::new(0.3, 42).unwrap();
    let everything = Flash { softcap: Some(5.0), ..Flash::causal() };
    for (what, call) in [
        ("dropout", Flash::full().call().dropout(dropout)),
        ("rms", Flash::causal().call().qk_norm(rms)),
        ("l2", Flash { softmax_scale: Some(10.0), ..Flash::full() }.call().qk_norm(l2)),
        ("both", everything.call().qk_norm(rms).dropout(dropout)),
        ("all dropped", Flash::full().call().dropout(Dropout::new(1.0, 1).unwrap())),
    ] {
        let (out, lse) = run(call, x.into());
        let want = call.definition(&x).unwrap();
        assert_close(what, &out, &want.out, TOL);
        assert_close(what, &lse, want.lse.as_ref().unwrap(), TOL);
    }
    let short = QkNorm { gamma_q: Some(&gamma[..3]), ..rms };
    let mut out = vec![7.0; shape.out().iter().product()];
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    let error = Flash::full().call().qk_norm(short).forward(x, view.into(), None).unwrap_err().to_string();
    assert!(error.contains("gamma_q") && out.iter().all(|x| *x == 7.0), "{error}");
}
