//! Kernelised attention over q, k and v: causal or not, forward, stream, gradients.

use super::cell::{FeatureCell, Part};
use super::definition::definition;
use super::largest::shifts;
use super::variant::{FeatureInputs, FeatureSpec, FeatureVariant, Gate, Normaliser};
use crate::matrix_state::sequences;
use crate::recomputed::{Recomputed, differentiable};
use crate::scan::{ScanState, Tokens, absorb, forward, workspace_bytes};
use attn_core::exact::Reference;
use attn_core::view::Rows;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Element, Family, Growth, OutMut,
    Profile, Qkv, Result, StreamShape, StreamState, Streaming, Target, TensorView,
};
use std::ops::Range;

/// A [`FeatureVariant`] as an [`Attention`]. Causal forms take equally many queries and keys.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16, any strides with a
/// contiguous last axis. Time is linear in the length, memory beyond inputs and output does not grow with it.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::{FeatureAttention, features::Based};
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = FeatureAttention::new(Based::default());
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// assert!((out[1] - x[1]).abs() < 1e-5, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureAttention<V> {
    /// What is computed.
    pub variant: V,
}

impl<V: FeatureVariant> FeatureAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    pub(super) fn check(&self, inputs: &FeatureInputs<'_>) -> Result<()> {
        let s = inputs.x.shape();
        let packed = inputs.cu_seqlens.is_some();
        if (self.variant.is_causal() || packed) && s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        if packed && self.variant.needs_length() {
            return Err(AttnError::unsupported(V::NAME, "packed sequences without a length for all of them"));
        }
        let Some(gate) = &inputs.gate else { return Ok(()) };
        if !V::GATED || !self.variant.is_causal() {
            let what = if V::GATED { "a gate without `causal`" } else { "a gate" };
            return Err(AttnError::unsupported(V::NAME, what));
        }
        let [_, heads, ..] = gate.shape();
        if heads == 0 || !s.n_heads_q.is_multiple_of(heads) {
            let expected = format!("a divisor of {} heads", s.n_heads_q);
            return Err(AttnError::shape("gate", "heads", heads, expected));
        }
        for batch in 0..gate.shape()[0] {
            for head in 0..heads {
                if let Some(r) = gate.head_f64(batch, head).into_iter().find(|r| *r < 0.0 || *r > 1.0) {
                    return Err(AttnError::value("gate", r, "numbers from 0 to 1"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn spec(&self, s: &AttnShape) -> Result<FeatureSpec> {
        let spec = self.variant.spec(s.n_heads_q, s.head_dim, s.n_q.max(s.n_kv))?;
        if let Some(r) = spec.gate.filter(|r| !(0.0..=1.0).contains(r)) {
            return Err(AttnError::value("gate", r, "a number from 0 to 1"));
        }
        if spec.gate.is_some() && !self.variant.is_causal() {
            return Err(AttnError::unsupported(V::NAME, "a gate without `causal`"));
        }
        Ok(spec)
    }

    /// The cell of a call on numbers of `s`, without what depends on keys and values.
    pub(super) fn cell(&self, s: &AttnShape, part: Part, gated: bool) -> Result<FeatureCell> {
        let spec = self.spec(s)?;
        let cell = FeatureCell {
            part,
            queries: spec.queries,
            keys: spec.keys,
            normaliser: spec.normaliser,
            scale: spec.scale,
            gate: if gated { Gate::Given } else { spec.gate.map_or(Gate::None, Gate::Constant) },
            key_dim: s.head_dim,
            value_dim: s.head_dim_v,
            shifts: Vec::new(),
            references: Vec::new(),
            heads: (s.n_heads_q, s.n_heads_kv),
        };
        if spec.normaliser == Normaliser::Rows && part == Part::Causal {
            return Err(AttnError::unsupported(V::NAME, "a normaliser of all keys with `causal`"));
        }
        Ok(cell)
    }

    /// The cell of the causal form and its tokens.
    pub(super) fn causal<'a>(&self, inputs: &FeatureInputs<'a>) -> Result<(FeatureCell, Tokens<'a>)> {
        let FeatureInputs { x, gate, cu_seqlens } = inputs;
        let cell = FeatureCell {
            shifts: self.shifts(inputs)?,
            ..self.cell(&x.shape(), Part::Causal, gate.is_some())?
        };
        let mut all = vec![("q", *x.q()), ("k", *x.k()), ("v", *x.v())];
        all.extend(gate.map(|gate| ("gate", gate)));
        let tokens = Tokens::new(&cell, &all)?.packed(*cu_seqlens)?;
        Ok((cell, tokens))
    }

    fn shifts(&self, inputs: &FeatureInputs<'_>) -> Result<Vec<Vec<f32>>> {
        let spec = self.spec(&inputs.x.shape())?;
        if spec.key_max { shifts(&spec.keys, *inputs.x.k(), inputs.cu_seqlens) } else { Ok(Vec::new()) }
    }

    /// The state before the first token of a causal problem: part 0 is `[batch, n_heads_q, features, head_dim_v]`, with one column
    /// more, the sum of keys' features, if weights are normalised. Packed sequences have a batch entry each.
    ///
    /// # Errors
    /// Those of the options.
    pub fn state(&self, s: &AttnShape) -> Result<ScanState> {
        Ok(ScanState::new(&self.cell(s, Part::Causal, false)?, s.batch, s.n_heads_q))
    }

    /// [`Attention::forward`] with gates and packed sequences.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn forward_inputs(&self, inputs: &FeatureInputs<'_>, out: OutMut<'_>) -> Result<()> {
        self.check(inputs)?;
        let x = &inputs.x;
        x.check_out(&out)?;
        if self.variant.is_causal() {
            let (cell, tokens) = self.causal(inputs)?;
            return forward(&cell, &tokens, out, None);
        }
        let mut whole = self.whole(inputs)?;
        forward(&whole.reader, &whole.queries(inputs)?, out, Some(&mut whole.read))
    }

    /// [`FeatureAttention::forward_inputs`] of the causal form from a state, which moves to the end.
    ///
    /// # Errors
    /// As [`Attention::forward`]; [`AttnError::Unsupported`] without `causal`.
    pub fn forward_from<'a>(
        &self,
        inputs: impl Into<FeatureInputs<'a>>,
        out: OutMut<'_>,
        state: &mut ScanState,
    ) -> Result<()> {
        let inputs = inputs.into();
        self.check(&inputs)?;
        self.only_causal()?;
        inputs.x.check_out(&out)?;
        let (cell, tokens) = self.causal(&inputs)?;
        forward(&cell, &tokens, out, Some(state))
    }

    pub(super) fn only_causal(&self) -> Result<()> {
        if self.variant.is_causal() {
            return Ok(());
        }
        Err(AttnError::unsupported(V::NAME, "a state without `causal`"))
    }

    /// The state of all keys, and what queries read of it.
    pub(super) fn whole(&self, inputs: &FeatureInputs<'_>) -> Result<Whole> {
        let (x, s) = (&inputs.x, inputs.x.shape());
        let references = references(*x.v(), &sequences(inputs.cu_seqlens, s.n_kv)?);
        let cell = FeatureCell {
            shifts: self.shifts(inputs)?,
            references: references.clone(),
            ..self.cell(&s, Part::Absorb, false)?
        };
        let keys = Tokens::new(&cell, &[("k", *x.k()), ("v", *x.v())])?.packed(inputs.cu_seqlens)?;
        let sequences = keys.sequences();
        let mut absorbed = ScanState::new(&cell, sequences, s.n_heads_kv);
        absorb(&cell, &keys, &mut absorbed)?;
        let (f, c) = (cell.features(), cell.columns());
        let mut rows = absorbed.part(0);
        if cell.normaliser == Normaliser::Rows {
            for row in rows.chunks_exact_mut(c) {
                let z = row[c - 1];
                row.iter_mut().for_each(|x| *x = if z == 0.0 { 0.0 } else { *x / z });
            }
        }
        let mut all = Vec::with_capacity(sequences * s.n_heads_q * f * c);
        for sequence in 0..sequences {
            for head in 0..s.n_heads_q {
                let at = (sequence * s.n_heads_kv + s.kv_head(head)) * f * c;
                all.extend_from_slice(&rows[at..at + f * c]);
            }
        }
        let mut read = ScanState::new(&cell, sequences, s.n_heads_q);
        read.set_part(0, "state", &all)?;
        let reader = FeatureCell { references, ..self.cell(&s, Part::Read, false)? };
        Ok(Whole { cell, absorbed, reader, read })
    }
}

/// The mean of the values of each sequence and head, where it is finite: what values are taken relative to.
fn references(v: TensorView<'_>, cuts: &[Range<usize>]) -> Vec<Vec<f32>> {
    fn mean<E: Element>(rows: Rows<'_, E>) -> Vec<f32> {
        let mut sums = vec![0.0f64; rows.width()];
        rows.iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.load())));
        let mean = |sum: f64| (sum / rows.len() as f64) as f32;
        sums.into_iter().map(mean).map(|x| if x.is_finite() { x } else { 0.0 }).collect()
    }
    let [batch, heads, ..] = v.shape();
    let all = (0..batch).flat_map(|batch| cuts.iter().map(move |cut| (batch, cut)));
    let of = |batch: usize, cut: &Range<usize>, head: usize| match v {
        TensorView::F32(v) => mean(v.head(batch, head).slice(cut.clone())),
        TensorView::Bf16(v) => mean(v.head(batch, head).slice(cut.clone())),
        TensorView::F16(v) => mean(v.head(batch, head).slice(cut.clone())),
    };
    all.flat_map(|(batch, cut)| (0..heads).map(move |head| of(batch, cut, head))).collect()
}

/// Keys and values summed up.
pub(super) struct Whole {
    pub(super) cell: FeatureCell,
    /// `[sequences, n_heads_kv]`.
    pub(super) absorbed: ScanState,
    pub(super) reader: FeatureCell,
    /// `[sequences, n_heads_q]`.
    pub(super) read: ScanState,
}

impl Whole {
    pub(super) fn queries<'a>(&self, inputs: &FeatureInputs<'a>) -> Result<Tokens<'a>> {
        Tokens::new(&self.reader, &[("q", *inputs.x.q())])?.packed(inputs.cu_seqlens)
    }
}

impl<V: FeatureVariant> Attention for FeatureAttention<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn profile(&self) -> Profile {
        let causal = self.variant.is_causal();
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if causal { Causality::Strict } else { Causality::Bidirectional },
            convex: self.variant.is_convex(),
            key_order_free: !causal && self.variant.is_key_order_free(),
            cross_lengths: !causal,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: self.variant.max_error(),
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        let part = if self.variant.is_causal() { Part::Causal } else { Part::Read };
        let Ok(cell) = self.cell(s, part, false) else { return Cost::default() };
        let (f, c, heads) = (cell.features() as u64, cell.columns() as u64, (s.batch * s.n_heads_q) as u64);
        let (n_q, n_kv) = (s.n_q as u64, s.n_kv as u64);
        let inside = if self.variant.is_causal() { n_q * n_q.min(64) * (f + c) } else { 0 };
        let flops = heads * 2 * ((n_q + n_kv) * f * c + inside);
        let threads = heads.min(rayon::current_num_threads() as u64);
        let states = if self.variant.is_causal() { 0 } else { 3 * 4 * heads * f * c };
        Cost::of(s, dtype, flops, threads * workspace_bytes(&cell, s.n_q.max(s.n_kv)) + states)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.forward_inputs(&x.into(), out)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.check(&(*x).into())?;
        Ok(definition(&self.spec(&x.shape())?, self.variant.is_causal(), x))
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.variant.is_causal() && !self.variant.needs_length() { Some(self) } else { None }
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

differentiable!(impl <V: FeatureVariant> for FeatureAttention<V>);

impl<V: FeatureVariant> Recomputed for FeatureAttention<V> {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        let all = self.gradients(x, None, &grad_out)?;
        Ok([all.q, all.k, all.v])
    }
}

impl<V: FeatureVariant> Streaming for FeatureAttention<V> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let divides = shape.n_heads_kv > 0 && shape.n_heads_q.is_multiple_of(shape.n_heads_kv);
        if !divides {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let s = AttnShape {
            batch: shape.batch,
            n_heads_q: shape.n_heads_q,
            n_heads_kv: shape.n_heads_kv,
            n_q: 0,
            n_kv: 0,
            head_dim: shape.head_dim,
            head_dim_v: shape.head_dim_v,
        };
        let cell = self.cell(&s, Part::Causal, false)?;
        if self.spec(&s)?.key_max {
            return Err(AttnError::unsupported(V::NAME, "streaming with the largest of all keys"));
        }
        let state = ScanState::new(&cell, shape.batch, shape.n_heads_q);
        Ok(Box::new(Stream { cell, shape, state }))
    }
}

struct Stream {
    cell: FeatureCell,
    shape: StreamShape,
    state: ScanState,
}

impl StreamState for Stream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        let tokens = Tokens::new(&self.cell, &[("q", *x.q()), ("k", *x.k()), ("v", *x.v())])?;
        forward(&self.cell, &tokens, out, Some(&mut self.state))
    }

    fn len(&self) -> usize {
        self.state.position()
    }

    fn bytes(&self) -> usize {
        self.state.bytes()
    }
}
