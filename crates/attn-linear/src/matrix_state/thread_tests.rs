//! Few heads on many threads give what one thread gives, bit by bit.

use super::tests::numbers;
use super::{Inputs, StateAttention, StateVariant};
use attn_core::{Element, View, ViewMut};

/// Outputs and the memory after them, of some heads on so many threads.
fn on_threads<V: StateVariant, E: Element>(variant: &V, threads: usize, [heads, n]: [usize; 2]) -> Vec<u32> {
    let d = 40;
    let shape = [1, heads, n, d];
    let x =
        [1, 2, 3].map(|seed| -> Vec<E> { numbers(heads * n * d, seed).into_iter().map(E::store).collect() });
    let view = |name, x| View::contiguous(name, x, shape).unwrap();
    let inputs = Inputs::new(view("q", &x[0]), view("k", &x[1]), view("v", &x[2]));
    let mut out = vec![E::store(f32::NAN); heads * n * d];
    let attention = StateAttention::new(variant.clone());
    let mut memory = attention.memory(&inputs).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let out = ViewMut::contiguous("out", &mut out, shape).unwrap();
        attention.forward_inputs(&inputs, out.into(), Some(&mut memory)).unwrap();
    });
    let out = out.iter().map(|x| x.load());
    out.chain(memory.numbers().iter().copied()).map(f32::to_bits).collect()
}

fn few_heads_on_many_threads<V: StateVariant>(causal: bool) {
    let options = attn_core::registry::Options::new();
    for (chunk_len, heads, n) in [(8, 1, 1024), (8, 1, 1025), (11, 1, 1217), (11, 5, 700)] {
        let options = options.clone().with("chunk_len", chunk_len);
        let has_causal = V::OPTIONS.iter().any(|o| o.name == "causal");
        let options = if has_causal { options.with("causal", causal) } else { options };
        let variant = V::from_options(&options).unwrap();
        let want = on_threads::<V, f32>(&variant, 1, [heads, n]);
        for threads in [2, 3] {
            let same = want == on_threads::<V, f32>(&variant, threads, [heads, n]);
            assert!(same, "{} chunk {chunk_len} {heads} heads n {n} on {threads} threads", V::NAME);
        }
    }
}

#[test]
fn few_heads_have_the_same_bits_on_many_threads() {
    few_heads_on_many_threads::<crate::Linear>(true);
    few_heads_on_many_threads::<crate::Linear>(false);
    few_heads_on_many_threads::<crate::LinearElu>(true);
    few_heads_on_many_threads::<crate::recurrent::SimpleGla>(true);
    few_heads_on_many_threads::<crate::recurrent::Gla>(true);
    few_heads_on_many_threads::<crate::recurrent::Rwkv6>(true);
    few_heads_on_many_threads::<crate::recurrent::DeltaNet>(true);
    few_heads_on_many_threads::<crate::recurrent::Kda>(true);
    few_heads_on_many_threads::<crate::recurrent::Rwkv7>(true);
    few_heads_on_many_threads::<crate::recurrent::DeltaProduct>(true);
}

#[test]
fn one_head_of_halves_has_the_same_bits_on_many_threads() {
    let variant = crate::recurrent::Kda::from_options(&attn_core::registry::Options::new()).unwrap();
    let want = on_threads::<_, half::bf16>(&variant, 1, [1, 1100]);
    assert!(want == on_threads::<_, half::bf16>(&variant, 2, [1, 1100]));
}
