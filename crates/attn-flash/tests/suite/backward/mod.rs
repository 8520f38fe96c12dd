//! The backward pass of the softmax engine.

pub(crate) mod case;
mod definition;
mod edges;
mod golden;
mod sequences;
