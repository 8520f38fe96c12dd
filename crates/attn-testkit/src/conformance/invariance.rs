//! Promises about what must not matter: threads, storage order, what the output held before.

use super::subject::{Outcome, Subject, all, same_bits};
use crate::inputs::{Layout, Problem};
use attn_core::{AttnShape, DType, Element};
use half::{bf16, f16};

/// The same bits with 1, 2, 3 and 7 threads.
pub(super) fn threads(v: &Subject<'_>) -> Outcome {
    let mut shapes =
        vec![AttnShape::square(3, 257, 16), AttnShape { batch: 2, ..AttnShape::square(1, 65, 8) }];
    if v.profile.cross_lengths {
        // Few queries and many keys: what a decoding kernel splits over threads.
        shapes.push(AttnShape { n_kv: 1500, ..AttnShape::square(1, 1, 16) });
    }
    for shape in shapes {
        let problem = Problem::normal(shape, 11);
        let mut first = None;
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let got = pool
                .map_err(|e| format!("no {threads} threads here: {e}"))?
                .install(|| v.forward(&problem))?;
            let want = first.get_or_insert_with(|| got.clone());
            same_bits(&format!("out with {threads} threads, against 1"), &shape, &got, want, all)?;
        }
    }
    Ok(())
}

/// Strided inputs and outputs give the bits that contiguous ones do, and memory between rows stays as it was.
pub(super) fn strided(v: &Subject<'_>) -> Outcome {
    fn check<E: Element>(v: &Subject<'_>) -> Outcome {
        let mut shapes = vec![
            AttnShape { batch: 2, head_dim_v: 7, ..AttnShape::square(3, 33, 5) },
            AttnShape { batch: 2, ..AttnShape::square(2, 130, 16) },
        ];
        if v.profile.grouped_heads {
            shapes.push(AttnShape { batch: 2, n_heads_kv: 2, ..AttnShape::square(4, 65, 8) });
        }
        for shape in shapes {
            let problem = Problem::normal(shape, 12);
            let want = v.forward_stored::<E>(&problem, Layout::HeadsFirst, f32::NAN)?;
            for layout in [Layout::LengthFirst, Layout::Padded] {
                let got = v.forward_stored::<E>(&problem, layout, f32::NAN)?;
                let what = format!("{} out, {layout:?} against contiguous", E::DTYPE);
                same_bits(&what, &shape, &got, &want, all)?;
            }
        }
        Ok(())
    }
    for dtype in v.profile.dtypes {
        match dtype {
            DType::F32 => check::<f32>(v)?,
            DType::Bf16 => check::<bf16>(v)?,
            DType::F16 => check::<f16>(v)?,
        }
    }
    Ok(())
}

/// Every element of the output is written, and what it held before does not matter.
pub(super) fn every_row_written(v: &Subject<'_>) -> Outcome {
    let mut shapes = vec![AttnShape::square(2, 1, 8), AttnShape::square(2, 130, 16)];
    if v.profile.cross_lengths {
        shapes.push(AttnShape { n_kv: 5, ..AttnShape::square(2, 66, 8) });
    }
    for shape in shapes {
        let problem = Problem::normal(shape, 13);
        let run = |before| v.forward_stored::<f32>(&problem, Layout::HeadsFirst, before);
        let (over_nan, over_seven) = (run(f32::NAN)?, run(7.0)?);
        same_bits("out over a buffer of NaN, against one of 7", &shape, &over_nan, &over_seven, all)?;
    }
    Ok(())
}
