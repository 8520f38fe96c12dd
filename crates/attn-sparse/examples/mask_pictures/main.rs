//! Draws what every registered variant attends, one SVG a head, and an index page with options and densities:
//! `cargo run --release --example mask_pictures -- FOLDER`, then open `FOLDER/index.html`.
//!
//! Shown are the weights of a call whose values are the unit vectors, so that output `i` holds how much of each value reaches
//! it: a pair is drawn where that is not 0. Queries and keys are drawn at random, near to one another where they are near in
//! time, with a few keys that all queries like.
#![allow(clippy::print_stdout)] // what it is for

mod small_options;

use attn_core::mask::{Pair, Predicate};
use attn_core::registry::{Entry, Options};
use attn_core::{AttnShape, Qkv, View, ViewMut};
use attn_sparse::{
    DilatedWindow, Intersection, LocalBuckets, Picture, SlidingWindow, SparseAttention, Union,
};
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

const N: usize = 64;
const D: usize = 8;
const SHAPE: AttnShape =
    AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 2, n_q: N, n_kv: N, head_dim: D, head_dim_v: N };

/// Numbers between -1 and 1 that look random (a linear congruential generator, the constants of Knuth's MMIX).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `n` rows that change slowly.
    fn walk(&mut self, n: usize) -> Vec<f32> {
        let mut row = [0.0; D];
        let mut rows = Vec::with_capacity(n * D);
        for _ in 0..n {
            row.iter_mut().for_each(|x| *x = 0.8 * *x + self.next());
            rows.extend(row.map(|x| 1.5 * x));
        }
        rows
    }
}

struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Inputs {
    fn new() -> Self {
        let mut numbers = Numbers(3);
        let two = |numbers: &mut Numbers| [numbers.walk(N), numbers.walk(N)].concat();
        let (mut q, mut k) = (two(&mut numbers), two(&mut numbers));
        // Near in time, near in direction.
        q.iter_mut().zip(&k).for_each(|(q, k)| *q = 0.6 * *q + 0.6 * k);
        q.chunks_exact_mut(D).for_each(|q| q[0] = q[0].abs() + 0.5);
        for liked in [0, 21, 42] {
            (0..2).for_each(|head| k[(head * N + liked) * D] = 4.0);
        }
        let v = (0..2 * N * N).map(|at| f32::from(u8::from(at / N % N == at % N))).collect();
        Self { q, k, v }
    }

    fn qkv(&self) -> Result<Qkv<'_>, Box<dyn Error>> {
        let view = |name: &'static str, data, axes| View::contiguous(name, data, axes);
        let (q, k) = (view("q", &self.q, SHAPE.q())?, view("k", &self.k, SHAPE.k())?);
        Ok(Qkv::new(q, k, view("v", &self.v, SHAPE.v())?)?)
    }
}

/// One figure of the page.
struct Figure {
    name: String,
    words: String,
    options: String,
    /// File names, one a head if heads differ.
    files: Vec<String>,
    density: f64,
}

fn draw(
    folder: &Path,
    attention: &dyn attn_core::Attention,
    name: &str,
    inputs: &Inputs,
) -> Result<(Vec<String>, f64), Box<dyn Error>> {
    let mut weights = vec![0.0; SHAPE.out().iter().product()];
    let out = ViewMut::contiguous("out", &mut weights, SHAPE.out())?;
    attention.forward(inputs.qkv()?, out.into())?;
    let is_seen: Vec<bool> = weights.iter().map(|weight| *weight != 0.0).collect();
    let density = is_seen.iter().filter(|seen| **seen).count() as f64 / is_seen.len() as f64;
    let (first, second) = is_seen.split_at(N * N);
    let heads = if first == second { vec![first] } else { vec![first, second] };
    let mut files = Vec::new();
    for (head, seen) in heads.iter().enumerate() {
        let title = if heads.len() == 1 { name.to_string() } else { format!("{name}, head {head}") };
        let mask = Predicate(|pair: Pair| seen[pair.i * N + pair.j]);
        let file = format!("{name}-{head}.svg");
        std::fs::write(folder.join(&file), Picture::new(&title).svg(&mask, &SHAPE)?)?;
        std::fs::write(folder.join(format!("{name}-{head}.png")), Picture::new(&title).png(&mask, &SHAPE)?)?;
        files.push(file);
    }
    Ok((files, density))
}

fn figure_of(folder: &Path, entry: &Entry, inputs: &Inputs) -> Result<Figure, Box<dyn Error>> {
    let small = small_options::small_options(entry.name).unwrap_or_default();
    let attention = entry.build(&Options::parse(small.split_whitespace())?)?;
    let (files, density) = draw(folder, &*attention, entry.name, inputs)?;
    let (name, words) = (entry.name.to_string(), entry.summary.to_string());
    Ok(Figure { name, words, options: small.to_string(), files, density })
}

/// Unions and intersections have no name in the registry.
fn composed(folder: &Path, inputs: &Inputs) -> Result<[Figure; 2], Box<dyn Error>> {
    let union = Union(DilatedWindow::new(16, 4, true), SlidingWindow::causal(6));
    let buckets = LocalBuckets { bucket: 16, back: 1, forward: 0, causal: true };
    let intersection = Intersection(buckets, SlidingWindow::causal(20));
    let figure = |name: &str, words: &str, (files, density)| Figure {
        name: name.into(),
        words: words.into(),
        options: String::new(),
        files,
        density,
    };
    Ok([
        figure(
            "union",
            "A dilated window or a narrow one",
            draw(folder, &SparseAttention::new(union), "union", inputs)?,
        ),
        figure(
            "intersection",
            "Buckets and a window",
            draw(folder, &SparseAttention::new(intersection), "intersection", inputs)?,
        ),
    ])
}

fn page(figures: &[Figure]) -> String {
    let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
    let mut html = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>What each variant attends</title>\n<style>\n\
         body{font:14px sans-serif;margin:24px;color:#222}main{display:flex;flex-wrap:wrap;gap:24px}\n\
         figure{margin:0;width:420px;border:1px solid #ddd;border-radius:6px;padding:12px}\n\
         figure.wide{width:840px}figure img{width:400px}code{background:#f3f3f3;padding:1px 4px}\n\
         figcaption b{font-size:16px}\n</style></head><body>\n<h1>What each variant attends</h1>\n",
    );
    // Writing to a string does not fail.
    let _ = writeln!(
        html,
        "<p>{N} queries (downwards) and {N} keys (to the right), two heads; the second is drawn where it \
         differs. Options are chosen so that the choice shows at this length.</p>\n<main>"
    );
    for Figure { name, words, options, files, density } in figures {
        let class = if files.len() > 1 { " class=\"wide\"" } else { "" };
        let _ = writeln!(html, "<figure{class} id=\"{name}\">");
        for file in files {
            let _ = write!(html, "<img src=\"{file}\" alt=\"{name}\">");
        }
        let _ = writeln!(
            html,
            "<figcaption><b>{name}</b>: {}<br>density {:.1} %<br><code>{}</code></figcaption></figure>",
            escaped(words),
            100.0 * density,
            escaped(options)
        );
    }
    html.push_str("</main></body></html>\n");
    html
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "masks".into());
    let (folder, inputs) = (Path::new(&folder), Inputs::new());
    std::fs::create_dir_all(folder)?;
    let mut entries = attn_sparse::registry();
    entries.sort_by_key(|entry| entry.name);
    let mut figures = Vec::new();
    for entry in &entries {
        figures.push(figure_of(folder, entry, &inputs)?);
    }
    figures.extend(composed(folder, &inputs)?);
    std::fs::write(folder.join("index.html"), page(&figures))?;
    println!("{} variants drawn: {}", figures.len(), folder.join("index.html").display());
    Ok(())
}
