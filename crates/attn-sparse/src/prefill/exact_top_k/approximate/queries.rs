//! Up to a panel of queries, made ready.

use super::{Keys, Stage, is_tame, norm, quads, round, scale_of};
use crate::scores::PANEL;
use attn_core::tile::ByteDot;

const _: () = assert!(PANEL == ByteDot::COLUMNS);

/// Up to [`PANEL`] queries; the lanes of others are 0.
#[derive(Default)]
pub(in super::super) struct Queries {
    /// `[width, PANEL]`; nothing in bytes.
    pub(super) turned: Vec<f32>,
    /// Signed bytes, `[quads, PANEL]`; nothing in f32.
    pub(super) codes: Vec<u32>,
    pub(super) scale: [f32; PANEL],
    /// What takes the unsigned keys' 128 out of the sums.
    pub(super) start: [i32; PANEL],
    pub(super) norm: [f32; PANEL],
    /// The norm of what rounding took away.
    pub(super) lost: [f32; PANEL],
    /// The part of the error that is the same for all keys.
    pub(super) rest: [f32; PANEL],
    /// Lanes of queries that have no bounds.
    wild: u32,
}

impl Queries {
    /// Makes `rows [at most PANEL, width]` ready.
    #[inline(always)]
    pub(in super::super) fn set(&mut self, rows: &[f32], width: usize, keys: &Keys<'_>) {
        let Self { mut turned, mut codes, .. } = std::mem::take(self);
        turned.clear();
        codes.clear();
        match keys.stage {
            Stage::F32 => turned.resize(width * PANEL, 0.0),
            Stage::Bytes(_) => codes.resize(quads(width) * PANEL, 0),
        }
        *self = Self { turned, codes, ..Self::default() };
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            let x = norm(row);
            if !is_tame(x) {
                self.wild |= 1 << lane;
                continue;
            }
            match keys.stage {
                Stage::F32 => row.iter().enumerate().for_each(|(c, x)| self.turned[c * PANEL + lane] = *x),
                Stage::Bytes(_) => {
                    self.scale[lane] = scale_of(row.iter().fold(0.0, |most, x| most.max(x.abs())));
                    let codes = &mut self.codes[lane..];
                    self.lost[lane] = round(row, self.scale[lane], codes, PANEL).lost;
                    let quad_sum =
                        |quad: &u32| quad.to_le_bytes().map(|b| i32::from(b as i8)).iter().sum::<i32>();
                    self.start[lane] = -128 * codes.iter().step_by(PANEL).map(quad_sum).sum::<i32>();
                }
            }
            self.norm[lane] = x;
            let (x, width) = (f64::from(x), width as f64);
            let wide_sums = width * 2f64.powi(-51) * x * f64::from(keys.given);
            let tiny = width * 1e-37 * (2.0 + x + f64::from(keys.scored));
            self.rest[lane] = ((1.01 * wide_sums + tiny) as f32).next_up();
        }
    }

    /// Whether a lane's query has no bounds.
    pub(in super::super) fn is_wild(&self, lane: usize) -> bool {
        self.wild >> lane & 1 == 1
    }
}
