//! Centroids: drawn, and moved towards the tokens they are nearest to.

use super::Routing;
use crate::sorted::noise::normal;
use crate::sorted::rows::normalize;
use crate::sorted::scores::head_rows;
use attn_core::{AttnError, Qkv, Result};

/// Rows of unit length in directions drawn with `seed`.
pub(super) fn drawn(seed: u64, n: usize, width: usize) -> Vec<f32> {
    let mut means = normal(seed, n * width);
    normalize(&mut means, width);
    means
}

impl Routing {
    /// Centroids drawn with the seed, `[n_heads_q, num_clusters, head_dim]`: what a call without centroids uses.
    pub fn drawn_means(&self, x: &Qkv<'_>) -> Vec<f32> {
        let shape = x.shape();
        drawn(self.seed, shape.n_heads_q * self.clusters(&shape), shape.head_dim)
    }

    /// One step of online k-means on the sphere, over the queries and keys (queries alone where they are shared) of all batch
    /// entries: each row of unit length joins its nearest centroid, and
    ///
    /// ```text
    /// mu_c = decay mu_c + (1 - decay) normalise(sum of the rows of cluster c)
    /// ```
    ///
    /// A cluster that no row joins stays where it is. `means [n_heads_q, num_clusters, head_dim]`.
    ///
    /// # Errors
    /// [`AttnError`] for another number of elements or a decay outside 0 to 1; nothing has then been written.
    pub fn update_means(&self, x: &Qkv<'_>, means: &mut [f32], decay: f32) -> Result<()> {
        let (shape, width) = (x.shape(), x.shape().head_dim);
        if !(0.0..=1.0).contains(&decay) {
            return Err(AttnError::value("decay", decay, "between 0 and 1"));
        }
        let per_head = means.len().checked_div(shape.n_heads_q).unwrap_or(0);
        if per_head * shape.n_heads_q != means.len() || !per_head.is_multiple_of(width) {
            let expected = format!("a multiple of n_heads_q x head_dim = {}", shape.n_heads_q * width);
            return Err(AttnError::shape("means", "elements", means.len(), expected));
        }
        for head in 0..shape.n_heads_q {
            let means = &mut means[head * per_head..][..per_head];
            let mut sums = vec![0.0f64; per_head];
            for batch in 0..shape.batch {
                let mut rows = head_rows(x.q(), [batch, head]);
                if !self.shared_qk {
                    rows.extend(head_rows(x.k(), [batch, shape.kv_head(head)]));
                }
                normalize(&mut rows, width);
                for row in rows.chunks_exact(width) {
                    let cosine = |mean: &[f32]| row.iter().zip(mean).map(|(x, m)| x * m).sum::<f32>();
                    let mut nearest = (0, f32::NEG_INFINITY);
                    for (c, mean) in means.chunks_exact(width).enumerate() {
                        let cosine = cosine(mean);
                        nearest = if cosine > nearest.1 { (c, cosine) } else { nearest };
                    }
                    let sum = &mut sums[nearest.0 * width..][..width];
                    if nearest.1 > f32::NEG_INFINITY {
                        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
                    }
                }
            }
            for (mean, sum) in means.chunks_exact_mut(width).zip(sums.chunks_exact(width)) {
                let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
                if length > 0.0 {
                    let of = |x: f64| (f64::from(1.0 - decay) * x / length) as f32;
                    mean.iter_mut().zip(sum).for_each(|(mean, x)| *mean = decay * *mean + of(*x));
                }
            }
        }
        Ok(())
    }
}
