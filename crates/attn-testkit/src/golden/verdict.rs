//! What a registry computed, against what the file holds.

use super::{Form, GoldenCase, Outcome, Plan, resolution};
use crate::compare::{Mismatch, Tol, compare};
use attn_core::Family;
use attn_core::registry::{Entry, NamedTensor, TensorData};
use serde::Serialize;

/// What was compared, and how it went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// Tensors that were compared and agree.
    pub checked: Vec<String>,
    /// Where the file asks for more than f32 has, or departs from its own words.
    pub notes: Vec<String>,
    /// Tensors of the file that were not compared.
    pub unchecked: Vec<Unchecked>,
    /// The largest disagreement.
    pub failure: Option<Failure>,
}

/// A tensor of a file that was not compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unchecked {
    /// The tensor, as the file calls it.
    pub tensor: String,
    /// Why not.
    pub because: String,
}

/// The element of a tensor that is furthest beyond its tolerance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failure {
    /// The tensor, as the file calls it, and how it was computed.
    pub tensor: String,
    /// Its index.
    pub place: Vec<usize>,
    /// What we computed.
    pub got: f64,
    /// What the file holds.
    pub want: f64,
    /// The absolute difference.
    pub error: f64,
    /// The largest difference allowed there.
    pub allowed: f64,
    /// The file's tolerance.
    pub tolerance: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tensor, place, got, want, error, allowed, tolerance } = self;
        write!(
            f,
            "{tensor}: error {error:.3e} at {place:?} (got {got:e}, want {want:e}), allowed {allowed:.3e}; \
             tolerance {tolerance}"
        )
    }
}

/// Compares everything that the case holds and the outcome of its plan gives: outputs, and gradients of all inputs.
pub fn judge(entry: &Entry, plan: &Plan, case: &GoldenCase, outcome: &Outcome) -> Verdict {
    let mut verdict = Verdict { notes: plan.notes.clone(), ..Verdict::default() };
    let mut worst: Option<Disagreement> = None;
    let outputs = case.outputs.0.iter().map(|(name, want)| (format!("out.{name}"), name.clone(), want));
    let grads =
        case.grads.0.iter().map(|(name, want)| (format!("grad.{name}"), format!("grad.{name}"), want));
    for (full, name, want) in outputs.chain(grads) {
        let corrected = nan_query_rows(case, &name, want);
        let want = corrected.as_ref().map_or(want, |(_, corrected)| corrected);
        if let Some((rows, _)) = &corrected {
            let note = format!("{full}: rows of NaN queries must be NaN; the file stores numbers in {rows}");
            verdict.notes.push(note);
        }
        let mut compared = false;
        for computed in &outcome.computed {
            let Some(got) = computed.tensors.get(&name) else { continue };
            let tol = case.tolerance_for(&full).unwrap_or(Tol::EXACT);
            let label = match computed.label {
                "" => full.clone(),
                how => format!("{full} ({how})"),
            };
            compared = true;
            let excusable = computed.label.is_empty() && plan.form == Form::Call;
            let excuse = |name: &str, got, want, tol| {
                if excusable { beyond_f32(entry, plan, case, name, got, want, tol) } else { None }
            };
            match compare_tensors(&label, got, want, tol) {
                Ok(()) => verdict.checked.push(label),
                Err(wrong) => match excuse(&name, got, want, tol) {
                    Some(note) => {
                        verdict.notes.push(format!("{full}: {note}"));
                        verdict.checked.push(label);
                    }
                    None if worst.as_ref().is_none_or(|(most, _)| wrong.0 > *most) => worst = Some(wrong),
                    None => {}
                },
            }
        }
        if !compared {
            let because = match &outcome.no_gradients {
                Some(why) if full.starts_with("grad.") => why.clone(),
                _ => format!("{} does not return it", entry.name),
            };
            verdict.unchecked.push(Unchecked { tensor: full, because });
        }
    }
    verdict.failure = worst.map(|(_, failure)| failure);
    verdict
}

/// How bad, and where.
type Disagreement = (f64, Failure);

fn compare_tensors(
    label: &str,
    got: &NamedTensor,
    want: &NamedTensor,
    tol: Tol,
) -> std::result::Result<(), Disagreement> {
    let failure = |place, got, want, error, allowed| Failure {
        tensor: label.into(),
        place,
        got,
        want,
        error,
        allowed,
        tolerance: tol.to_string(),
    };
    if got.shape != want.shape {
        let label = format!("{label}: shape {:?}, wanted {:?}", got.shape, want.shape);
        let failure = failure(Vec::new(), f64::NAN, f64::NAN, f64::INFINITY, 0.0);
        return Err((f64::INFINITY, Failure { tensor: label, ..failure }));
    }
    match compare(&got.data.to_f64(), &want.data.to_f64(), tol) {
        Ok(_) => Ok(()),
        Err(Mismatch::Elements { worst, .. }) => {
            let error = worst.error();
            let badness =
                if error.is_finite() && worst.bound > 0.0 { error / worst.bound } else { f64::INFINITY };
            let failure = failure(worst.place(&want.shape), worst.got, worst.want, error, worst.bound);
            Err((badness, failure))
        }
        Err(Mismatch::Length { .. }) => {
            Err((f64::INFINITY, failure(Vec::new(), f64::NAN, f64::NAN, f64::INFINITY, 0.0)))
        }
    }
}

/// If the wanted rows of exact attention hold numbers where the query is NaN: how many, and the tensor with NaN in them. A
/// row of a NaN query is NaN by definition; some references replace it by zeros.
fn nan_query_rows(case: &GoldenCase, output: &str, want: &NamedTensor) -> Option<(usize, NamedTensor)> {
    let q = case.inputs.get("q").filter(|q| case.family == Family::Exact && q.shape.len() == 4)?;
    let (width, rows) = (*q.shape.last()?, q.shape[..3].iter().product::<usize>());
    let TensorData::F32(want_data) = &want.data else { return None };
    if !["o", "lse"].contains(&output) || rows == 0 || !want_data.len().is_multiple_of(rows) {
        return None;
    }
    let mut corrected = want_data.clone();
    let mut count = 0;
    let per_row = want_data.len() / rows;
    for (query, row) in q.data.to_f64().chunks_exact(width).zip(corrected.chunks_exact_mut(per_row)) {
        if query.iter().any(|x| x.is_nan()) && !row.iter().all(|x| x.is_nan()) {
            row.fill(f32::NAN);
            count += 1;
        }
    }
    let data = TensorData::F32(corrected);
    (count > 0).then(|| (count, NamedTensor { shape: want.shape.clone(), data }))
}

/// If every element outside the file's tolerance is within what f32 resolves there: says how many and how far.
fn beyond_f32(
    entry: &Entry,
    plan: &Plan,
    case: &GoldenCase,
    name: &str,
    got: &NamedTensor,
    want: &NamedTensor,
    tol: Tol,
) -> Option<String> {
    let resolved = resolution::of(entry, plan, case, name).ok()??;
    let (got, want) = (got.data.to_f64(), want.data.to_f64());
    if !matches!(tol, Tol::AllClose { .. }) || got.len() != want.len() || resolved.len() != want.len() {
        return None;
    }
    let outside = (0..want.len()).filter(|&at| compare(&got[at..=at], &want[at..=at], tol).is_err());
    let outside: Vec<usize> = outside.collect();
    if !outside.iter().all(|&at| (got[at] - want[at]).abs() <= resolved[at]) {
        return None;
    }
    let share = |at: &usize| (got[*at] - want[*at]).abs() / resolved[*at];
    let worst = outside.iter().map(share).fold(0.0, f64::max);
    Some(format!(
        "{} of {} elements ask for more than f32 resolves ({tol}); they are within {:.0} % of that resolution",
        outside.len(),
        want.len(),
        100.0 * worst
    ))
}
