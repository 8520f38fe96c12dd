//! How much error is allowed, in one place and the same on every machine.
//!
//! A variant states `max_error` in its [`Profile`]: what its f32 forward pass may differ from its own definition in
//! f64, as a share of the largest absolute value, for inputs of order one. It is measured by its author (twice the error
//! of plain f32 loops is a good value). Everything else follows from it and from the storage type's unit roundoff `u`:
//!
//! | What is compared | Allowed |
//! | --- | --- |
//! | f32 output with the definition | `max_error` of the largest |
//! | two f32 outputs that should be equal but for rounding | `2 max_error` of the largest |
//! | bf16, f16 output with the definition of the rounded inputs | `max_error + 2 u` of the largest |
//! | log-sum-exp with the definition | `4 max_error + max_error abs(want)` |
//! | output at extreme scores (queries times 1000) | `2500 max_error`, at least 1e-2, of the largest |
//!
//! The output of a half type is rounded once, an error of `u` of itself; the other `u` is for a variant that also stores an
//! intermediate (probabilities, a state) in that type. A score of size `s` has the rounding error `u s` before it
//! enters an exponential, so errors grow with the size of scores, hence the last row.

use crate::compare::Tol;
use attn_core::{DType, Profile};

/// An output of storage type `dtype` against the definition of the same (rounded) inputs.
pub fn output(profile: &Profile, dtype: DType) -> Tol {
    Tol::ScaledMax(match dtype {
        DType::F32 => profile.max_error,
        half => profile.max_error + 2.0 * half.roundoff(),
    })
}

/// Two f32 outputs of the variant that are equal in exact arithmetic.
pub fn same(profile: &Profile) -> Tol {
    Tol::ScaledMax(2.0 * profile.max_error)
}

/// A log-sum-exp against its definition.
pub fn lse(profile: &Profile) -> Tol {
    Tol::AllClose { atol: 4.0 * profile.max_error, rtol: profile.max_error }
}

/// An f32 output whose scores are a thousand times the usual ones.
pub fn extreme(profile: &Profile) -> Tol {
    Tol::ScaledMax((2500.0 * profile.max_error).max(1e-2))
}
