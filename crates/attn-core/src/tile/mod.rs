//! Tile kernels: the only code in the workspace with SIMD in it.
//!
//! | kernel | does |
//! |---|---|
//! | [`product()`] | `C += A B`, `A` read by broadcast with any strides, `B` and `C` row-major |
//! | [`causal_product`] | two products into the same rows, each row of the second as far as it sees |
//! | [`Bf16Dot`] | the same product of bf16 pairs, and weights rounded to such pairs, where the CPU has the instruction |
//! | [`ByteDot`] | a product of bytes in integers, and which of its numbers are large enough |
//! | [`exp2`] | `2^x` of a vector |
//! | [`transpose`] | a row-major block into its transpose |
//! | [`widen`] | bf16, f16 or f32 rows into f32, a number at a time |
//! | [`read_rows`] | bf16, f16, int8 or f32 rows into f32, in vectors |
//! | [`Stored`] | four vectors of any storage type, in registers |
//! | [`prefetch`], [`prefetch_behind`] | ask for memory ahead of time |
//! | [`touch`] | asks for a row's cache lines in order |
//! | [`all_finite`] | whether no number is NaN or infinite |
//!
//! One product serves scores, values, gradients and recurrences. For `C = A B` it needs no packing: with queries
//! in the vector lanes, `S^T = K Q^T` and `O^T += V^T P^T` read `K` and `V` where the caller keeps them.

mod causal;
mod convert;
mod dot_bf16;
mod dot_bytes;
mod exp;
mod prefetch;
mod product;
mod touch;
mod transpose;

pub use causal::{CausalProduct, causal_product};
pub use convert::{Stored, read_rows};
pub use dot_bf16::{Bf16Dot, Finish, PairLhs, PairRhs, WeightRows};
pub use dot_bytes::{ByteDot, ByteFactors};
pub use exp::{exp2, exp2_overflows};

pub use prefetch::{prefetch, prefetch_behind};
pub use product::{Lhs, Rhs, Start, TileMut, product};
pub use touch::touch;
pub use transpose::{all_finite, transpose, widen};

/// Floats in the widest vector of any instruction set: buffers whose rows hold lanes are padded to this.
pub const MAX_LANES: usize = 16;
