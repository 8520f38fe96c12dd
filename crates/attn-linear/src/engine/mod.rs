//! The recurrence engine: a matrix-valued state a head, written and read once a token.
//!
//! For one head, with features `q_t, k_t [key_dim]`, values `v_t [value_dim]` and a state `S [key_dim, value_dim]`:
//!
//! ```text
//! S_t = e^g S_(t-1) + k_t v_t^T             z_t = e^g z_(t-1) + k_t
//! o_t = scale q_t^T S_t                     divided, with a normaliser, by  scale q_t . z_t + eps
//! ```
//!
//! A variant is a row of options ([`Spec`]): the front end that turns inputs into features ([`FeatureMap`](crate::feature_map::FeatureMap)), the decay
//! `g` ([`Decay`]), the back end ([`Normaliser`]). The same function has three forms, which must agree:
//!
//! | form | work | used for |
//! |---|---|---|
//! | [`naive`]: the quadratic definition `O = (scale Q K^T o L) V`, `L_ij = e^((i-j) g)` for `j <= i`, and the recurrence above, both in f64 | `O(n^2)` | the truth |
//! | chunked: a chunk of tokens by its quadratic form, the past through the state | `O(n)`, all of it matrix products | prefill |
//! | recurrent: token by token | `O(n)` | decoding |
//!
//! Without `causal` every query reads the state of all keys: two products, no decay.
//!
//! A query stands at the end: with `n_q < n_kv` the first `n_kv - n_q` keys go into the state before the first query,
//! with `n_q > n_kv` the first `n_q - n_kv` queries see nothing and give zeros.
//!
//! A task is one (batch, query head): fewer heads than threads leave threads idle. A task's arithmetic depends on
//! nothing else, so the result does not depend on the number of threads.
//!
//! Sources: Katharopoulos et al. 2020 (linear attention as a recurrence); Sun et al. 2023 and Yang et al. 2024 (the
//! chunked form).

mod chunked;
mod head;
mod lanes;
pub mod naive;
mod powers;
mod recurrent;
mod spec;
mod state;
mod stream;

pub use spec::{Decay, Normaliser, Spec};
pub use state::{State, StateShape};

use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnShape, Cost, DType, Element, OutMut, Qkv, Result, TypedOp, TypedQkv, ViewMut};
use head::{Head, Workspace};

/// Below this many FLOPs waking other threads costs more than it gives.
const SERIAL_FLOPS: u64 = 1 << 20;

impl Spec {
    /// Runs over `x`. With a `state`, it is the memory before the first key, and afterwards the one after the last.
    ///
    /// Cost: [`Spec::cost`]. Memory: one workspace a thread, and a state a thread if none is given.
    ///
    /// # Errors
    /// [`AttnError`](attn_core::AttnError) if `out` or `state` do not fit or the options contradict each other; nothing
    /// has then been written. [`AttnError::Unsupported`](attn_core::AttnError::Unsupported) for a state together with more queries than keys under `causal`: some
    /// queries would stand before it.
    pub fn forward(&self, x: Qkv<'_>, out: OutMut<'_>, state: Option<&mut State>) -> Result<()> {
        x.with_out(out, Forward { spec: self, state })
    }

    /// FLOPs of the matrix products, and what a call without a state allocates.
    pub fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let workspace = Workspace::bytes(self, shape, dtype);
        let threads = heads.min(rayon::current_num_threads() as u64);
        Cost::of(shape, dtype, heads * self.head_flops(shape), threads * workspace)
    }

    fn head_flops(&self, shape: &AttnShape) -> u64 {
        let (key_dim, value_dim) = (self.key_dim(shape.head_dim) as u64, shape.head_dim_v as u64);
        let (n_q, n_kv) = (shape.n_q as u64, shape.n_kv as u64);
        let through_state = 2 * (n_q + n_kv) * key_dim * value_dim;
        if !self.causal {
            return through_state;
        }
        let seen = n_q.min(n_kv);
        let chunk = (self.chunk_len as u64).clamp(1, seen.max(1));
        let pairs = |c: u64| c * (c + 1) / 2;
        let within = (seen / chunk) * pairs(chunk) + pairs(seen % chunk);
        through_state + 2 * within * (key_dim + value_dim)
    }
}

struct Forward<'a> {
    spec: &'a Spec,
    state: Option<&'a mut State>,
}

impl TypedOp for Forward<'_> {
    type Output = ();

    fn run<E: Element>(self, x: TypedQkv<'_, E>, out: ViewMut<'_, E>) -> Result<()> {
        let (spec, shape) = (self.spec, x.shape);
        spec.check(shape.n_heads_q)?;
        if let Some(state) = &self.state {
            spec.check_state(&shape, state)?;
        }
        let isa = Isa::current();
        let mut blocks = out.into_blocks(usize::MAX);
        let mut states = self.state.map(State::heads_mut);
        let heads = (0..shape.batch).flat_map(|batch| (0..shape.n_heads_q).map(move |head| (batch, head)));
        let tasks = heads.map(|(batch, head)| {
            let kv_head = shape.kv_head(head);
            Head {
                spec,
                isa,
                q: x.q.head(batch, head),
                k: x.k.head(batch, kv_head),
                v: x.v.head(batch, kv_head),
                log_decay: spec.decay.of_head(head),
                // An output without rows has no blocks.
                out: blocks.next().map(|block| block.out),
                state: states.as_mut().and_then(Iterator::next),
            }
        });
        let tasks: Vec<Head<'_, E>> = tasks.collect();
        let workspace = || Workspace::new(spec, &shape, E::DTYPE);
        if tasks.len() as u64 * spec.head_flops(&shape) < SERIAL_FLOPS {
            let mut workspace = workspace();
            tasks.into_iter().for_each(|head| head.run(&mut workspace));
        } else {
            for_each_task(tasks.into_iter(), workspace, |workspace, head| head.run(workspace));
        }
        Ok(())
    }
}
