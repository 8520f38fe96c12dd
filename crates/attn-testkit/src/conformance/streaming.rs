//! Promises about streams: any pieces give what the whole gives.

use super::subject::{Outcome, Subject, agree, at};
use crate::inputs::{Layout, Problem, StoredProblem, StoredTensor};
use crate::tolerance;
use attn_core::{AttnError, AttnShape, DType, Element, OutMut, Qkv, StreamShape, StreamState};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Appended in any pieces, a sequence gives what its definition gives for the whole.
pub(super) fn streaming(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape { batch: 2, head_dim_v: 7, ..AttnShape::square(2, 150, 16) };
    let grouped = AttnShape { n_heads_kv: 1, ..shape };
    for dtype in v.profile.dtypes {
        match dtype {
            DType::F32 => check::<f32>(v, shape)?,
            DType::Bf16 => check::<bf16>(v, shape)?,
            DType::F16 => check::<f16>(v, shape)?,
        }
    }
    if v.profile.grouped_heads {
        check::<f32>(v, grouped)?;
    }
    // Long enough that default windows have let positions go.
    run::<f32>(v, AttnShape::square(1, 600, 8), &[("in random pieces", random_pieces(600))])
}

/// Pieces of 1 to 39 positions that sum to `n`, with empty ones between them, which change nothing.
fn random_pieces(n: usize) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    let (mut pieces, mut rest) = (vec![0], n);
    while rest > 0 {
        let piece = rng.random_range(1..40).min(rest);
        pieces.extend([piece, 0]);
        rest -= piece;
    }
    pieces
}

fn check<E: Element>(v: &Subject<'_>, shape: AttnShape) -> Outcome {
    let n = shape.n_q;
    let cuts = [
        ("at once", vec![n]),
        ("token by token", vec![1; n]),
        ("in random pieces", random_pieces(n)),
        ("as a prompt of 64 and tokens", [vec![64], vec![1; n - 64]].concat()),
        ("in two halves", vec![n / 2, n - n / 2]),
    ];
    run::<E>(v, shape, &cuts)
}

/// Appends a sequence in every way of `cuts`: a name and the lengths of the pieces.
fn run<E: Element>(v: &Subject<'_>, shape: AttnShape, cuts: &[(&str, Vec<usize>)]) -> Outcome {
    let problem = Problem::normal(shape, 15);
    let want = v.definition_stored::<E>(&problem)?.out;
    let stored = problem.store::<E>(Layout::LengthFirst);
    for (how, pieces) in cuts {
        let got =
            stream(v, &stored, shape, pieces).map_err(|e| format!("appended {how}: {e}; {}", at(&shape)))?;
        let what = format!("{} out, appended {how}", E::DTYPE);
        agree(&what, &shape, &got, &want, tolerance::output(&v.profile, E::DTYPE))?;
    }
    Ok(())
}

fn stream<E: Element>(
    v: &Subject<'_>,
    stored: &StoredProblem<E>,
    shape: AttnShape,
    pieces: &[usize],
) -> Result<Vec<f32>, String> {
    let text = |e: AttnError| e.to_string();
    let x = stored.qkv().map_err(text)?;
    let streaming = v.attention.as_streaming().ok_or("as_streaming gave nothing")?;
    let mut state = streaming.start(StreamShape::of(&x)).map_err(text)?;
    if (state.len(), state.is_empty()) != (0, true) {
        return Err(format!("a new stream says it holds {} positions", state.len()));
    }
    let [batch, heads, n, width] = shape.out();
    let mut all = vec![f32::NAN; batch * heads * n * width];
    let mut start = 0;
    for &piece in pieces {
        let range = start..start + piece;
        let part =
            Qkv::new(x.q().narrow(range.clone()), x.k().narrow(range.clone()), x.v().narrow(range.clone()));
        let mut out = StoredTensor::<E>::filled([batch, heads, piece, width], Layout::LengthFirst, f32::NAN);
        let view: OutMut<'_> = out.view_mut("out").map_err(text)?.into();
        state.append(part.map_err(text)?, view).map_err(text)?;
        start += piece;
        if state.len() != start || state.is_empty() != (start == 0) {
            return Err(format!("after {start} positions the stream says it holds {}", state.len()));
        }
        let (rows, piece_len) = (out.to_rows(), piece * width);
        for head in 0..batch * heads {
            all[(head * n + range.start) * width..][..piece_len]
                .copy_from_slice(&rows[head * piece_len..][..piece_len]);
        }
    }
    refuses_another_stream::<E>(state.as_mut(), shape)?;
    Ok(all)
}

/// Rows of another width are an error that leaves the stream as it was.
fn refuses_another_stream<E: Element>(state: &mut dyn StreamState, shape: AttnShape) -> Result<(), String> {
    let before = state.len();
    let other = AttnShape { n_q: 1, n_kv: 1, head_dim: shape.head_dim + 1, ..shape };
    let stored = Problem::normal(other, 16).store::<E>(Layout::HeadsFirst);
    let mut out = StoredTensor::<E>::filled(other.out(), Layout::HeadsFirst, f32::NAN);
    let x = stored.qkv().map_err(|e| e.to_string())?;
    let view = out.view_mut("out").map_err(|e| e.to_string())?;
    match state.append(x, view.into()) {
        Ok(()) => {
            Err(format!("rows of width {} were accepted in a stream of {}", other.head_dim, shape.head_dim))
        }
        Err(_) if state.len() != before => Err("a refused piece changed the length of the stream".into()),
        Err(_) => Ok(()),
    }
}
