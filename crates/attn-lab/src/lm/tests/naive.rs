//! A transformer in f64, one equation a line, no code shared with what it judges.

pub(super) enum Rope {
    HalfSplit(f64),
    Interleaved(f64),
    None,
}

pub(super) struct NaiveLayer {
    pub(super) attn_norm: Vec<f64>,
    pub(super) wq: Vec<f64>,
    pub(super) wk: Vec<f64>,
    pub(super) wv: Vec<f64>,
    pub(super) wo: Vec<f64>,
    pub(super) ffn_norm: Vec<f64>,
    pub(super) gate: Vec<f64>,
    pub(super) up: Vec<f64>,
    pub(super) down: Vec<f64>,
    pub(super) rope: Rope,
    pub(super) window: usize,
    pub(super) log_scale: Option<Vec<f64>>,
}

pub(super) struct Naive {
    pub(super) n_heads_q: usize,
    pub(super) n_heads_kv: usize,
    pub(super) head_dim: usize,
    pub(super) norm_eps: f64,
    pub(super) embedding: Vec<Vec<f64>>,
    pub(super) layers: Vec<NaiveLayer>,
    pub(super) final_norm: Vec<f64>,
    pub(super) classifier: Vec<f64>,
}

/// Per position, all heads after each other.
#[derive(Default)]
pub(super) struct NaiveInputs {
    pub(super) q: Vec<Vec<f64>>,
    pub(super) k: Vec<Vec<f64>>,
    pub(super) v: Vec<Vec<f64>>,
}

impl Naive {
    /// The attention inputs of every layer, and the logits at every position.
    pub(super) fn run(&self, tokens: &[usize]) -> (Vec<NaiveInputs>, Vec<Vec<f64>>) {
        let mut x = tokens.iter().map(|&t| self.embedding[t].clone()).collect::<Vec<_>>();
        let mut all_inputs = Vec::new();
        for layer in &self.layers {
            let mut inputs = NaiveInputs::default();
            for (position, x) in x.iter().enumerate() {
                let h = self.norm(x, &layer.attn_norm);
                let mut q = self.rotated(matvec(&layer.wq, &h), position, &layer.rope);
                if let Some(scale) = &layer.log_scale {
                    for (i, q) in q.iter_mut().enumerate() {
                        *q *= scale[i / self.head_dim] * (position as f64 + 1.0).ln();
                    }
                }
                inputs.q.push(q);
                inputs.k.push(self.rotated(matvec(&layer.wk, &h), position, &layer.rope));
                inputs.v.push(matvec(&layer.wv, &h));
            }
            for (position, x) in x.iter_mut().enumerate() {
                let attended = self.attend(&inputs, position, layer.window);
                add(x, &matvec(&layer.wo, &attended));
                let h = self.norm(x, &layer.ffn_norm);
                let (gate, up) = (matvec(&layer.gate, &h), matvec(&layer.up, &h));
                let inner = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>();
                add(x, &matvec(&layer.down, &inner));
            }
            all_inputs.push(inputs);
        }
        let logits = x.iter().map(|x| matvec(&self.classifier, &self.norm(x, &self.final_norm))).collect();
        (all_inputs, logits)
    }

    fn norm(&self, x: &[f64], gain: &[f64]) -> Vec<f64> {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(gain).map(|(x, g)| x / (mean_square + self.norm_eps).sqrt() * g).collect()
    }

    fn rotated(&self, x: Vec<f64>, position: usize, rope: &Rope) -> Vec<f64> {
        let d = self.head_dim;
        let mut out = x.clone();
        for head in 0..x.len() / d {
            for i in 0..d / 2 {
                let (theta, a, b) = match rope {
                    Rope::HalfSplit(theta) => (*theta, i, i + d / 2),
                    Rope::Interleaved(theta) => (*theta, 2 * i, 2 * i + 1),
                    Rope::None => continue,
                };
                let (a, b) = (head * d + a, head * d + b);
                let angle = position as f64 / theta.powf(2.0 * i as f64 / d as f64);
                out[a] = x[a] * angle.cos() - x[b] * angle.sin();
                out[b] = x[a] * angle.sin() + x[b] * angle.cos();
            }
        }
        out
    }

    fn attend(&self, inputs: &NaiveInputs, position: usize, window: usize) -> Vec<f64> {
        let d = self.head_dim;
        let mut out = Vec::new();
        for head in 0..self.n_heads_q {
            let kv = head / (self.n_heads_q / self.n_heads_kv);
            let q = &inputs.q[position][head * d..(head + 1) * d];
            let seen = (position + 1).saturating_sub(window)..position + 1;
            let score = |j: usize| -> f64 {
                let k = &inputs.k[j][kv * d..(kv + 1) * d];
                q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()
            };
            let sum = seen.clone().map(|j| score(j).exp()).sum::<f64>();
            for c in 0..d {
                out.push(seen.clone().map(|j| score(j).exp() / sum * inputs.v[j][kv * d + c]).sum());
            }
        }
        out
    }
}

/// `rows`, each position's heads after each other, in the order `(heads, n, head_dim)`.
pub(super) fn heads_first(rows: &[Vec<f64>], head_dim: usize) -> Vec<f64> {
    let heads = rows[0].len() / head_dim;
    let row = |head: usize| rows.iter().flat_map(move |x| x[head * head_dim..(head + 1) * head_dim].to_vec());
    (0..heads).flat_map(row).collect()
}

fn matvec(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
