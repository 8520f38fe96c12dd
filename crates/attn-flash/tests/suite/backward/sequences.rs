//! Packed sequences against each of them alone.

use super::case::{Case, TOL, spec};
use attn_core::AttnShape;
use attn_core::mask::{BandPerBatch, Mask, SeeAll};
use attn_core::score::Unchanged;
use attn_flash::engine::{Problem, Spec};
use attn_testkit::compare::assert_close;

#[test]
fn packed_sequences_equal_each_alone() {
    // Empty on either side, longer and shorter than a block.
    let (cu_q, cu_kv) = ([0, 3, 3, 320, 400, 410], [0, 5, 9, 300, 300, 700]);
    let shape =
        AttnShape { batch: 1, n_heads_q: 4, n_heads_kv: 2, n_q: 410, n_kv: 700, head_dim: 8, head_dim_v: 6 };
    let case = Case::new(shape);
    let key_bias: Vec<f32> = (0..700).map(|j| (j as f32 * 0.3).sin()).collect();
    let sinks = [0.3, -0.5, 1.0, 0.0];
    let x = case.inputs.qkv().unwrap();
    let lens =
        |s: usize| ((cu_q[s] as usize, cu_q[s + 1] as usize), (cu_kv[s] as usize, cu_kv[s + 1] as usize));
    let offset = |s: usize| {
        let ((q0, q1), (k0, k1)) = lens(s);
        (k1 - k0) as isize - (q1 - q0) as isize
    };
    let offsets: Vec<isize> = (0..5).map(offset).collect();
    let causal = BandPerBatch::new(offsets.clone(), None, Some(0), &AttnShape { batch: 5, ..shape }).unwrap();
    for (mask, is_causal) in [(&SeeAll as &dyn Mask, false), (&causal, true)] {
        let all = Spec { key_bias: Some(&key_bias), sinks: Some(&sinks), ..spec(mask, &Unchanged) };
        let found = case.backward(Problem::packed(x, &cu_q, &cu_kv).unwrap(), &all, None);
        let mut of_sinks = vec![0.0; 4];
        for (s, &offset) in offsets.iter().enumerate() {
            let ((q0, q1), (k0, k1)) = lens(s);
            let part = |rows: &[f32], heads: usize, n: usize, width: usize, range: (usize, usize)| {
                let head = |h: usize| rows[(h * n + range.0) * width..(h * n + range.1) * width].to_vec();
                (0..heads).flat_map(head).collect::<Vec<f32>>()
            };
            let mut alone = Case::new(AttnShape { n_q: q1 - q0, n_kv: k1 - k0, ..shape });
            alone.inputs.q = part(&case.inputs.q, 4, 410, 8, (q0, q1));
            alone.inputs.k = part(&case.inputs.k, 2, 700, 8, (k0, k1));
            alone.inputs.v = part(&case.inputs.v, 2, 700, 6, (k0, k1));
            alone.grad_out = part(&case.grad_out, 4, 410, 6, (q0, q1));
            alone.grad_lse = part(&case.grad_lse, 4, 410, 1, (q0, q1));
            let one = BandPerBatch::new(vec![offset], None, Some(0), &alone.shape).unwrap();
            let mask = if is_causal { &one as &dyn Mask } else { &SeeAll };
            let spec =
                Spec { key_bias: Some(&key_bias[k0..k1]), sinks: Some(&sinks), ..spec(mask, &Unchanged) };
            let want = alone.want(&spec, None);
            let what = |name: &str| format!("sequence {s}: {name}");
            assert_close(&what("dq"), &part(&found.q, 4, 410, 8, (q0, q1)), &want.q, TOL);
            assert_close(&what("dk"), &part(&found.k, 2, 700, 8, (k0, k1)), &want.k, TOL);
            assert_close(&what("dv"), &part(&found.v, 2, 700, 6, (k0, k1)), &want.v, TOL);
            assert_close(&what("dkey_bias"), &found.key_bias[k0..k1], &want.key_bias, TOL);
            of_sinks.iter_mut().zip(want.sinks).for_each(|(sum, x)| *sum += x);
        }
        assert_close("dsinks", &found.sinks, &of_sinks, TOL);
    }
}
