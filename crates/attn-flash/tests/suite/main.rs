//! Everything about this crate that a user of it can see. One binary: the kernels are compiled once for all tests.

mod apart;
mod backward;
mod bad_input;
mod cache;
#[cfg(feature = "candle")]
mod candle;
mod cells;
mod conformance;
mod decode;
mod engine;
mod golden;
mod named_tensors;
mod native_bf16;
mod sequences;
