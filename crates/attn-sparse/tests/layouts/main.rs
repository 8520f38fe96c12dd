//! Layouts: golden files, gradients, and the properties of the definitions.

mod golden;
mod gradients;
mod properties;
