//! The backward pass of the softmax engine.

mod case;
mod definition;
mod edges;
mod golden;
mod sequences;
