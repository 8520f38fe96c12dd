//! Exact attention in plain loops: a correct variant, and ways to break it.

use crate::fault::Fault;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::simd::Isa;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Element, Family, Growth, OutMut, Profile, Qkv,
    Result, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView, ViewMut, check_lse,
    softmax_flops,
};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Textbook {
    pub(crate) causal: bool,
    pub(crate) fault: Fault,
}

impl Textbook {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// The output and log-sum-exp in f64, fault included.
    pub(crate) fn compute(&self, x: &Qkv<'_>) -> (Vec<f64>, Vec<f64>) {
        let s = x.shape();
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for batch in 0..s.batch {
            let kv_batch = if self.is(Fault::SharesBatchEntry) { 0 } else { batch };
            for head in 0..s.n_heads_q {
                let tiled = self.is(Fault::GroupsTiled);
                let kv_head = if tiled { head % s.n_heads_kv } else { s.kv_head(head) };
                let q = self.head(x.q(), batch, head);
                let (k, v) = (self.head(x.k(), kv_batch, kv_head), self.head(x.v(), kv_batch, kv_head));
                for i in 0..s.n_q {
                    lse.push(self.row(&s, i, &q, &k, &v, &mut out));
                }
            }
        }
        (out, lse)
    }

    fn head(&self, view: &TensorView<'_>, batch: usize, head: usize) -> Vec<f64> {
        if let (TensorView::F32(view), true) = (view, self.is(Fault::IgnoresStrides)) {
            let [_, _, n, width] = view.shape();
            return view.head(batch, head).data()[..n * width].iter().map(|x| f64::from(*x)).collect();
        }
        view.head_f64(batch, head)
    }

    /// Appends row `i` of one head to `out`, returns its log-sum-exp.
    fn row(&self, s: &AttnShape, i: usize, q: &[f64], k: &[f64], v: &[f64], out: &mut Vec<f64>) -> f64 {
        let (d, d_v) = (s.head_dim, s.head_dim_v);
        let scale = 1.0 / if self.is(Fault::WrongScale) { d as f64 } else { (d as f64).sqrt() };
        let later = usize::from(self.is(Fault::CausalOffByOne));
        let blind = self.causal && !self.is(Fault::CausalIgnored);
        let sees = |j: usize| {
            let in_last_tile = j >= s.n_kv / 64 * 64 && s.n_kv > 64;
            let dropped = self.is(Fault::LastTileDropped) && in_last_tile;
            (!blind || j + s.n_q <= i + s.n_kv + later) && !dropped
        };
        let bias = |j: usize| if self.is(Fault::ScoresKnowPositions) { -0.1 * j as f64 } else { 0.0 };
        let q_i = &q[i * d..][..d];
        let score =
            |j: usize| scale * q_i.iter().zip(&k[j * d..][..d]).map(|(q, k)| q * k).sum::<f64>() + bias(j);
        let seen: Vec<(usize, f64)> = (0..s.n_kv).filter(|&j| sees(j)).map(|j| (j, score(j))).collect();
        let start = out.len();
        out.resize(start + d_v, 0.0);
        if seen.is_empty() && !self.is(Fault::NothingSeenIsNan) {
            return f64::NEG_INFINITY;
        }
        let largest = seen.iter().fold(f64::NEG_INFINITY, |m, (_, score)| m.max(*score));
        let max = if self.is(Fault::NoRunningMaximum) { 0.0 } else { largest };
        let weigh = |score: f64| match self.fault {
            Fault::NoRunningMaximum => f64::from((score as f32).exp()),
            _ => (score - max).exp(),
        };
        let sum: f64 = seen.iter().map(|(_, score)| weigh(*score)).sum();
        let row = &mut out[start..];
        for (j, score) in seen {
            let weight = weigh(score);
            row.iter_mut().zip(&v[j * d_v..]).for_each(|(o, v)| *o += weight * v);
        }
        row.iter_mut().for_each(|o| *o /= sum);
        self.spoil(s, i, q, row);
        max + sum.ln()
    }

    /// Faults that change a finished row.
    fn spoil(&self, s: &AttnShape, i: usize, q: &[f64], row: &mut [f64]) {
        let factor = match self.fault {
            Fault::NotConvex => 1.2,
            Fault::DependsOnThreads => 1.0 + 1e-7 * rayon::current_num_threads() as f64,
            Fault::PortableIsWrong if Isa::current() == Isa::Portable => 1.001,
            Fault::NanLeaksToNeighbour if (i ^ 1) < s.n_q => 1.0 + 0.0 * q[(i ^ 1) * s.head_dim],
            _ => 1.0,
        };
        row.iter_mut().for_each(|o| *o *= factor);
        if self.is(Fault::NanSwallowed) {
            row.iter_mut().filter(|o| o.is_nan()).for_each(|o| *o = 0.0);
        }
    }

    fn write<E: Element>(&self, out: ViewMut<'_, E>, values: &[f64]) {
        let [_, _, n, width] = out.shape();
        for (mut block, row) in out.into_blocks(1).zip(values.chunks_exact(width)) {
            if self.is(Fault::LastRowNotWritten) && block.rows.end == n {
                continue;
            }
            for (to, from) in block.out.row_mut(0).iter_mut().zip(row) {
                let kept = if self.is(Fault::AddsToOutput) { to.load() } else { 0.0 };
                let coarse = self.is(Fault::HalfIsCoarse) && E::DTYPE != DType::F32;
                let slip = if coarse { 1.0 + 16.0 * E::DTYPE.roundoff() } else { 1.0 };
                *to = E::store((from * slip) as f32 + kept);
            }
        }
    }

    pub(crate) fn store(&self, out: OutMut<'_>, values: &[f64]) {
        match out {
            OutMut::F32(out) => self.write(out, values),
            OutMut::Bf16(out) => self.write(out, values),
            OutMut::F16(out) => self.write(out, values),
        }
    }

    fn accept(&self, x: &Qkv<'_>, out: &mut OutMut<'_>) -> Result<()> {
        let s = x.shape();
        if self.is(Fault::WritesBeforeChecking)
            && let OutMut::F32(out) = out
        {
            out.fill_zero();
        }
        if self.is(Fault::VagueErrors) {
            return x.check_out(out).map_err(|_| AttnError::unsupported(self.name(), "this call"));
        }
        if self.is(Fault::RefusesGroups) && s.n_heads_q != s.n_heads_kv {
            return Err(AttnError::unsupported(self.name(), "grouped heads"));
        }
        assert!(!self.is(Fault::PanicsOnEmpty) || s.n_q * s.n_kv > 0, "an empty input");
        x.check_out(out)
    }
}

impl Attention for Textbook {
    fn name(&self) -> &'static str {
        if self.is(Fault::OtherName) { "textbook-2" } else { "textbook" }
    }

    fn profile(&self) -> Profile {
        let strict = self.causal && !self.is(Fault::CausalNotPromised);
        Profile {
            family: Family::Exact,
            target: if self.fault.changes_the_definition() { Target::Own } else { Target::Softmax },
            causality: if strict { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: !self.causal,
            cross_lengths: !self.is(Fault::MoreThanPromised),
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: if self.is(Fault::PromisesNothing) { 1.0 } else { 1e-6 },
            time: if self.is(Fault::CostGrowsOtherwise) { Growth::Linear } else { Growth::Quadratic },
            memory: Growth::Linear,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let pairs = (shape.rows() * shape.n_kv) as u64;
        let row = 16 * shape.n_kv as u64;
        Cost::of(shape, dtype, softmax_flops(pairs, shape), row)
    }

    fn forward(&self, x: Qkv<'_>, mut out: OutMut<'_>) -> Result<()> {
        self.accept(&x, &mut out)?;
        self.store(out, &self.compute(&x).0);
        Ok(())
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        if self.fault.changes_the_definition() || self.is(Fault::WrongDefinition) {
            // A liar lies consistently: the definition has the fault too.
            let lie = if self.is(Fault::WrongDefinition) { Fault::WrongScale } else { self.fault };
            let (out, lse) = Textbook { fault: lie, ..*self }.compute(x);
            return Ok(Reference { out, lse: Some(lse) });
        }
        let causal = Band::causal(&x.shape(), Align::BottomRight);
        let mask: &dyn Mask = if self.causal { &causal } else { &SeeAll };
        Exact { mask, ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.causal { Some(self) } else { None }
    }
}

impl SoftmaxAttention for Textbook {
    fn forward_with_lse(&self, x: Qkv<'_>, mut out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.accept(&x, &mut out)?;
        check_lse(lse, &x.shape())?;
        let (values, sums) = self.compute(&x);
        self.store(out, &values);
        let unit = if self.is(Fault::LseInBaseTwo) { std::f64::consts::LN_2 } else { 1.0 };
        let clamp = if self.is(Fault::LseSaturates) { 4.0 } else { f64::INFINITY };
        lse.iter_mut().zip(sums).for_each(|(to, sum)| *to = (sum / unit).min(clamp) as f32);
        Ok(())
    }
}

impl Streaming for Textbook {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let heads = shape.batch * shape.n_heads_kv;
        let cache = vec![Vec::new(); heads];
        Ok(Box::new(Stream { textbook: *self, shape, k: cache.clone(), v: cache, len: 0 }))
    }
}

/// All keys and values so far, one list a head.
struct Stream {
    textbook: Textbook,
    shape: StreamShape,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    len: usize,
}

impl StreamState for Stream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        if !self.textbook.is(Fault::StreamTakesAnything) {
            self.shape.check(&x)?;
        }
        x.check_out(&out)?;
        let s = x.shape();
        let narrow = |view: &TensorView<'_>, head: usize, heads: usize| -> Vec<f32> {
            view.head_f64(head / heads, head % heads).into_iter().map(|x| x as f32).collect()
        };
        for head in 0..self.k.len() {
            let (mut k, mut v) = (narrow(x.k(), head, s.n_heads_kv), narrow(x.v(), head, s.n_heads_kv));
            if self.textbook.is(Fault::StreamForgetsAToken) && (self.len..self.len + s.n_q).contains(&100) {
                k[(100 - self.len) * s.head_dim..][..s.head_dim].fill(0.0);
                v[(100 - self.len) * s.head_dim_v..][..s.head_dim_v].fill(0.0);
            }
            self.k[head].append(&mut k);
            self.v[head].append(&mut v);
        }
        self.len += s.n_q;
        let shape = AttnShape { n_kv: self.k.first().map_or(0, |k| k.len() / s.head_dim), ..s };
        let q = (0..s.batch * s.n_heads_q).flat_map(|head| narrow(x.q(), head, s.n_heads_q)).collect();
        let problem = attn_testkit::inputs::Problem { shape, q, k: self.k.concat(), v: self.v.concat() };
        self.textbook.store(out, &self.textbook.compute(&problem.qkv()?).0);
        Ok(())
    }

    fn len(&self) -> usize {
        if self.textbook.is(Fault::StreamMiscounts) { self.len.min(100) } else { self.len }
    }

    fn bytes(&self) -> usize {
        4 * self.k.iter().chain(&self.v).map(Vec::len).sum::<usize>()
    }
}
