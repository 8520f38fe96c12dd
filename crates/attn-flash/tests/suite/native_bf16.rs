//! Products of bf16 pairs against the f64 oracle of the same bf16 inputs: masks, scores, sequences, shapes; who chooses them.
//!
//! Weights and outputs are rounded to bf16 once each, hence two unit roundoffs of the largest output; the normaliser is the
//! sum of rounded weights, hence one unit roundoff for a log-sum-exp.

use attn_core::dropout::Dropout;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{And, Band, DenseMask, KeysBelow, Mask, Or, Pair, Predicate, SeeAll};
use attn_core::qk_norm::{NormKind, QkNorm};
use attn_core::score::{Alibi, Bias, ScoreFn, ScoreMod, SoftCap, Then, Unchanged};
use attn_core::simd::{Isa, with_isa};
use attn_core::tile::Bf16Dot;
use attn_core::{AttnError, AttnShape, Qkv, View, ViewMut};
use attn_flash::engine::{PagedKv, Problem, Spec, attend_any};
use attn_flash::{Flash, HalfProducts, TileSizes};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::{self, Layout, StoredProblem};
use half::bf16;

/// Unit roundoff of bf16.
const U: f64 = 1.0 / 256.0;
const OUT: Tol = Tol::ScaledMax(2.0 * U);
const LSE: Tol = Tol::AllClose { atol: U, rtol: 4e-6 };
const SCALE: f32 = 0.25;

/// Trait objects: one kernel for all masks and score functions.
type DynSpec<'a> = Spec<'a, dyn Mask + 'a, dyn ScoreMod + 'a>;

fn native<'a>(mask: &'a dyn Mask, score_mod: &'a dyn ScoreMod) -> DynSpec<'a> {
    Spec { half_products: HalfProducts::Native, ..Spec::new(SCALE, mask, score_mod) }
}

#[allow(clippy::print_stderr)]
fn available() -> bool {
    let available = Bf16Dot::detect().is_some() && Isa::available().contains(&Isa::Avx512);
    if !available {
        eprintln!("skipped: this CPU has no bf16 dot product");
    }
    available
}

fn stored(shape: AttnShape, layout: Layout) -> StoredProblem<bf16> {
    inputs::Problem::normal(shape, 5).store(layout)
}

/// Into buffers full of NaN, so that a row nobody writes is seen.
fn run<'a>(problem: impl Into<Problem<'a>>, spec: &DynSpec<'_>) -> Result<(Vec<bf16>, Vec<f32>), AttnError> {
    let problem = problem.into();
    let shape = problem.shape();
    let mut out = vec![bf16::NAN; shape.out().iter().product()];
    let mut lse = vec![f32::NAN; shape.rows()];
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    attend_any(problem, view.into(), Some(&mut lse), spec).map(|()| (out, lse))
}

fn exact(x: &Qkv<'_>, spec: &DynSpec<'_>) -> Reference {
    let sinks: Option<Vec<f64>> = spec.sinks.map(|s| s.iter().map(|x| f64::from(*x)).collect());
    let (mask, score_mod) = (spec.mask, spec.score_mod);
    let softmax_scale = Some(f64::from(spec.softmax_scale));
    Exact {
        softmax_scale,
        mask,
        score_mod,
        key_bias: spec.key_bias,
        sinks: sinks.as_deref(),
        ..Exact::default()
    }
    .all(x)
    .unwrap()
}

fn check(what: &str, x: Qkv<'_>, spec: DynSpec<'_>) {
    let want = exact(&x, &spec);
    let sizes = [None, Some((32, 1)), Some((96, 51)), Some((64, 130))];
    for tiles in sizes.map(|sizes| sizes.map(|(q, kv)| TileSizes::new(q, kv).unwrap())) {
        let (out, lse) = run(x, &Spec { tiles, ..spec }).unwrap();
        let what = format!("{what} {:?} {tiles:?}", x.shape());
        assert_close(&format!("{what}: out"), &out, &want.out, OUT);
        assert_close(&format!("{what}: lse"), &lse, want.lse.as_ref().unwrap(), LSE);
    }
}

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 1, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

#[test]
fn every_mask_at_every_tile_edge_equals_the_oracle() {
    if !available() {
        return;
    }
    for (n_q, n_kv) in [(0, 3), (3, 0), (9, 1), (31, 33), (33, 257), (65, 128), (130, 129)] {
        let data = stored(shape(n_q, n_kv), Layout::HeadsFirst);
        let x = data.qkv().unwrap();
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        let sinks = And(causal, Or(KeysBelow(3), Band { left: Some(7), ..causal }));
        let seen: Vec<bool> = (0..n_q * n_kv).map(|x| x % 3 == 0 && (x / n_kv) % 4 != 1).collect();
        let dense = DenseMask::new(&seen, &[n_q, n_kv], &x.shape()).unwrap();
        let masks: [(&str, &dyn Mask); 7] = [
            ("all", &SeeAll),
            ("causal", &causal),
            ("window", &Band { left: Some(5), right: Some(3), ..causal }),
            ("first keys and window", &sinks),
            ("closure", &Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2)),
            ("nobody", &Predicate(|_| false)),
            ("dense", &dense),
        ];
        for (name, mask) in masks {
            check(name, x, native(mask, &Unchanged));
        }
    }
}

#[test]
fn every_width_order_and_grouping_equals_the_oracle() {
    if !available() {
        return;
    }
    for (head_dim, head_dim_v) in [(1, 1), (2, 3), (15, 16), (16, 17), (33, 31), (64, 64), (80, 128)] {
        for layout in Layout::ALL {
            let shape =
                AttnShape { batch: 2, n_heads_q: 6, n_heads_kv: 2, head_dim, head_dim_v, ..shape(37, 75) };
            let data = stored(shape, layout);
            let causal = Band { offset: 38, left: None, right: Some(0) };
            check("grouped", data.qkv().unwrap(), native(&causal, &Unchanged));
        }
    }
}

#[test]
fn score_mods_key_biases_and_sinks_equal_the_oracle() {
    if !available() {
        return;
    }
    let data = stored(shape(40, 71), Layout::HeadsFirst);
    let x = data.qkv().unwrap();
    let s = x.shape();
    let normal = inputs::Problem::normal(AttnShape::square(1, s.rows(), s.n_kv), 9).q;
    let mut bias = normal[..s.rows() * s.n_kv].to_vec();
    bias.iter_mut().step_by(11).for_each(|b| *b = f32::NEG_INFINITY);
    bias[5 * s.n_kv..6 * s.n_kv].fill(f32::NEG_INFINITY); // a row hidden by its bias alone
    let bias = Bias::new(&bias, &[s.n_heads_q, s.n_q, s.n_kv], &s).unwrap();
    let causal = Band { offset: 31, left: None, right: Some(0) };
    let mods: [(&str, &dyn ScoreMod); 5] = [
        ("softcap", &SoftCap::new(2.0).unwrap()),
        ("alibi", &Alibi::new(Alibi::default_slopes(2), &s, 31).unwrap()),
        ("bias", &bias),
        ("cap then bias", &Then(SoftCap::new(2.0).unwrap(), bias)),
        ("closure", &ScoreFn(|score, p: Pair| score * (1.0 + 0.1 * p.head as f32))),
    ];
    let mut key_bias: Vec<f32> = (0..s.n_kv).map(|j| (j as f32).sin()).collect();
    key_bias[8] = f32::NEG_INFINITY;
    for (name, score_mod) in mods {
        let plain = native(&causal, score_mod);
        check(name, x, plain);
        check(name, x, Spec { key_bias: Some(&key_bias), sinks: Some(&[0.5, -1.0]), ..plain });
    }
}

#[test]
fn what_a_row_does_not_see_never_reaches_it() {
    if !available() {
        return;
    }
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 31, 40, 69] {
            let mut problem = inputs::Problem::normal(shape(70, 70), 6);
            problem.k_row(0, 0, place)[2] = poison;
            problem.v_row(0, 0, place)[1] = poison;
            let unseen = Predicate(move |p: Pair| p.j != place);
            check(
                "unseen",
                problem.store::<bf16>(Layout::HeadsFirst).qkv().unwrap(),
                native(&unseen, &Unchanged),
            );
            problem.k_row(0, 0, place)[2] = 0.5;
            let window = Band { offset: 0, left: Some(20), right: Some(0) };
            check(
                "seen by some",
                problem.store::<bf16>(Layout::HeadsFirst).qkv().unwrap(),
                native(&window, &Unchanged),
            );
        }
    }
    // Windows that start and end inside a pair of keys whose other key is not theirs.
    for place in 0..10 {
        let mut problem = inputs::Problem::normal(shape(10, 10), 6);
        problem.k_row(0, 0, place).fill(f32::NAN);
        let diagonal = Band { offset: 0, left: Some(0), right: Some(0) };
        check(
            "diagonal",
            problem.store::<bf16>(Layout::HeadsFirst).qkv().unwrap(),
            native(&diagonal, &Unchanged),
        );
    }
}

#[test]
fn a_nan_query_spoils_its_own_row_alone() {
    if !available() {
        return;
    }
    let mut problem = inputs::Problem::normal(shape(40, 40), 7);
    problem.q_row(0, 1, 7)[0] = f32::NAN;
    check("nan query", problem.store::<bf16>(Layout::HeadsFirst).qkv().unwrap(), native(&SeeAll, &Unchanged));
}

#[test]
fn scores_of_any_size_and_order_keep_their_differences() {
    if !available() {
        return;
    }
    let data = stored(shape(40, 300), Layout::HeadsFirst);
    let x = data.qkv().unwrap();
    for fill in [f32::MIN, -1e30, 1e30, 3e38] {
        let bias = vec![fill; 300];
        let bias = Bias::new(&bias, &[300], &x.shape()).unwrap();
        check(&format!("bias {fill:e}"), x, native(&SeeAll, &bias));
    }
    // The maximum rises from tile to tile, falls, or jumps.
    for slope in [3.0f32, 40.0, -3.0, -40.0] {
        let rising = ScoreFn(move |s, p: Pair| s + slope * (p.j / 20) as f32);
        check(&format!("rising by {slope}"), x, native(&SeeAll, &rising));
    }
}

#[test]
fn packed_sequences_caches_and_pages_equal_each_alone() {
    if !available() {
        return;
    }
    let (cu_q, cu_kv) = ([0, 5, 5, 70, 71, 80], [0, 9, 12, 80, 80, 201]);
    let s = AttnShape { n_heads_q: 4, n_heads_kv: 2, ..shape(80, 201) };
    let data = stored(s, Layout::HeadsFirst);
    let x = data.qkv().unwrap();
    let (out, lse) = run(Problem::packed(x, &cu_q, &cu_kv).unwrap(), &native(&SeeAll, &Unchanged)).unwrap();
    for (rows, keys) in cu_q.windows(2).zip(cu_kv.windows(2)) {
        let (rows, keys) = (rows[0] as usize..rows[1] as usize, keys[0] as usize..keys[1] as usize);
        let part =
            Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(keys.clone()), x.v().narrow(keys)).unwrap();
        let want = exact(&part, &native(&SeeAll, &Unchanged));
        for head in 0..s.n_heads_q {
            let (first, n) = (head * s.n_q + rows.start, rows.len());
            let own = head * n..(head + 1) * n;
            let (d, what) = (s.head_dim_v, format!("rows {rows:?} of head {head}"));
            assert_close(&what, &out[first * d..][..n * d], &want.out[own.start * d..own.end * d], OUT);
            assert_close(&what, &lse[first..][..n], &want.lse.as_ref().unwrap()[own], LSE);
        }
    }

    // Keys of one sequence on pages of 7, last page first; what lies behind its length is NaN.
    let (n_kv, page_size) = (45, 7);
    let s = shape(20, n_kv);
    let data = inputs::Problem::normal(s, 8);
    let want = exact(&data.store::<bf16>(Layout::HeadsFirst).qkv().unwrap(), &native(&SeeAll, &Unchanged));
    let pages = n_kv.div_ceil(page_size);
    let paged = |rows: &[f32], width: usize| {
        let mut all = vec![bf16::NAN; pages * page_size * width];
        for (j, row) in rows.chunks(width).enumerate() {
            let at = (pages - 1 - j / page_size) * page_size + j % page_size;
            all[at * width..][..width].iter_mut().zip(row).for_each(|(x, r)| *x = bf16::from_f32(*r));
        }
        all
    };
    let (k, v) = (paged(&data.k, s.head_dim), paged(&data.v, s.head_dim_v));
    let view = |name, data, width| View::contiguous(name, data, [pages, 1, page_size, width]).unwrap();
    let block_table: Vec<i32> = (0..pages as i32).rev().collect();
    let q: Vec<bf16> = data.q.iter().map(|x| bf16::from_f32(*x)).collect();
    let lens = [n_kv as i32];
    let problem = Problem::paged(
        View::contiguous("q", &q, s.q()).unwrap(),
        PagedKv {
            k: view("k", &k, s.head_dim).into(),
            v: view("v", &v, s.head_dim_v).into(),
            block_table: &block_table,
            lens: &lens,
        },
    );
    let (out, lse) = run(problem.unwrap(), &native(&SeeAll, &Unchanged)).unwrap();
    assert_close("pages: out", &out, &want.out, OUT);
    assert_close("pages: lse", &lse, want.lse.as_ref().unwrap(), LSE);
}

#[test]
fn threads_change_no_bit() {
    if !available() {
        return;
    }
    // One head is split along its keys.
    for (heads, n) in [(1, 2500), (5, 300)] {
        let data = stored(AttnShape::square(heads, n, 24), Layout::HeadsFirst);
        let causal = Band { offset: 0, left: None, right: Some(0) };
        let once = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (out, lse) = pool.install(|| run(data.qkv().unwrap(), &native(&causal, &Unchanged))).unwrap();
            (out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), lse)
        };
        assert_eq!(once(1), once(3), "{heads} heads of {n}");
    }
}

#[test]
fn auto_is_native_where_it_can_run_and_widened_elsewhere() {
    let data = stored(AttnShape::square(2, 100, 32), Layout::HeadsFirst);
    let run = |half_products| {
        let spec = Spec { half_products, ..native(&SeeAll, &Unchanged) };
        run(data.qkv().unwrap(), &spec)
    };
    for isa in Isa::available() {
        with_isa(isa, || {
            let (auto, widened) = (run(HalfProducts::Auto).unwrap(), run(HalfProducts::Widen).unwrap());
            match run(HalfProducts::Native) {
                Ok(native) => {
                    assert_eq!(isa, Isa::Avx512);
                    assert_eq!(auto, native);
                    assert_ne!(native, widened, "the weights are rounded");
                }
                Err(error) => {
                    assert!(isa != Isa::Avx512 || Bf16Dot::detect().is_none());
                    assert!(error.to_string().contains("avx512bf16"), "{error}");
                    assert_eq!(auto, widened, "{isa}");
                }
            }
        })
        .unwrap();
    }
}

#[test]
fn what_native_products_cannot_do_is_refused() {
    let shape = AttnShape::square(1, 8, 4);
    let data = inputs::Problem::normal(shape, 3);
    let halves = data.store::<bf16>(Layout::HeadsFirst);
    let norm = QkNorm { kind: NormKind::L2 { eps: 1e-12 }, gamma_q: None, gamma_k: None };
    let native = Flash { half_products: HalfProducts::Native, ..Flash::full() }.call();
    let mut out = vec![bf16::ONE; 32];
    let mut refusal = |call: attn_flash::FlashCall<'_>| {
        let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
        call.forward(halves.qkv().unwrap(), view.into(), None).unwrap_err().to_string()
    };
    let dropout = refusal(native.dropout(Dropout::new(0.5, 1).unwrap()));
    assert!(dropout.contains("half_products = native") && dropout.contains("dropout"), "{dropout}");
    let norm = refusal(native.qk_norm(norm));
    assert!(norm.contains("norm"), "{norm}");
    assert!(out.iter().all(|x| *x == bf16::ONE), "something was written");

    let mut out = vec![1.0f32; 32];
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    let call = Flash::full().call().half_products(HalfProducts::Native);
    let f32s = call.forward(data.qkv().unwrap(), view.into(), None).unwrap_err().to_string();
    assert!(f32s.contains("not all bf16"), "{f32s}");
    assert!(out.iter().all(|x| *x == 1.0), "something was written");
    assert!("fast".parse::<HalfProducts>().unwrap_err().to_string().contains("auto, widen or native"));
}
