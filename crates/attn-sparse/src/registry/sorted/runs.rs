//! Runs of the variants that sort or cluster tokens, on named tensors.
//!
//! | variant | tensors besides `q`, `k`, `v`, `grad_o` |
//! |---|---|
//! | `reformer-lsh` | `qk` instead of `q` and `k`: shared; `rotations [head_dim, n_hashes, columns]`, or `buckets` and `buckets_k`, `[batch, heads, n_hashes, n]` |
//! | `routing` | `means`, `mem_key`, `mem_value`, `q_index`, `k_index` |
//! | `sinkhorn` | `sort`, `null_key`, `null_value` |
//!
//! Tensors `qk` and `v` may also be `[batch * heads, n, width]`. Where queries are also the keys, `k` may be absent.

use crate::sorted::{Hashing, Reformer, Routing, RoutingGrads, RoutingInputs, SinkhornGrads, SinkhornInputs};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData, output_like};
use attn_core::{AttnError, Differentiable, Qkv, QkvGrads, Result};

/// The numbers of a tensor of indices.
fn indices<'a>(tensors: &'a NamedTensors, name: &str) -> Result<Option<&'a [i32]>> {
    Ok(tensors.i32(name)?.map(|(_, numbers)| numbers))
}

fn numbers<'a>(tensors: &'a NamedTensors, name: &str) -> Result<Option<&'a [f32]>> {
    Ok(tensors.f32(name)?.map(|(_, numbers)| numbers))
}

/// Tensors of four axes from those of a call: three axes get a head axis of 1, and `qk` is `q` and `k`.
struct Call {
    tensors: NamedTensors,
    folded: bool,
    shared: bool,
}

impl Call {
    fn of(tensors: &NamedTensors, shared: bool) -> Result<Self> {
        let mut own = NamedTensors::default();
        let mut folded = false;
        let one = tensors.get("qk").is_some();
        if one && (tensors.get("q").is_some() || tensors.get("k").is_some()) {
            return Err(AttnError::value("tensor `qk`", "beside `q` or `k`", "instead of both"));
        }
        let of_keys = match (one, shared && tensors.get("k").is_none()) {
            (true, _) => "qk",
            (_, true) => "q",
            _ => "k",
        };
        let names = [("q", if one { "qk" } else { "q" }), ("k", of_keys), ("v", "v"), ("grad_o", "grad_o")];
        for (name, from) in names {
            if name == "grad_o" && tensors.get(from).is_none() {
                continue;
            }
            let mut tensor = tensors.require(from)?.clone();
            if let [batch, n, width] = *tensor.shape {
                tensor.shape = vec![batch, 1, n, width];
                folded = true;
            }
            own.0.insert(name.into(), tensor);
        }
        Ok(Self { tensors: own, folded, shared: shared || one })
    }

    fn qkv(&self) -> Result<Qkv<'_>> {
        self.tensors.qkv()
    }

    /// Takes the head axis out again.
    fn give(&self, mut tensor: NamedTensor) -> NamedTensor {
        if self.folded && tensor.shape.len() > 2 {
            tensor.shape.remove(1);
        }
        tensor
    }

    /// Names the gradients of q, k and v as the tensors that were given are named.
    fn name_gradients(&self, tensors: &NamedTensors, given: &mut NamedTensors, grads: [NamedTensor; 3]) {
        for (name, grad) in ["q", "k", "v"].into_iter().zip(grads) {
            let named = if name == "q" && tensors.get("qk").is_some() { "qk" } else { name };
            if tensors.get(named).is_some() {
                given.0.insert(format!("grad.{named}"), self.give(grad));
            }
        }
    }
}

/// Room for the gradients of q, k and v.
fn room(x: &Qkv<'_>) -> [NamedTensor; 3] {
    [x.q(), x.k(), x.v()].map(|view| NamedTensor::unwritten(&view.shape(), x.dtype()))
}

pub(super) fn reformer(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "qk", "rotations", "buckets", "buckets_k", "grad_o"])?;
    let config = super::reformer(options)?;
    let call = Call::of(tensors, config.shared_qk)?;
    let config = Reformer { shared_qk: call.shared, ..config };
    let x = call.qkv()?;
    let shape = x.shape();
    let hashing = match (numbers(tensors, "rotations")?, indices(tensors, "buckets")?) {
        (Some(_), Some(_)) => {
            return Err(AttnError::value("tensor `buckets`", "beside `rotations`", "one of the two"));
        }
        (Some(rotations), None) => Hashing::Rotations(rotations),
        (None, Some(q)) => {
            let k = indices(tensors, "buckets_k")?;
            Hashing::Buckets { q, k: if call.shared { &[] } else { k.unwrap_or(&[]) } }
        }
        (None, None) => Hashing::Drawn,
    };
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    let mut lse = vec![f32::NAN; shape.rows()];
    config.forward_with(x, hashing, out.as_out()?, Some(&mut lse))?;
    if let Some(grad_o) = call.tensors.get("grad_o") {
        let saved = config.forward_saving_with(x, hashing, out.as_out()?)?;
        let [mut q, mut k, mut v] = room(&x);
        let grads = QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? };
        config.backward(x, out.view("o")?, &saved, grad_o.view("grad_o")?, grads)?;
        call.name_gradients(tensors, &mut given, [q, k, v]);
    }
    let axes = [shape.batch, shape.n_heads_q, shape.n_q];
    given.0.insert("lse".into(), call.give(NamedTensor::f32("lse", &axes, lse)?));
    let axes = vec![shape.batch, shape.n_heads_q, config.n_hashes, shape.n_q];
    let buckets = TensorData::I32(config.buckets(&x, false, hashing)?);
    given.0.insert("buckets".into(), call.give(NamedTensor { shape: axes, data: buckets }));
    given.0.insert("o".into(), call.give(out));
    Ok(given)
}

pub(super) fn routing(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let known = ["q", "k", "v", "qk", "means", "mem_key", "mem_value", "q_index", "k_index", "grad_o"];
    tensors.only(entry.name, &known)?;
    let config = super::routing(options)?;
    let call = Call::of(tensors, config.shared_qk)?;
    let config = Routing { shared_qk: call.shared, ..config };
    let x = call.qkv()?;
    let shape = x.shape();
    let inputs = RoutingInputs {
        means: numbers(tensors, "means")?,
        mem_key: numbers(tensors, "mem_key")?,
        mem_value: numbers(tensors, "mem_value")?,
        q_index: indices(tensors, "q_index")?,
        k_index: indices(tensors, "k_index")?,
    };
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    match call.tensors.get("grad_o") {
        None => config.forward_with(x, &inputs, out.as_out()?)?,
        Some(grad_o) => {
            let saved = config.forward_saving_with(x, &inputs, out.as_out()?)?;
            let [mut q, mut k, mut v] = room(&x);
            let mut memory = [inputs.mem_key, inputs.mem_value].map(|m| m.map(|m| vec![f32::NAN; m.len()]));
            let [mem_key, mem_value] = &mut memory;
            let grads = RoutingGrads {
                qkv: QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? },
                mem_key: mem_key.as_deref_mut(),
                mem_value: mem_value.as_deref_mut(),
            };
            config.backward_with(x, &inputs, &saved, grad_o.view("grad_o")?, grads)?;
            call.name_gradients(tensors, &mut given, [q, k, v]);
            for (name, grad) in ["mem_key", "mem_value"].into_iter().zip(memory) {
                if let Some(grad) = grad {
                    let axes = &tensors.require(name)?.shape;
                    given.0.insert(format!("grad.{name}"), NamedTensor::f32(name, axes, grad)?);
                }
            }
        }
    }
    let lists = config.select(&x, &inputs)?;
    for (name, list) in ["q_index", "k_index"].into_iter().zip(lists) {
        let clusters = match inputs.means {
            Some(means) => means.len() / (shape.n_heads_q * shape.head_dim).max(1),
            None => config.drawn_means(&x).len() / (shape.n_heads_q * shape.head_dim).max(1),
        };
        let heads = shape.batch * shape.n_heads_q * clusters;
        let axes = vec![shape.batch, shape.n_heads_q, clusters, list.len().checked_div(heads).unwrap_or(0)];
        given.0.insert(name.into(), NamedTensor { shape: axes, data: TensorData::I32(list) });
    }
    given.0.insert("o".into(), call.give(out));
    Ok(given)
}

pub(super) fn sinkhorn(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "sort", "null_key", "null_value", "grad_o"])?;
    let config = super::sinkhorn(options)?;
    let x = tensors.qkv()?;
    let inputs = SinkhornInputs {
        sort: numbers(tensors, "sort")?,
        null_key: numbers(tensors, "null_key")?,
        null_value: numbers(tensors, "null_value")?,
    };
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    match tensors.get("grad_o") {
        None => config.forward_with(x, &inputs, out.as_out()?)?,
        Some(grad_o) => {
            let saved = config.forward_saving_with(x, &inputs, out.as_out()?)?;
            let [mut q, mut k, mut v] = room(&x);
            let names = ["sort", "null_key", "null_value"];
            let mut more =
                [inputs.sort, inputs.null_key, inputs.null_value].map(|n| n.map(|n| vec![f32::NAN; n.len()]));
            let [sort, null_key, null_value] = &mut more;
            let grads = SinkhornGrads {
                qkv: QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? },
                sort: sort.as_deref_mut(),
                null_key: null_key.as_deref_mut(),
                null_value: null_value.as_deref_mut(),
            };
            config.backward_with(x, &inputs, out.view("o")?, &saved, grad_o.view("grad_o")?, grads)?;
            for (name, grad) in names.into_iter().zip(more) {
                if let Some(grad) = grad {
                    let axes = &tensors.require(name)?.shape;
                    given.0.insert(format!("grad.{name}"), NamedTensor::f32(name, axes, grad)?);
                }
            }
            given.0.extend([("grad.q".into(), q), ("grad.k".into(), k), ("grad.v".into(), v)]);
        }
    }
    if inputs.sort.is_none() {
        let shape = x.shape();
        let [rows, sources] = config.sort_shape(&shape);
        let sort =
            NamedTensor::f32("sort", &[shape.batch, shape.n_heads_q, rows, sources], config.sort(&x)?)?;
        given.0.insert("sort".into(), sort);
    }
    given.0.insert("o".into(), out);
    Ok(given)
}
