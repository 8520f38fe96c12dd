//! ArkVale: pages by the largest score that any key in a volume around the page's keys could have.
//!
//! ```text
//! box:   U(q, P) = sum_c max(q_c max_j k_jc, q_c min_j k_jc)
//! ball:  U(q, P) = q . m + |q| r       m the mean of the page's keys, r the largest distance from it
//! ```
//!
//! both at least every `q . k_j` in the page. With `q = q+ + q-`, its positive and its negative part, either bound is one
//! product: `[q+, q-] . [max, min]`, `[q, |q|] . [m, r]`. The first and the last pages are always attended.
//!
//! The paper keeps the pages that are not attended in slower memory and recalls them when their bounds rise; here all keys
//! stay in one cache, and which pages are attended is the same.
//!
//! Source: Chen, Wang, Cao, Wu, Zheng, Li, Zhu, Xiao, Li, Liang, "ArkVale: Efficient Generative LLM Inference with Recallable
//! Key-Value Eviction", NeurIPS 2024.

use super::{PageScorer, Pages};
use attn_core::Result;

/// What encloses the keys of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Volume {
    /// The largest and the smallest value of each feature.
    Box,
    /// The mean, and the largest distance from it.
    Ball,
}

/// Pages of keys; a query takes those whose volumes promise the largest scores.
///
/// Time of a decoding step: `O(n_kv / page_len * head_dim)` for the scores and `pages * page_len * (head_dim + head_dim_v)` for
/// attention, a query head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArkVale {
    /// Which pages a query takes.
    pub pages: Pages,
    /// What encloses the keys of a page.
    pub volume: Volume,
}

impl Default for ArkVale {
    /// 32 pages of 32 keys, the first two and the last two among them, in boxes.
    fn default() -> Self {
        Self { pages: Pages { page_len: 32, n_pages: 32, first: 2, last: 2 }, volume: Volume::Box }
    }
}

impl PageScorer for ArkVale {
    const NAME: &'static str = "arkvale";

    type Sketch = ();

    fn pages(&self) -> Pages {
        self.pages
    }

    fn width(&self, head_dim: usize) -> Result<usize> {
        Ok(match self.volume {
            Volume::Box => 2 * head_dim,
            Volume::Ball => head_dim + 1,
        })
    }

    fn sketch(&self, _: usize, _: &[f32], _: usize) {}

    fn note(&self, (): &(), page: &[f32], note: &mut [f32]) {
        match self.volume {
            Volume::Box => {
                let d = note.len() / 2;
                let (max, min) = note.split_at_mut(d);
                max.copy_from_slice(&page[..d]);
                min.copy_from_slice(&page[..d]);
                for key in page.chunks_exact(d) {
                    for ((max, min), x) in max.iter_mut().zip(min.iter_mut()).zip(key) {
                        *max = max.max(*x);
                        *min = min.min(*x);
                    }
                }
            }
            Volume::Ball => {
                let d = note.len() - 1;
                let (mean, radius) = note.split_at_mut(d);
                mean.fill(0.0);
                for key in page.chunks_exact(d) {
                    mean.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
                }
                let n = (page.len() / d) as f32;
                mean.iter_mut().for_each(|sum| *sum /= n);
                let squared =
                    |key: &[f32]| -> f32 { key.iter().zip(&*mean).map(|(x, m)| (x - m) * (x - m)).sum() };
                radius[0] = page.chunks_exact(d).map(squared).fold(0.0, f32::max).sqrt();
            }
        }
    }

    fn ask(&self, (): &(), q: &[f32], question: &mut [f32]) {
        let (first, rest) = question.split_at_mut(q.len());
        first.copy_from_slice(q);
        match self.volume {
            Volume::Box => {
                for (positive, negative) in first.iter_mut().zip(rest) {
                    let q = *positive;
                    (*positive, *negative) = if q > 0.0 { (q, 0.0) } else { (0.0, q) };
                }
            }
            Volume::Ball => rest[0] = q.iter().map(|x| x * x).sum::<f32>().sqrt(),
        }
    }
}
