//! Outputs of a variant against a golden case.

use super::GoldenCase;
use crate::compare::assert_close;
use attn_core::registry::{NamedTensors, TensorData};

impl GoldenCase {
    /// Compares every output that the case stores with the one of the same name in `got`.
    ///
    /// # Panics
    /// At the first output that is missing, has another shape or is outside the case's tolerance; names the case, the
    /// output and the element.
    #[track_caller]
    pub fn assert_outputs(&self, got: &NamedTensors) {
        for (name, want) in &self.outputs.0 {
            let what = format!("{} {}: {name}", self.variant, self.case);
            let got = got.require(name).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(got.shape, want.shape, "{what}: shape");
            let tol =
                self.tolerance_for(&format!("out.{name}")).unwrap_or_else(|| panic!("{what}: no tolerance"));
            let want = want.data.to_f64();
            match &got.data {
                TensorData::F32(got) => assert_close(&what, got, &want, tol),
                other => assert_close(&what, &other.to_f64(), &want, tol),
            }
        }
    }
}
