//! Sparse attention: patterns and selectors on the exact tile engine.
