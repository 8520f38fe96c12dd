//! What a call allocates is what its cost says. A program of its own: it counts every allocation.

use attn_core::{Attention, AttnShape, DType, Qkv, View, ViewMut};
use attn_hier::HTransformer;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

#[test]
fn a_call_allocates_what_its_cost_says() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for (n_heads_q, n_heads_kv, n, block) in [(1, 1, 20_000, 64), (4, 1, 5_000, 32), (4, 2, 4_096, 8)] {
        let (head_dim, head_dim_v) = (32, 48);
        let shape = AttnShape { batch: 1, n_heads_q, n_heads_kv, n_q: n, n_kv: n, head_dim, head_dim_v };
        let x: Vec<f32> = (0..n * n_heads_q * head_dim_v).map(|i| (i as f32).sin()).collect();
        let view =
            |name, shape: [usize; 4]| View::contiguous(name, &x[..shape.iter().product()], shape).unwrap();
        let mut out = vec![0.0; x.len()];
        let qkv = Qkv::new(view("q", shape.q()), view("k", shape.k()), view("v", shape.v())).unwrap();
        let variant = HTransformer::new(block).unwrap();
        let (used, said) = pool.install(|| {
            let before = ALLOCATED.current_usage();
            ALLOCATED.reset_peak_usage();
            let out = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
            variant.forward(qkv, out.into()).unwrap();
            (ALLOCATED.peak_usage() - before, variant.cost(&shape, DType::F32).bytes_allocated as usize)
        });
        assert!(used <= said + said / 20, "{shape:?}: {used} bytes used, {said} said");
        assert!(used >= said - said / 5, "{shape:?}: {used} bytes used, {said} said");
    }
}
