//! The definition in f64: the recurrence token by token, and the quadratic form. Slow on purpose.
//!
//! ```text
//! S~ = diag(e^gk) S diag(e^gv)
//! S' = S~ + b (a^T S)^T + k v^T          tied: S' = S~ + k (v + strength o S^T a)^T; the erase reads S or S~
//! z' = e^g z + k, norm = scale q . z'    with a norm
//! o  = scale q^T S'                      or before the write: scale (q^T S + (sum_c q_c u_c k_c) v^T)
//! ```

use super::{Chunk, Decay, Erase, EraseAt, Options, Read};
use attn_core::simd::Isa;

/// Outputs of a sequence, and the state after it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sequence {
    /// `[len, value_dim]`.
    pub out: Vec<f64>,
    /// `[len]`, scaled, with [`Options::norm`].
    pub norms: Vec<f64>,
    /// `[key_dim, value_dim]`, and with a norm `z [key_dim]`.
    pub state: Vec<f64>,
}

/// Runs the recurrence over a whole sequence from a state.
///
/// # Panics
/// If a buffer has not the size that the options give it.
pub fn recurrence(o: &Options, x: &Chunk, initial: &[f64]) -> Sequence {
    if let Some(recurrence) = o.recurrence {
        let (mut state, mut reads) = (initial.to_vec(), vec![0.0; x.len * o.value_dim]);
        recurrence.run(Isa::Portable, o, x.piece(o), &mut state, &mut reads);
        reads.iter_mut().for_each(|read| *read *= f64::from(o.scale));
        return Sequence { out: reads, norms: Vec::new(), state };
    }
    let (key_dim, value_dim) = (o.key_dim, o.value_dim);
    let at = |c: usize, j: usize| c * value_dim + j;
    let (matrix, z) = initial.split_at(o.matrix_len());
    let (mut s, mut z, mut norms) = (matrix.to_vec(), z.to_vec(), Vec::new());
    let mut out = Vec::with_capacity(x.len * value_dim);
    for i in 0..x.len {
        let q = row(&x.q, key_dim, i);
        let before = s.clone();
        for w in i * o.writes..(i + 1) * o.writes {
            let (k, v) = (row(&x.k, key_dim, w), row(&x.v, value_dim, w));
            let previous = s.clone();
            z.iter_mut().enumerate().for_each(|(c, z)| *z = gate(o, x, w, c, 0) * *z + k[c]);
            for c in 0..key_dim {
                for j in 0..value_dim {
                    s[at(c, j)] *= gate(o, x, w, c, j);
                }
            }
            if o.erase != Erase::None {
                let a = row(&x.a, key_dim, w);
                let seen = if o.erase_at == EraseAt::Before { &previous } else { &s };
                let y: Vec<f64> =
                    (0..value_dim).map(|j| (0..key_dim).map(|c| a[c] * seen[at(c, j)]).sum()).collect();
                let y: Vec<f64> = y.iter().enumerate().map(|(j, y)| strength(o, x, w, j) * y).collect();
                let along = if o.erase == Erase::Tied { k.clone() } else { row(&x.b, key_dim, w) };
                (0..key_dim).for_each(|c| (0..value_dim).for_each(|j| s[at(c, j)] += along[c] * y[j]));
            }
            (0..key_dim).for_each(|c| (0..value_dim).for_each(|j| s[at(c, j)] += k[c] * v[j]));
        }
        let read = |s: &[f64], j: usize| (0..key_dim).map(|c| q[c] * s[at(c, j)]).sum::<f64>();
        let scale = f64::from(o.scale);
        if o.norm {
            norms.push(scale * q.iter().zip(&z).map(|(q, z)| q * z).sum::<f64>());
        }
        match o.read {
            Read::Post => out.extend((0..value_dim).map(|j| scale * read(&s, j))),
            Read::Pre => {
                let (k, v) = (row(&x.k, key_dim, i), row(&x.v, value_dim, i));
                let own: f64 = (0..key_dim).map(|c| q[c] * f64::from(x.bonus[c]) * k[c]).sum();
                out.extend((0..value_dim).map(|j| scale * (read(&before, j) + own * v[j])));
            }
        }
    }
    s.extend(z);
    Sequence { out, norms, state: s }
}

/// The quadratic form over a whole sequence: scores of all pairs and, with an erase, one triangular system.
///
/// # Panics
/// As [`recurrence`].
pub fn quadratic(o: &Options, x: &Chunk, initial: &[f64]) -> Vec<f64> {
    let (key_dim, value_dim, writes) = (o.key_dim, o.value_dim, x.len * o.writes);
    // weight(at, j): what write `j` has faded to at a reader with the decays up to `at` behind it; `None`: the start.
    let weight = |at: Option<usize>, j: Option<usize>, c: usize, col: usize| -> f64 {
        let from = j.map_or(0, |j| j + 1);
        (from..at.map_or(0, |at| at + 1)).map(|w| gate(o, x, w, c, col)).product()
    };
    let dot = |r: &[f64], y: &[f64], at: Option<usize>, j: Option<usize>, col: usize| -> f64 {
        (0..key_dim).map(|c| r[c] * y[c] * weight(at, j, c, col)).sum()
    };
    let from_initial = |r: &[f64], at: Option<usize>, col: usize| -> f64 {
        (0..key_dim).map(|c| r[c] * initial[c * value_dim + col] * weight(at, None, c, col)).sum()
    };
    let mut out = vec![0.0; x.len * value_dim];
    for col in 0..value_dim {
        // y[w] = a_w^T S: what the erase of write w reads.
        let mut y: Vec<f64> = Vec::with_capacity(writes);
        let v = |j: usize| f64::from(x.v[j * value_dim + col]);
        let contribution = |r: &[f64], at: Option<usize>, j: usize, y: &[f64]| -> f64 {
            let k = row(&x.k, key_dim, j);
            match o.erase {
                Erase::None => dot(r, &k, at, Some(j), col) * v(j),
                Erase::Tied => dot(r, &k, at, Some(j), col) * (v(j) + y[j]),
                Erase::Untied => {
                    let b = row(&x.b, key_dim, j);
                    dot(r, &k, at, Some(j), col) * v(j) + dot(r, &b, at, Some(j), col) * y[j]
                }
            }
        };
        if o.erase != Erase::None {
            for w in 0..writes {
                let at = if o.erase_at == EraseAt::After { Some(w) } else { w.checked_sub(1) };
                let a = row(&x.a, key_dim, w);
                let before: f64 = (0..w).map(|j| contribution(&a, at, j, &y)).sum();
                y.push(strength(o, x, w, col) * (from_initial(&a, at, col) + before));
            }
        }
        for i in 0..x.len {
            let q = row(&x.q, key_dim, i);
            let (at, seen) = match o.read {
                Read::Post => (Some((i + 1) * o.writes - 1), (i + 1) * o.writes),
                Read::Pre => (i.checked_sub(1), i),
            };
            let mut sum = from_initial(&q, at, col);
            sum += (0..seen).map(|j| contribution(&q, at, j, &y)).sum::<f64>();
            if o.read == Read::Pre {
                let k = row(&x.k, key_dim, i);
                sum += (0..key_dim).map(|c| q[c] * f64::from(x.bonus[c]) * k[c]).sum::<f64>() * v(i);
            }
            out[i * value_dim + col] = f64::from(o.scale) * sum;
        }
    }
    out
}

/// `e^g` of write `w` at row `c` and column `j` of the state.
fn gate(o: &Options, x: &Chunk, w: usize, c: usize, j: usize) -> f64 {
    let g = |at: usize| f64::from(x.log_decay[at]).exp();
    match o.decay {
        Decay::None => 1.0,
        Decay::Scalar => g(w),
        Decay::Key => g(w * o.key_dim + c),
        Decay::Value => g(w * o.value_dim + j),
    }
}

/// How strongly value channel `j` takes part in the erase of write `w`.
fn strength(o: &Options, x: &Chunk, w: usize, j: usize) -> f64 {
    x.strength.get(w * o.value_dim + j).map_or(1.0, |s| f64::from(*s))
}

fn row(data: &[f32], width: usize, i: usize) -> Vec<f64> {
    data[i * width..(i + 1) * width].iter().map(|x| f64::from(*x)).collect()
}
