//! The scan engine: recurrences whose state is decayed element by element.
//!
//! ```text
//! h_t = e^(g_t) o h_(t-1) + x_t
//! ```
//!
//! over a vector a head (HGRN, minGRU, RG-LRU), over `key rows x value channels` with a decay of its own for each element
//! (Mamba-1, Longhorn), or over the triple (numerator, denominator, running maximum) of a running softmax a channel (RWKV-4,
//! AFT-simple). None of them is a matrix product; channels lie in the vector lanes and tokens follow one another.
//!
//! A recurrence is a [`Cell`]: forwards and backwards through some tokens of one head. [`forward`] and [`backward`] run it over
//! all heads, [`ScanState`] is what it remembers, [`ScanAttention`] is what it makes of q, k and v.

mod attention;
pub(crate) mod cell;
mod driver;
pub(crate) mod element;
pub(crate) mod gemm;
pub(crate) mod log_sum;
pub(crate) mod math;
pub(crate) mod outer;
mod state;
mod tokens;

pub use attention::{HeadInputs, ScanAttention, ScanVariant};
pub use cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
pub use driver::{Gradients, backward, forward};
pub(crate) use driver::{absorb, workspace_bytes};
pub use state::ScanState;
pub use tokens::Tokens;
pub(crate) use tokens::sequences_of;
