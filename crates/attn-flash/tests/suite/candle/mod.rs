//! On candle tensors: the same numbers and gradients as candle's own matmul, softmax, matmul.

mod bad_input;
mod caches;
mod drop_in;
mod extras;
mod naive;
mod operations;
mod paged;
