//! Golden files through the registries: what other people's code computed, compared with what ours gives.
//!
//! [`mapping`] is the one table from the files' names and options to ours; `forms` runs a case (one call, a stream, a
//! merge of parts, the layout of another standard); this module compares and says `pass`, `fail` or `unsupported`.

mod forms;
mod layout;
pub mod mapping;
mod onnx;
mod resolution;

use crate::{Result, registry};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnError, Family};
use attn_testkit::compare::{Mismatch, Tol, compare};
use attn_testkit::golden::GoldenCase;
use serde::Serialize;
use std::path::PathBuf;

/// How a file fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything that was checked agrees.
    Pass,
    /// Something does not.
    Fail,
    /// No variant of ours computes this.
    Unsupported,
}

/// One file's line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    /// The file.
    pub file: PathBuf,
    /// Its family, in the file's words.
    pub family: String,
    /// Its variant, in the file's words.
    pub variant: String,
    /// Its case.
    pub case: String,
    /// The verdict.
    pub status: Status,
    /// Our variant, where there is one.
    pub ours: Option<String>,
    /// Why it failed or is unsupported.
    pub reason: Option<String>,
    /// Tensors that were compared and agree.
    pub checked: Vec<String>,
    /// What a reader of the verdict should know: where the file asks for more than f32 has, or departs from its own words.
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

impl Checked {
    fn new(case: &GoldenCase) -> Self {
        Self {
            file: case.path.clone(),
            family: case.family.to_string(),
            variant: case.variant.clone(),
            case: case.case.clone(),
            status: Status::Unsupported,
            ours: None,
            reason: None,
            checked: Vec::new(),
            notes: Vec::new(),
            unchecked: Vec::new(),
            failure: None,
        }
    }

    fn ended(self, status: Status, reason: impl ToString) -> Self {
        Self { status, reason: Some(reason.to_string()), ..self }
    }
}

/// Runs one case and compares everything that it holds and we compute.
///
/// # Errors
/// Never for a case that our variants refuse: that is a verdict. [`crate::LabError`] for a broken registry.
pub fn check(case: &GoldenCase) -> Result<Checked> {
    let line = Checked::new(case);
    let plan = match mapping::plan(case) {
        Ok(plan) => plan,
        Err(why) => return Ok(line.ended(Status::Unsupported, why)),
    };
    let Some(entry) = registry::all().into_iter().find(|entry| entry.name == plan.ours) else {
        let why = format!("no variant `{}` in this build", plan.ours);
        return Ok(line.ended(Status::Unsupported, why));
    };
    let line = Checked { ours: Some(entry.name.to_string()), ..line };
    Ok(match forms::run(&entry, &plan, case) {
        Ok(results) => judge(line, &entry, &plan, case, &results),
        Err(e @ AttnError::Unsupported { .. }) => line.ended(Status::Unsupported, e),
        Err(e) => line.ended(Status::Fail, format!("refused: {e}")),
    })
}

/// One way in which a case was computed; its label is empty for the plain call.
struct Computed {
    label: &'static str,
    tensors: NamedTensors,
}

fn judge(
    mut line: Checked,
    entry: &Entry,
    plan: &mapping::Plan,
    case: &GoldenCase,
    results: &[Computed],
) -> Checked {
    let mut worst: Option<Disagreement> = None;
    for (name, want) in &case.outputs.0 {
        let full = format!("out.{name}");
        let corrected = nan_query_rows(case, name, want);
        let want = corrected.as_ref().map_or(want, |(_, corrected)| corrected);
        if let Some((rows, _)) = &corrected {
            line.notes
                .push(format!("{full}: rows of NaN queries must be NaN; the file stores numbers in {rows}"));
        }
        let ours = plan.output_name(name);
        let mut compared = false;
        for computed in results {
            let Some(got) = computed.tensors.get(ours) else { continue };
            let tol = case.tolerance_for(&full).unwrap_or(Tol::EXACT);
            let label =
                if computed.label.is_empty() { full.clone() } else { format!("{full} ({})", computed.label) };
            compared = true;
            match compare_tensors(&label, got, want, tol) {
                Ok(()) => line.checked.push(label),
                Err(_)
                    if computed.label.is_empty() && plan.form == mapping::Form::Call && {
                        let beyond = beyond_f32(entry, plan, name, got, want, tol);
                        line.notes.extend(beyond.iter().map(|note| format!("{full}: {note}")));
                        beyond.is_some()
                    } =>
                {
                    line.checked.push(label);
                }
                Err(wrong) if worst.as_ref().is_none_or(|(most, _)| wrong.0 > *most) => worst = Some(wrong),
                Err(_) => {}
            }
        }
        if !compared {
            line.unchecked
                .push(Unchecked { tensor: full, because: format!("{} does not return it", entry.name) });
        }
    }
    for name in case.grads.0.keys() {
        let because = format!("{} has no backward", entry.name);
        line.unchecked.push(Unchecked { tensor: format!("grad.{name}"), because });
    }
    if let Some((_, failure)) = worst {
        line.reason = Some(failure.to_string());
        line.failure = Some(failure);
        line.status = Status::Fail;
    } else if line.checked.is_empty() {
        let why = line.unchecked.first().map_or("it holds no output", |u| u.because.as_str()).to_string();
        line = line.ended(Status::Unsupported, why);
    } else {
        line.status = Status::Pass;
    }
    line
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
    plan: &mapping::Plan,
    output: &str,
    got: &NamedTensor,
    want: &NamedTensor,
    tol: Tol,
) -> Option<String> {
    let resolved = resolution::of(entry, plan, output).ok()??;
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
