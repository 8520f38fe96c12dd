//! Kernelised attention over q, k and v: causal or not, forward, stream, gradients.

use super::cell::{FeatureCell, Part};
use super::largest::shifts;
use super::maps::{Map, Place, Side};
use crate::scan::{Gradients, ScanState, Tokens, absorb, backward, forward, store, workspace_bytes};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, QkvGrads, Result, Saved, StreamShape, StreamState, Streaming, Target, TensorView,
};

/// What the sum of weighted values is divided by, with `D` the sum of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normaliser {
    /// Nothing.
    None,
    /// `D + eps`.
    Plus(f32),
    /// `max(D, eps)`.
    AtLeast(f32),
    /// `phi(q) . (z + eps 1)` with `z` the sum of keys' features.
    EachPlus(f32),
    /// Each feature's row of the state by the sum of that feature over the keys. Not causal.
    Rows,
}

impl Normaliser {
    /// Whether weights are summed.
    pub(crate) fn divides(self) -> bool {
        self != Self::None
    }
}

/// A row of options of kernelised attention.
#[derive(Debug, Clone)]
pub struct FeatureSpec {
    /// What queries become.
    pub queries: Map,
    /// What keys become.
    pub keys: Map,
    /// What outputs are divided by.
    pub normaliser: Normaliser,
    /// Multiplies the weights.
    pub scale: f32,
    /// Keys' exponents are lowered by the largest of all keys, later ones included.
    pub key_max: bool,
}

/// A variant of kernelised attention: two feature maps and a normaliser.
pub trait FeatureVariant: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// Whether no query sees a later key.
    fn is_causal(&self) -> bool;

    /// The options for heads of `head_dim` and sequences of up to `n` rows.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that makes no sense.
    fn spec(&self, n_heads_q: usize, head_dim: usize, n: usize) -> Result<FeatureSpec>;

    /// Whether features depend on the length of the whole, so that a stream would have to know it.
    fn needs_length(&self) -> bool {
        false
    }

    /// Outputs are averages of the values seen.
    fn is_convex(&self) -> bool {
        false
    }

    /// Permuting keys changes nothing, without `causal`.
    fn is_key_order_free(&self) -> bool {
        true
    }

    /// [`Profile::max_error`].
    fn max_error(&self) -> f64 {
        1e-5
    }
}

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

/// Gradients of kernelised attention.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By the state before the first token; empty without `causal`.
    pub state: Option<ScanState>,
    /// By what the map of queries learns, summed over heads and batch.
    pub query_params: Vec<f32>,
    /// By what the map of keys learns.
    pub key_params: Vec<f32>,
}

impl<V: FeatureVariant> FeatureAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        if self.variant.is_causal() && s.n_q != s.n_kv {
            return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as many as queries)", s.n_q)));
        }
        Ok(())
    }

    fn cell(&self, s: &AttnShape, part: Part, shifts: Vec<Vec<f32>>) -> Result<(FeatureCell, FeatureSpec)> {
        let spec = self.variant.spec(s.n_heads_q, s.head_dim, s.n_q.max(s.n_kv))?;
        let cell = FeatureCell {
            part,
            queries: spec.queries.clone(),
            keys: spec.keys.clone(),
            normaliser: spec.normaliser,
            scale: spec.scale,
            key_dim: s.head_dim,
            value_dim: s.head_dim_v,
            shifts,
            heads: (s.n_heads_q, s.n_heads_kv),
        };
        if spec.normaliser == Normaliser::Rows && part == Part::Causal {
            return Err(AttnError::unsupported(V::NAME, "a normaliser of all keys with `causal`"));
        }
        Ok((cell, spec))
    }

    fn shifts(&self, x: &Qkv<'_>) -> Result<Vec<Vec<f32>>> {
        let s = x.shape();
        let spec = self.variant.spec(s.n_heads_q, s.head_dim, s.n_q.max(s.n_kv))?;
        if spec.key_max { shifts(&spec.keys, *x.k()) } else { Ok(Vec::new()) }
    }

    /// The state before the first token of a causal problem: part 0 is `[batch, n_heads_q, features, head_dim_v]`, with one column
    /// more, the sum of keys' features, if weights are normalised.
    ///
    /// # Errors
    /// Those of the options.
    pub fn state(&self, s: &AttnShape) -> Result<ScanState> {
        let (cell, _) = self.cell(s, Part::Causal, Vec::new())?;
        Ok(ScanState::new(&cell, s.batch, s.n_heads_q))
    }

    /// [`Attention::forward`] of the causal form from a state, which moves to the end.
    ///
    /// # Errors
    /// As [`Attention::forward`]; [`AttnError::Unsupported`] without `causal`.
    pub fn forward_from(&self, x: Qkv<'_>, out: OutMut<'_>, state: &mut ScanState) -> Result<()> {
        let s = x.shape();
        self.check(&s)?;
        self.only_causal()?;
        x.check_out(&out)?;
        let (cell, _) = self.cell(&s, Part::Causal, self.shifts(&x)?)?;
        forward(&cell, &all_tokens(&cell, &x)?, out, Some(state))
    }

    fn only_causal(&self) -> Result<()> {
        if self.variant.is_causal() {
            return Ok(());
        }
        Err(AttnError::unsupported(V::NAME, "a state without `causal`"))
    }

    /// Gradients, given those by the output; `state` is the one before the first token of the causal form, if it was not empty.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients(
        &self,
        x: &Qkv<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<FeatureGrads> {
        let s = x.shape();
        self.check(&s)?;
        if state.is_some() {
            self.only_causal()?;
        }
        let shifts = self.shifts(x)?;
        let sums = |all: &Gradients| -> Vec<f32> {
            let mut sum = all.params.first().map_or_else(Vec::new, |first| vec![0.0; first.len()]);
            all.params.iter().for_each(|p| sum.iter_mut().zip(p).for_each(|(sum, x)| *sum += x));
            sum
        };
        let split = self.variant.spec(s.n_heads_q, s.head_dim, s.n_q.max(s.n_kv))?.queries.params(s.head_dim);
        if self.variant.is_causal() {
            let (cell, _) = self.cell(&s, Part::Causal, shifts)?;
            let all = backward(&cell, &all_tokens(&cell, x)?, state, grad_out, None)?;
            let mut query_params = sums(&all);
            let key_params = query_params.split_off(split.min(query_params.len()));
            let [q, k, v] = three(all.inputs);
            return Ok(FeatureGrads { q, k, v, state: Some(all.state), query_params, key_params });
        }
        let whole = self.whole(x, shifts)?;
        let (read, _) = self.cell(&s, Part::Read, Vec::new())?;
        let queries = Tokens::new(&read, &[("q", *x.q())])?;
        let by_read = backward(&read, &queries, Some(&whole.read), grad_out, None)?;
        // By the state of a key/value head: those of its query heads together.
        let (f, c) = (read.features(), read.columns());
        let mut by_state = vec![0.0; s.batch * s.n_heads_kv * f * c];
        for (memory, from) in by_read.state.part(0).chunks_exact((f * c).max(1)).enumerate() {
            let at = memory / s.n_heads_q * s.n_heads_kv + s.kv_head(memory % s.n_heads_q);
            by_state[at * f * c..][..f * c].iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
        if read.normaliser == Normaliser::Rows {
            // S / z by row: dS = d / z, dz = -(S . d) / z^2
            for (by, s) in by_state.chunks_exact_mut(c).zip(whole.absorbed.part(0).chunks_exact(c)) {
                let z = s[c - 1];
                let inverse = if z == 0.0 { 0.0 } else { 1.0 / z };
                let along: f32 = by.iter().zip(s).take(c - 1).map(|(d, s)| d * s).sum();
                by[..c - 1].iter_mut().for_each(|d| *d *= inverse);
                by[c - 1] = -along * inverse * inverse;
            }
        }
        let mut grad_state = ScanState::no_grad(&whole.cell, s.batch, s.n_heads_kv);
        grad_state.set_part(0, "grad_state", &by_state)?;
        let zeros = vec![0.0f32; s.v().iter().product()];
        let zeros = attn_core::View::contiguous("grad_out", &zeros, s.v())?.into();
        let keys = Tokens::new(&whole.cell, &[("k", *x.k()), ("v", *x.v())])?;
        let by_keys = backward(&whole.cell, &keys, None, &zeros, Some(&grad_state))?;
        let (mut query_params, mut key_params) = (sums(&by_read), sums(&by_keys));
        query_params.truncate(split);
        key_params.drain(..split.min(key_params.len()));
        let [k, v, _] = three(by_keys.inputs);
        let [q, ..] = three(by_read.inputs);
        Ok(FeatureGrads { q, k, v, state: None, query_params, key_params })
    }

    /// The state of all keys, and what queries read of it.
    fn whole(&self, x: &Qkv<'_>, shifts: Vec<Vec<f32>>) -> Result<Whole> {
        let s = x.shape();
        let (cell, _) = self.cell(&s, Part::Absorb, shifts)?;
        let mut absorbed = ScanState::new(&cell, s.batch, s.n_heads_kv);
        absorb(&cell, &Tokens::new(&cell, &[("k", *x.k()), ("v", *x.v())])?, &mut absorbed)?;
        let (f, c) = (cell.features(), cell.columns());
        let mut rows = absorbed.part(0);
        if cell.normaliser == Normaliser::Rows {
            for row in rows.chunks_exact_mut(c) {
                let z = row[c - 1];
                row.iter_mut().for_each(|x| *x = if z == 0.0 { 0.0 } else { *x / z });
            }
        }
        let mut all = Vec::with_capacity(s.batch * s.n_heads_q * f * c);
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let at = (batch * s.n_heads_kv + s.kv_head(head)) * f * c;
                all.extend_from_slice(&rows[at..at + f * c]);
            }
        }
        let mut read = ScanState::new(&cell, s.batch, s.n_heads_q);
        read.set_part(0, "state", &all)?;
        Ok(Whole { cell, absorbed, read })
    }
}

struct Whole {
    cell: FeatureCell,
    /// `[batch, n_heads_kv]`.
    absorbed: ScanState,
    /// `[batch, n_heads_q]`.
    read: ScanState,
}

fn all_tokens<'a>(cell: &FeatureCell, x: &Qkv<'a>) -> Result<Tokens<'a>> {
    Tokens::new(cell, &[("q", *x.q()), ("k", *x.k()), ("v", *x.v())])
}

fn three(all: Vec<Vec<f32>>) -> [Vec<f32>; 3] {
    let mut all = all.into_iter();
    std::array::from_fn(|_| all.next().unwrap_or_default())
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
        let Ok((cell, _)) =
            self.cell(s, if self.variant.is_causal() { Part::Causal } else { Part::Read }, Vec::new())
        else {
            return Cost::default();
        };
        let (f, c, heads) = (cell.features() as u64, cell.columns() as u64, (s.batch * s.n_heads_q) as u64);
        let (n_q, n_kv) = (s.n_q as u64, s.n_kv as u64);
        let inside = if self.variant.is_causal() { n_q * n_q.min(64) * (f + c) } else { 0 };
        let flops = heads * 2 * ((n_q + n_kv) * f * c + inside);
        let threads = heads.min(rayon::current_num_threads() as u64);
        let states = if self.variant.is_causal() { 0 } else { 3 * 4 * heads * f * c };
        Cost::of(s, dtype, flops, threads * workspace_bytes(&cell, s.n_q.max(s.n_kv)) + states)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        let s = x.shape();
        self.check(&s)?;
        x.check_out(&out)?;
        let shifts = self.shifts(&x)?;
        if self.variant.is_causal() {
            let (cell, _) = self.cell(&s, Part::Causal, shifts)?;
            return forward(&cell, &all_tokens(&cell, &x)?, out, None);
        }
        let mut whole = self.whole(&x, shifts)?;
        let (read, _) = self.cell(&s, Part::Read, Vec::new())?;
        let queries = Tokens::new(&read, &[("q", *x.q())])?;
        forward(&read, &queries, out, Some(&mut whole.read))
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        self.check(&s)?;
        let spec = self.variant.spec(s.n_heads_q, s.head_dim, s.n_q.max(s.n_kv))?;
        let causal = self.variant.is_causal();
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = s.kv_head(head);
                let keys = x.k().head_f64(batch, kv);
                let shift =
                    if spec.key_max { spec.keys.define_shift(head, &keys, s.head_dim) } else { Vec::new() };
                let features = |map: &Map, side, rows: Vec<f64>| -> Vec<Vec<f64>> {
                    let shift: &[f32] = if side == Side::Key { &shift } else { &[] };
                    let rows = rows.chunks_exact(s.head_dim).enumerate();
                    rows.map(|(first, row)| map.define(Place { side, head, first, len: 1, shift }, row))
                        .collect()
                };
                let q = features(&spec.queries, Side::Query, x.q().head_f64(batch, head));
                let k = features(&spec.keys, Side::Key, keys.clone());
                let v = x.v().head_f64(batch, kv);
                for (i, q) in q.iter().enumerate() {
                    let seen = if causal { i + 1 } else { s.n_kv };
                    out.extend(define_row(&spec, q, &k[..seen], &v, s.head_dim_v));
                }
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.variant.is_causal() && !self.variant.needs_length() { Some(self) } else { None }
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

/// One row by the quadratic formula.
fn define_row(spec: &FeatureSpec, q: &[f64], keys: &[Vec<f64>], v: &[f64], width: usize) -> Vec<f64> {
    let scale = f64::from(spec.scale);
    let mut sums: Vec<f64> = vec![0.0; q.len()];
    keys.iter().for_each(|k| sums.iter_mut().zip(k).for_each(|(sum, k)| *sum += k));
    let (mut out, mut d) = (vec![0.0; width], 0.0);
    for (j, k) in keys.iter().enumerate() {
        let pairs = q.iter().zip(k).zip(&sums);
        let weight: f64 = match spec.normaliser {
            Normaliser::Rows => pairs.map(|((q, k), z)| if *z == 0.0 { 0.0 } else { q * k / z }).sum(),
            _ => pairs.map(|((q, k), _)| q * k).sum(),
        };
        d += scale * weight;
        out.iter_mut().zip(&v[j * width..]).for_each(|(o, v)| *o += scale * weight * v);
    }
    let divisor = match spec.normaliser {
        Normaliser::None | Normaliser::Rows => 1.0,
        Normaliser::Plus(eps) => d + f64::from(eps),
        Normaliser::AtLeast(eps) => d.max(f64::from(eps)),
        Normaliser::EachPlus(eps) => d + f64::from(eps) * scale * q.iter().sum::<f64>(),
    };
    out.iter().map(|o| if divisor == 0.0 { 0.0 } else { o / divisor }).collect()
}

impl<V: FeatureVariant> Differentiable for FeatureAttention<V> {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.forward(x, out)?;
        Ok(Saved::new(()))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        _: TensorView<'_>,
        _: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let all = self.gradients(&x, None, &grad_out)?;
        store(grads.q, &all.q);
        store(grads.k, &all.k);
        store(grads.v, &all.v);
        Ok(())
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
        let (cell, spec) = self.cell(&s, Part::Causal, Vec::new())?;
        if spec.key_max {
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
        forward(&self.cell, &all_tokens(&self.cell, &x)?, out, Some(&mut self.state))
    }

    fn len(&self) -> usize {
        self.state.position()
    }

    fn bytes(&self) -> usize {
        self.state.bytes()
    }
}
