//! Gradients of kernelised attention.

use super::attention::FeatureAttention;
use super::variant::{FeatureInputs, FeatureVariant, Normaliser};
use crate::scan::{Gradients, ScanState, Tokens, backward};
use attn_core::{Result, TensorView};

/// Gradients of kernelised attention.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By the gates, of their shape; empty if none were given.
    pub gate: Vec<f32>,
    /// By the state before the first token; empty without `causal`.
    pub state: Option<ScanState>,
    /// By what the map of queries learns, summed over heads and batch.
    pub query_params: Vec<f32>,
    /// By what the map of keys learns.
    pub key_params: Vec<f32>,
}

impl<V: FeatureVariant> FeatureAttention<V> {
    /// Gradients, given those by the output; `state` is the one before the first token of the causal form, if it was not empty.
    ///
    /// # Errors
    /// [`AttnError`](attn_core::AttnError) naming the argument that does not fit.
    pub fn gradients<'a>(
        &self,
        inputs: impl Into<FeatureInputs<'a>>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<FeatureGrads> {
        let inputs = inputs.into();
        self.check(&inputs)?;
        if state.is_some() {
            self.only_causal()?;
        }
        if !self.variant.is_causal() {
            return self.gradients_of_all_keys(&inputs, grad_out);
        }
        let s = inputs.x.shape();
        let split = self.spec(&s)?.queries.params(s.head_dim);
        let (cell, tokens) = self.causal(&inputs)?;
        let all = backward(&cell, &tokens, state, grad_out, None)?;
        let mut query_params = sums(&all);
        let key_params = query_params.split_off(split.min(query_params.len()));
        let [q, k, v, gate] = four(all.inputs);
        Ok(FeatureGrads { q, k, v, gate, state: Some(all.state), query_params, key_params })
    }

    fn gradients_of_all_keys(
        &self,
        inputs: &FeatureInputs<'_>,
        grad_out: &TensorView<'_>,
    ) -> Result<FeatureGrads> {
        let (x, s) = (&inputs.x, inputs.x.shape());
        let split = self.spec(&s)?.queries.params(s.head_dim);
        let whole = self.whole(inputs)?;
        let by_read = backward(&whole.reader, &whole.queries(inputs)?, Some(&whole.read), grad_out, None)?;
        // By the state of a key/value head: those of its query heads together.
        let (f, c) = (whole.reader.features(), whole.reader.columns());
        let mut by_state = vec![0.0; whole.absorbed.part(0).len()];
        for (memory, from) in by_read.state.part(0).chunks_exact((f * c).max(1)).enumerate() {
            let at = memory / s.n_heads_q * s.n_heads_kv + s.kv_head(memory % s.n_heads_q);
            by_state[at * f * c..][..f * c].iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
        if whole.reader.normaliser == Normaliser::Rows {
            // S / z by row: dS = d / z, dz = -(S . d) / z^2
            for (by, s) in by_state.chunks_exact_mut(c).zip(whole.absorbed.part(0).chunks_exact(c)) {
                let z = s[c - 1];
                let inverse = if z == 0.0 { 0.0 } else { 1.0 / z };
                let along: f32 = by.iter().zip(s).take(c - 1).map(|(d, s)| d * s).sum();
                by[..c - 1].iter_mut().for_each(|d| *d *= inverse);
                by[c - 1] = -along * inverse * inverse;
            }
        }
        let keys = Tokens::new(&whole.cell, &[("k", *x.k()), ("v", *x.v())])?.packed(inputs.cu_seqlens)?;
        let mut grad_state = ScanState::no_grad(&whole.cell, keys.sequences(), s.n_heads_kv);
        grad_state.set_part(0, "grad_state", &by_state)?;
        let zeros = vec![0.0f32; s.v().iter().product()];
        let zeros = attn_core::View::contiguous("grad_out", &zeros, s.v())?.into();
        let by_keys = backward(&whole.cell, &keys, None, &zeros, Some(&grad_state))?;
        let (mut query_params, mut key_params) = (sums(&by_read), sums(&by_keys));
        query_params.truncate(split);
        key_params.drain(..split.min(key_params.len()));
        let [k, v, ..] = four(by_keys.inputs);
        let [q, ..] = four(by_read.inputs);
        Ok(FeatureGrads { q, k, v, gate: Vec::new(), state: None, query_params, key_params })
    }
}

/// By what is learned, over all heads.
fn sums(all: &Gradients) -> Vec<f32> {
    let mut sum = all.params.first().map_or_else(Vec::new, |first| vec![0.0; first.len()]);
    all.params.iter().for_each(|p| sum.iter_mut().zip(p).for_each(|(sum, x)| *sum += x));
    sum
}

fn four(all: Vec<Vec<f32>>) -> [Vec<f32>; 4] {
    let mut all = all.into_iter();
    std::array::from_fn(|_| all.next().unwrap_or_default())
}
