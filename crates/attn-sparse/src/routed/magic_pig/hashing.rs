//! SimHash: signs of random projections, packed into one code for each table.
//!
//! ```text
//! bit_b of code_t(x)  =  [x . r_tb >= 0]          for tables t and bits b
//! ```
//!
//! Two vectors at an angle of `theta` differ in a bit with probability `theta / pi`.
//!
//! Source: Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002.

use crate::routed::key_panels::{KeyPanels, PANEL, ScoreRows};
use attn_core::simd::Isa;

/// Rows that are hashed together.
const ROWS: usize = 32;

/// Projections of all tables.
#[derive(Debug, Clone)]
pub(super) struct SimHash {
    bits: usize,
    tables: usize,
    /// Projection `b` of table `t` is row `t * bits + b`.
    projections: KeyPanels<f32>,
}

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    products: Vec<f32>,
    wide: Vec<f32>,
}

impl SimHash {
    /// From `projections [width, tables, bits]`.
    pub(super) fn new([width, tables, bits]: [usize; 3], projections: &[f32]) -> Self {
        let n = tables * bits;
        let mut panels = KeyPanels::new(width);
        (0..n).for_each(|at| panels.push((0..width).map(|c| projections[c * n + at])));
        Self { bits, tables, projections: panels }
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        self.projections.bytes()
    }

    /// The codes `[rows, tables]` of `rows [rows, width]`. A row has the same ones whichever stand beside it.
    pub(super) fn codes(&self, rows: &[f32], n_rows: usize, scratch: &mut Workspace) -> Vec<u16> {
        let Self { bits, tables, projections } = self;
        let width = projections.width();
        let mut codes = vec![0; n_rows * tables];
        if *bits == 0 || width == 0 {
            return codes;
        }
        let panels = 0..projections.len().div_ceil(PANEL);
        let stride = panels.len() * PANEL;
        scratch.products.resize(scratch.products.len().max(n_rows.min(ROWS) * stride), 0.0);
        for (q, codes) in rows.chunks(ROWS * width).zip(codes.chunks_mut(ROWS * tables)) {
            let (panels, scores, wide) = (panels.clone(), &mut scratch.products[..], &mut scratch.wide);
            Isa::current().run(ScoreRows { q, keys: projections, panels, scores, stride, wide });
            for (codes, products) in
                codes.chunks_exact_mut(*tables).zip(scratch.products.chunks_exact(stride))
            {
                for (code, products) in codes.iter_mut().zip(products.chunks_exact(*bits)) {
                    let bit = |(b, x): (usize, &f32)| u16::from(*x >= 0.0) << b;
                    *code = products.iter().enumerate().map(bit).sum();
                }
            }
        }
        codes
    }
}
