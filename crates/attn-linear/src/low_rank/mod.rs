//! Softmax attention through few summaries of the keys: compositions of the softmax engine on shorter sequences.
//!
//! ```text
//! O = softmax(s Q Kr^T) M Vr
//! ```
//!
//! | | `Kr [r, head_dim]` | `M` | `Vr [r, head_dim_v]` |
//! |---|---|---|---|
//! | [`Linformer`] | `E^T K` | - | `F^T V` |
//! | [`Nystrom`] | means of keys | `pinv(softmax(s Ql Kr^T))` | `softmax(s Ql K^T) V` |
//! | [`Agent`] | agent tokens | - | `softmax(s Kr K^T) V` |

pub mod agent;
mod attention;
pub mod linformer;
pub mod nystrom;
mod pseudo_inverse;
mod registry;
mod tensor;

pub use agent::{Agent, AgentGrads};
pub use attention::{Head64, LowRank, LowRankAttention};
pub use linformer::{Linformer, LinformerGrads, Projection};
pub use nystrom::{Nystrom, NystromGrads};
pub(crate) use registry::entries;
