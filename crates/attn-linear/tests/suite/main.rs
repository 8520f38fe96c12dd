//! One binary for all of the crate's tests: linking it once is most of what several would cost.

mod aft;
mod channel;
mod conformance;
mod differences;
mod features_conformance;
mod features_golden;
mod features_gradients;
mod features_properties;
mod gated_features;
mod golden;
mod golden_cases;
mod golden_variations;
mod kernelised;
mod low_rank;
mod matrix_state_conformance;
mod matrix_state_golden;
mod matrix_state_gradients;
mod matrix_state_identities;
mod scan_conformance;
mod scan_golden;
mod scan_gradients;
mod scan_properties;
mod segments;
#[cfg(feature = "candle")]
mod tensors;
mod typed;
