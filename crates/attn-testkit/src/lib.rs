//! Proptest strategies, oracle comparison, golden files, gradient checks and the conformance suite for attention variants.
