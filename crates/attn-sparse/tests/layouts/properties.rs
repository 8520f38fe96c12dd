//! What the definitions promise, for the registered variants.

use attn_core::AttnShape;
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band, Head, Mask, SeeAll};
use attn_core::registry::{Options, find};
use attn_core::view::ViewMut;
use attn_sparse::*;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::inputs::Problem;

fn set(pairs: &[&str]) -> Options {
    Options::parse(pairs.iter().copied()).unwrap()
}

/// Settings whose edges the defaults never reach.
fn keep_every_promise(small: &[(&str, &[&[&str]])]) {
    let entries = registry();
    for (name, settings) in small {
        let configs: Vec<Options> = settings.iter().map(|pairs| set(pairs)).collect();
        conformance::check_with(find(&entries, name).unwrap(), &configs);
    }
}

#[test]
fn small_blocks_keep_every_promise() {
    keep_every_promise(&[
        ("bigbird", &[&["block=8", "num_random_blocks=2"], &["block=5", "causal=true", "seed=7"]]),
        (
            "block-layout-bigbird",
            &[&["block=8", "different_layout_per_head=true"], &["block=4", "causal=true"]],
        ),
        (
            "block-layout-bslongformer",
            &[&["block=8", "global_block_indices=1,3"], &["block=4", "causal=true"]],
        ),
        ("block-layout-localslidingwindow", &[&["block=8"], &["block=3", "causal=true"]]),
    ]);
}

#[test]
fn small_windows_of_blocks_keep_every_promise() {
    let fixed: [&[&str]; 2] = [
        &["block=8", "num_local_blocks=4", "horizontal_global_attention=true"],
        &["block=4", "num_local_blocks=4", "num_global_blocks=2", "causal=true"],
    ];
    let variable: [&[&str]; 2] = [
        &["block=8", "local_window_blocks=1,3,2", "num_random_blocks=1"],
        &["block=4", "causal=true", "global_block_end_indices=2"],
    ];
    keep_every_promise(&[("block-layout-fixed", &fixed), ("block-layout-variable", &variable)]);
}

#[test]
fn small_windows_and_strides_keep_every_promise() {
    keep_every_promise(&[
        ("longformer", &[&["window=3", "global_tokens=0,30,31"], &["window=5", "causal=true"]]),
        ("sparse-transformer-strided", &[&["stride=7"], &["stride=16", "merged=false"]]),
        (
            "sparse-transformer-fixed",
            &[&["stride=12", "summary=4"], &["stride=8", "summary=2", "merged=false"]],
        ),
    ]);
}

#[test]
fn small_neighbourhoods_keep_every_promise() {
    let line: [&[&str]; 3] = [
        &["kernel_size=5", "dilation=3"],
        &["kernel_size=8", "stride=4"],
        &["kernel_size=6", "causal=true", "dilation=2"],
    ];
    keep_every_promise(&[
        ("neighborhood-1d", &line),
        ("neighborhood-2d", &[&["kernel_size=3,4", "dilation=2,1"], &["kernel_size=3", "causal=true"]]),
        ("neighborhood-3d", &[&["kernel_size=2,3,3"], &["kernel_size=3", "dilation=1,2,1", "stride=1,2,1"]]),
    ]);
}

#[test]
fn small_grids_and_videos_keep_every_promise() {
    keep_every_promise(&[
        ("axial", &[&["axis=0"], &["axes=3", "causal=true"]]),
        ("radial", &[&["frame=8"], &["frame=3", "first_frame=false"]]),
        ("sliding-tile", &[&["tile=2,3,4", "window=1,2,3"]]),
        (
            "video-heads",
            &[&["frame=8", "token_window=0"], &["frame=16", "kinds=spatial", "first_frame=false"]],
        ),
    ]);
}

/// Settings that cover everything give dense attention.
#[test]
fn what_covers_everything_is_dense() {
    let (entries, shape) = (registry(), AttnShape { n_heads_q: 4, ..AttnShape::square(2, 60, 8) });
    let all: Vec<String> = (0..60).map(|p| p.to_string()).collect();
    let globals = format!("global_tokens={}", all.join(","));
    let dense: [(&str, &[&str]); 18] = [
        ("bigbird", &["block=20"]),
        ("bigbird", &["block=4", "num_random_blocks=15"]),
        ("block-layout-bigbird", &["block=8", "num_random_blocks=8"]),
        ("block-layout-bslongformer", &["block=8", "num_sliding_window_blocks=16"]),
        ("block-layout-fixed", &["block=8", "num_local_blocks=8"]),
        ("block-layout-localslidingwindow", &["block=60"]),
        ("block-layout-variable", &["block=8", "local_window_blocks=8"]),
        ("longformer", &["window=59"]),
        ("longformer", &["window=0", &globals]),
        ("neighborhood-1d", &["kernel_size=60"]),
        ("neighborhood-1d", &["kernel_size=200", "stride=7"]),
        ("neighborhood-2d", &["kernel_size=6,10", "grid=6,10"]),
        ("neighborhood-3d", &["kernel_size=20"]),
        ("axial", &["grid=1,60"]),
        ("axial", &["grid=60,1", "axis=0"]),
        ("radial", &["frame=100"]),
        ("sliding-tile", &["tile=2,2,2", "window=100"]),
        ("video-heads", &["frame=10", "frame_window=5", "token_window=9"]),
    ];
    let causal: [(&str, &[&str]); 7] = [
        ("axial", &["grid=60,1", "causal=true"]),
        ("bigbird", &["block=30", "causal=true"]),
        ("longformer", &["window=59", "causal=true"]),
        ("sparse-transformer-strided", &["stride=60"]),
        ("sparse-transformer-strided", &["stride=1"]),
        ("sparse-transformer-fixed", &["stride=64", "summary=1"]),
        ("sparse-transformer-fixed", &["stride=8", "summary=8"]),
    ];
    let band = Band::causal(&shape, Align::BottomRight);
    let masks: [&dyn Mask; 2] = [&SeeAll, &band];
    for (mask, settings) in masks.into_iter().zip([&dense[..], &causal[..]]) {
        let problem = Problem::normal(shape, 3);
        let want = Exact { mask, ..Exact::default() }.all(&problem.qkv().unwrap()).unwrap();
        for (name, pairs) in settings {
            let attention = find(&entries, name).unwrap().build(&set(pairs)).unwrap();
            let (mut out, mut lse) = (vec![f32::NAN; want.out.len()], vec![f32::NAN; shape.rows()]);
            let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
            let softmax = attention.as_softmax().unwrap();
            softmax.forward_with_lse(problem.qkv().unwrap(), view.into(), &mut lse).unwrap();
            assert_close(&format!("{name} {pairs:?}"), &out, &want.out, Tol::ScaledMax(4e-6));
            let want = want.lse.as_ref().unwrap();
            assert_close(&format!("{name} {pairs:?}: lse"), &lse, want, Tol::ScaledMax(4e-6));
        }
    }
}

const HEAD: Head = Head { batch: 0, head: 0 };

/// Every row of a neighbourhood has as many keys as fit, wherever it stands.
#[test]
fn rows_of_a_neighbourhood_see_as_many_keys() {
    let shape = AttnShape::square(1, 90, 4);
    let axis = |kernel_size, dilation| AxisWindow { dilation, ..AxisWindow::of(kernel_size) };
    let mask = Neighborhood { axes: [axis(3, 2), axis(20, 1)], grid: Some([6, 15]) }.mask(&shape).unwrap();
    for i in 0..90 {
        let seen = (0..90).filter(|j| mask.sees(HEAD.pair(i, *j))).count();
        assert_eq!(seen, 3 * 15, "row {i}");
    }
}

/// Random blocks are new ones, as many as asked for, the same for the same seed; causal ones do not depend on what follows.
#[test]
fn random_blocks_are_part_of_the_layout() {
    let bigbird = |seed, causal| BigBird {
        block: 4,
        num_random_blocks: 3,
        num_window_blocks: 3,
        num_global_blocks: 1,
        seed,
        causal,
    };
    let rows = |pattern: BigBird, m: usize| (0..m).map(|row| pattern.row(1, row, m)).collect::<Vec<_>>();
    assert_eq!(rows(bigbird(1, false), 40), rows(bigbird(1, false), 40));
    assert_ne!(rows(bigbird(1, false), 40), rows(bigbird(2, false), 40));
    assert_ne!(bigbird(1, false).row(0, 20, 40), bigbird(1, false).row(1, 20, 40));
    for row in &rows(bigbird(1, false), 40)[2..38] {
        let different: std::collections::BTreeSet<_> = row.iter().collect();
        assert_eq!(different.len(), row.len());
        assert!(row.len() == 3 + 2 + 3 || row.len() == 3 + 1 + 3, "{row:?}");
    }
    assert_eq!(rows(bigbird(1, true), 40)[..30], rows(bigbird(1, true), 30));
}

/// A window misses a planted key far away; a strided query, a global token and a summary find it.
#[test]
fn far_keys_are_found_as_defined() {
    let n = 1 << 20;
    let shape = AttnShape::square(1, n, 4);
    let last = n - 1;
    let strided = StridedAttention { stride: None, merged: true }.mask(&shape).unwrap();
    assert!(
        strided.sees(HEAD.pair(last, last - 5 * 1024)) && !strided.sees(HEAD.pair(last, last - 5 * 1024 - 1))
    );
    let longformer = Longformer { window: 256, globals: GlobalTokens::shared([7]), causal: false };
    let mask = longformer.mask(&shape).unwrap();
    assert!(mask.sees(HEAD.pair(last, 7)) && mask.sees(HEAD.pair(7, last)) && !mask.sees(HEAD.pair(last, 8)));
    let fixed = FixedAttention { stride: None, summary: 32, merged: true }.mask(&shape).unwrap();
    assert!(fixed.sees(HEAD.pair(last, 1023)) && !fixed.sees(HEAD.pair(last, 991)));
}

/// The window of radial attention halves whenever the distance of frames doubles.
#[test]
fn radial_windows_halve() {
    let mask = Radial { frame: 16, first_frame: false }.mask(&AttnShape::square(1, 16 * 80, 4)).unwrap();
    let seen = |distance: usize| {
        let (row, frame) = (40 * 16 + 8, 40 - distance);
        (0..16).filter(|place| mask.sees(HEAD.pair(row, frame * 16 + place))).count()
    };
    // s / P is 16, 16, 8, 8, 4, ... up to 1 at P = 16; a window of w has 2 w - 1 places, cut at the frame.
    assert_eq!([0, 1, 2, 3, 4, 7, 8, 15, 16, 31].map(seen), [16, 16, 15, 15, 7, 7, 3, 3, 1, 1]);
    // At P = 32, every second distance.
    assert_eq!([32, 33, 34, 35].map(seen), [1, 0, 1, 0]);
}
