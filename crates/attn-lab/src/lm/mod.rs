//! Language models whose attention layers give real `q`, `k` and `v`, and the text they run on.
//!
//! [`ByteLm`] is small, comes with the program and was trained by it: pre-norm blocks over bytes (256 tokens, embedding
//! tied to the output), all with sliding-window rotary attention but for one *global* layer,
//!
//! ```text
//! out_i = Σ_{j ≤ i} softmax_j( s ln(i + 1) q_i·k_j / √head_dim ) v_j
//! ```
//!
//! without position encoding and with a learned `s` per head. Softmax over `n` keys needs scores that grow with `ln n`
//! to keep its sharpness (arXiv:2501.19399), and a layer that knows no positions cannot meet one beyond those it was
//! trained on; so the layer keeps working at lengths far beyond training. [`ByteLm::gate`] measures whether it does: the
//! loss with exact attention must not rise with the context, and must be lower than without the layer. The factor
//! `s ln(i + 1)` is part of the captured `q`, so that the captured tensors are plain causal attention inputs.
//!
//! Two readers bring other models' tensors: [`llama2c`] and [`llama_safetensors`], both into a [`LlamaLike`].

mod attention;
mod block;
mod byte_lm;
mod capture;
mod captured;
mod config;
mod error;
mod gate;
mod global_attention;
pub mod llama2c;
mod llama2c_tokenizer;
mod llama_like;
pub mod llama_safetensors;
mod loss;
mod masked_softmax;
mod rms_norm;
mod rotary;
mod rows;
mod swiglu;
pub mod text;
mod training;
mod weights;

#[cfg(test)]
mod tests;

pub use byte_lm::ByteLm;
pub use captured::Captured;
pub use config::Config;
pub use error::{LmError, Result};
pub use gate::GateRow;
pub use global_attention::GlobalAttention;
pub use llama_like::{LlamaConfig, LlamaLike};
pub use llama2c_tokenizer::{BOS, Tokenizer};
pub use weights::Weights;
