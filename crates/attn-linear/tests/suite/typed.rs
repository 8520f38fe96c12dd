//! Typed inputs give what the same tensors give by name.

use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnShape, TensorView, View, ViewMut};
use attn_linear::matrix_state::{Inputs, StateVariant};
use attn_linear::recurrent::{
    DeltaNet, GatedDeltaNet, Gla, Gsa, Hgrn2, Kda, Lightning, Mamba2, Rwkv6, Rwkv7,
};
use attn_linear::typed::{
    Decayed, Delta, GatedDelta, Goose, InputsOf, More, Numbers, Plain, RawGatedDelta, Receptance, Sloped,
    Slotted, StateSpace,
};
use attn_linear::{LinearAttention, RetNet};
use attn_testkit::inputs::Problem;

const HEADS: usize = 2;
const N: usize = 21;
const D: usize = 4;
const D_V: usize = 3;

struct Data {
    rows: Vec<f32>,
    values: Vec<f32>,
    /// At most 0, `[1, HEADS, N, D]`.
    decays: Vec<f32>,
    /// From 0 to 1.
    strengths: Vec<f32>,
}

impl Data {
    fn new() -> Self {
        let numbers = |width, seed| Problem::normal(AttnShape::square(HEADS, N, width), seed).q;
        let rows = numbers(D, 1);
        Self {
            values: numbers(D_V, 2),
            decays: rows.iter().map(|x| -0.3 * x.abs()).collect(),
            strengths: rows.iter().map(|x| 1.0 / (1.0 + x.exp())).collect(),
            rows,
        }
    }

    fn view<'a>(data: &'a [f32], width: usize) -> Numbers<'a> {
        let shape = [1, HEADS, N, width];
        Numbers::Rows(View::contiguous("x", &data[..HEADS * N * width], shape).unwrap().into())
    }

    fn q(&self) -> Numbers<'_> {
        Self::view(&self.rows, D)
    }

    fn v(&self) -> Numbers<'_> {
        Self::view(&self.values, D_V)
    }

    fn decay(&self, width: usize) -> Numbers<'_> {
        Self::view(&self.decays, width)
    }

    fn strength(&self, width: usize) -> Numbers<'_> {
        Self::view(&self.strengths, width)
    }

    fn heads(&self, width: usize) -> Numbers<'_> {
        Numbers::Heads(&self.decays[..HEADS * width], width)
    }
}

/// Typed and by name, the latter from the fields as tensors of their own.
fn same<'a, V: StateVariant, I: InputsOf<V, Tensor = Numbers<'a>> + Clone>(inputs: I) {
    let attention = LinearAttention::<V>::configured([]).unwrap();
    let x: Inputs<'_> = attention.typed(inputs.clone()).unwrap();
    let mut out = vec![f32::NAN; HEADS * N * D_V];
    let view = ViewMut::contiguous("out", &mut out, [1, HEADS, N, D_V]).unwrap();
    attention.forward_inputs(&x, view.into(), None).unwrap();
    let mut named = NamedTensors::default();
    for (name, numbers) in inputs.fields() {
        let tensor = match numbers {
            Numbers::Rows(TensorView::F32(view)) => {
                let data = (0..HEADS)
                    .flat_map(|head| view.head(0, head).iter().flatten().copied().collect::<Vec<_>>());
                NamedTensor::f32(name, &view.shape(), data.collect()).unwrap()
            }
            Numbers::Rows(_) => panic!("{name}: f32"),
            Numbers::Heads(data, width) => NamedTensor::f32(name, &[HEADS, width], data.to_vec()).unwrap(),
        };
        named.0.insert(name.into(), tensor);
    }
    let want = attention.run(&named).unwrap();
    let want = want.f32("o").unwrap().unwrap().1;
    assert!(out == want, "{}", V::NAME);
}

#[test]
fn types_mean_the_names_of_the_engine() {
    let data = Data::new();
    let (q, k, v) = (data.q(), data.q(), data.v());
    same::<Hgrn2, _>(Plain { q, k, v });
    same::<Gla, _>(Decayed { q, k, v, log_decay: data.decay(D) });
    same::<RetNet, _>(Decayed { q, k, v, log_decay: data.heads(1) });
    same::<Lightning, _>(Sloped { q, k, v, slope: Numbers::Heads(&data.strengths[..HEADS], 1) });
    same::<DeltaNet, _>(Delta { q, k, v, beta: data.strength(1) });
    same::<GatedDeltaNet, _>(GatedDelta { q, k, v, log_decay: data.decay(1), beta: data.strength(1) });
    same::<Kda, _>(GatedDelta { q, k, v, log_decay: data.decay(D), beta: data.strength(1) });
    let (a_log, dt_bias) = (data.heads(1), data.heads(1));
    let raw = RawGatedDelta { q, k, v, gate_raw: data.decay(1), a_log, dt_bias, beta: data.strength(1) };
    same::<GatedDeltaNet, _>(raw);
    let (dt, a, d) = (data.strength(1), data.heads(1), Some(data.heads(1)));
    same::<Mamba2, _>(StateSpace { c: q, b: k, x: v, dt, a, d, dt_bias: None });
    same::<Rwkv6, _>(Receptance { r: q, k, v, log_decay: data.decay(D), bonus: data.heads(D) });
    let (alpha, k_k, k_a) = (data.strength(D), data.heads(D), data.heads(D));
    same::<Rwkv7, _>(Goose { r: q, k, v, log_decay: data.decay(D), alpha, k_k, k_a });
    same::<Gsa, _>(Slotted { q, k, v, log_decay: data.decay(D), slots: data.strength(D) });
    same::<Kda, _>(More { q, k, v, more: vec![("beta", data.strength(1))] });
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let data = Data::new();
    let attention = LinearAttention::<GatedDeltaNet>::configured([]).unwrap();
    let (q, k, v) = (data.q(), data.q(), data.v());
    let refused = |x: attn_core::Result<Inputs<'_>>| -> String {
        let x = match x {
            Ok(x) => x,
            Err(error) => return error.to_string(),
        };
        let mut out = vec![0.0; HEADS * N * D_V];
        let view = ViewMut::contiguous("out", &mut out, [1, HEADS, N, D_V]).unwrap();
        attention.forward_inputs(&x, view.into(), None).unwrap_err().to_string()
    };
    let error = refused(attention.typed(More { q, k, v, more: vec![("betta", data.strength(1))] }));
    assert!(error.contains("betta"), "{error}");
    let error =
        refused(attention.typed(GatedDelta { q, k, v, log_decay: data.decay(D), beta: data.strength(1) }));
    assert!(error.contains("log_decay: width is 4"), "{error}");
    let error = refused(attention.typed(Plain { q: data.heads(D), k, v }));
    assert!(error.contains("q is one row a head"), "{error}");
    let error =
        refused(attention.typed(More { q, k, v, more: vec![("a_log", Numbers::Heads(&data.rows[..3], 2))] }));
    assert!(error.contains("a_log: width is 2"), "{error}");
    let error = LinearAttention::<Gla>::configured([("scal", "1")]).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("scal") && error.contains("chunk_len"), "{error}");
}
