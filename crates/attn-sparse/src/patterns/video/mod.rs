//! Patterns of videos: positions are tokens of frames, one frame after the other.

mod columns;
mod heads;
mod radial;
mod tiles;

pub use heads::{VideoHeads, VideoKinds};
pub use radial::Radial;
pub use tiles::SlidingTile;
