//! Against gradients computed by other people's code; see `testdata/README.md`.

use attn_core::mask::{Align, DenseMask, Mask, SeeAll};
use attn_core::registry::{NamedTensor, TensorData};
use attn_core::score::{Alibi, Bias, BiasIndex, ScoreMod, Unchanged};
use attn_core::{View, ViewMut};
use attn_flash::engine::{ForwardResult, Grads, OutputGrad};
use attn_flash::{Flash, HalfProducts};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::golden::{GoldenCase, load_dir};

fn number(case: &GoldenCase, name: &str) -> Option<f64> {
    case.options.get(name).and_then(|number| number.as_f64())
}

/// The file's options in our words.
fn flash(case: &GoldenCase) -> Flash {
    let window = |name| number(case, name).filter(|n| *n >= 0.0).map(|n| n as usize);
    let top_left = case.options.get("align").is_some_and(|align| align == "top_left");
    Flash {
        softmax_scale: number(case, "scale").map(|scale| scale as f32),
        causal: case.options.get("causal").is_some_and(|causal| causal == true),
        align: if top_left { Align::TopLeft } else { Align::BottomRight },
        window_left: window("window_left"),
        window_right: window("window_right"),
        softcap: number(case, "softcap").map(|cap| cap as f32),
        tiles: None,
        half_products: HalfProducts::Auto,
    }
}

fn run(case: &GoldenCase, w: &NamedTensor) {
    let x = case.inputs.qkv().unwrap();
    let (shape, flash) = (x.shape(), flash(case));
    let seen: Option<(Vec<bool>, &[usize])> = case.inputs.get("mask").map(|mask| match &mask.data {
        TensorData::U8(data) => (data.iter().map(|b| *b != 0).collect(), mask.shape.as_slice()),
        _ => panic!("{}: mask", case.case),
    });
    let dense = seen.as_ref().map(|(seen, axes)| DenseMask::new(seen, axes, &shape).unwrap());
    let numbers = ["bias_with_neginf", "bias"].iter().find_map(|name| case.inputs.f32(name).unwrap());
    let bias = numbers.map(|(axes, bias)| Bias::new(bias, axes, &shape).unwrap());
    let alibi = case.inputs.f32("alibi_slopes").unwrap().map(|(_, slopes)| {
        Alibi::new(slopes.to_vec(), &shape, flash.align.offset(shape.n_q, shape.n_kv)).unwrap()
    });
    let mask = dense.as_ref().map_or(&SeeAll as &dyn Mask, |mask| mask);
    let score_mod: &dyn ScoreMod = match (&bias, &alibi) {
        (Some(bias), _) => bias,
        (None, Some(alibi)) => alibi,
        (None, None) => &Unchanged,
    };
    let call = flash.call().mask(mask).score_mod(score_mod);
    let (mut out, mut lse) = (vec![f32::NAN; shape.out().iter().product()], vec![f32::NAN; shape.rows()]);
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    call.forward(x, view.into(), Some(&mut lse)).unwrap();

    let nan = |axes: [usize; 4]| vec![f32::NAN; axes.iter().product()];
    let [mut q, mut k, mut v] = [nan(shape.q()), nan(shape.k()), nan(shape.v())];
    let mut of_bias = vec![f32::NAN; bias.as_ref().map_or(0, BiasIndex::len)];
    let TensorData::F32(w) = &w.data else { panic!("{}: w", case.case) };
    let wanted = case.grads.get("bias").is_some();
    let grads = Grads {
        bias: bias.as_ref().filter(|_| wanted).map(|bias| (bias as &dyn BiasIndex, &mut *of_bias)),
        ..Grads::new(
            ViewMut::contiguous("q", &mut q, shape.q()).unwrap().into(),
            ViewMut::contiguous("k", &mut k, shape.k()).unwrap().into(),
            ViewMut::contiguous("v", &mut v, shape.v()).unwrap().into(),
        )
    };
    let forward =
        ForwardResult { out: View::contiguous("out", &out, shape.out()).unwrap().into(), lse: &lse };
    let grad = OutputGrad { out: View::contiguous("w", w, shape.out()).unwrap().into(), lse: None };
    call.backward(x, forward, grad, grads).unwrap();

    let mut found = vec![("q", q), ("k", k), ("v", v)];
    found.extend(wanted.then_some(("bias", of_bias)));
    for (name, got) in found {
        if let Some(want) = case.grads.get(name) {
            let tol = case.tolerance_for(&format!("grad.{name}")).unwrap();
            let what = format!("{}: grad.{name}", case.case);
            assert_close(&what, &got, &want.data.to_f64(), tolerance(case, tol));
        }
    }
}

/// Where weights are 0 or 1, the gradients of q and k are exactly 0: the difference of two equal products `dout . v`, each
/// rounded to 1e-6, times rows of size 100 (scores of +-1e4) or 10.
fn tolerance(case: &GoldenCase, tol: Tol) -> Tol {
    match case.case.as_str() {
        "adv-scores-1e4" | "adv-scores-neg-1e4" => Tol::AllClose { atol: 5e-4, rtol: 1e-5 },
        "adv-tiny-weights" => Tol::AllClose { atol: 1e-4, rtol: 1e-4 },
        _ => tol,
    }
}

#[test]
fn every_stored_gradient() {
    let cases = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let mut compared = 0;
    // Further inputs and named closures are those of the entry with named tensors, which has its own test.
    let known = ["q", "k", "v", "mask", "bias", "bias_with_neginf", "alibi_slopes"];
    let plain = |case: &&GoldenCase| case.inputs.0.keys().all(|name| known.contains(&name.as_str()));
    for case in cases.iter().filter(plain).filter(|case| !case.case.starts_with("mod-")) {
        if let Some(w) = &case.w {
            run(case, w);
            compared += 1;
        }
    }
    assert!(compared > 40, "{compared} cases");
}
