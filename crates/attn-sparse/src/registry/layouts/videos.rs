//! Patterns of videos.

use super::super::at_least_1;
use super::grids::{GRID, grid};
use super::{build_parted, lengths};
use crate::{Pattern, Radial, SlidingTile, VideoHeads, VideoKinds};
use attn_core::registry::{Entry, OptionSpec, Options, run_qkv};
use attn_core::{AttnError, Family, Result};

const FIRST_FRAME: OptionSpec =
    OptionSpec { name: "first_frame", default: "true", help: "all see the first frame (true|false)" };

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: <Radial as Pattern>::NAME,
            family: Family::Sparse,
            summary: "Windows that halve whenever the distance of frames doubles (Li et al. 2025)",
            options: &[
                OptionSpec { name: "frame", default: "256", help: "tokens of a frame" },
                FIRST_FRAME,
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                let first_frame = options.get_or("first_frame", true)?;
                build_parted(options, Radial { frame: at_least_1(options, "frame", 256)?, first_frame })
            },
            runner: run_qkv,
        },
        Entry {
            name: <SlidingTile as Pattern>::NAME,
            family: Family::Sparse,
            summary: "A window of tiles of a video, the same for all queries of a tile (Zhang et al. 2025)",
            options: &[
                OptionSpec {
                    name: "tile",
                    default: "4,8,8",
                    help: "frames, rows and columns of a tile, by commas or one for all",
                },
                OptionSpec {
                    name: "window",
                    default: "3",
                    help: "tiles of the window along each axis, by commas or one for all",
                },
                GRID,
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                let tile = match options.get::<String>("tile")? {
                    Some(_) => lengths(options, "tile", 1)?,
                    None => [4, 8, 8],
                };
                let window = lengths(options, "window", 3)?;
                build_parted(options, SlidingTile { grid: grid(options)?, tile, window })
            },
            runner: run_qkv,
        },
        Entry {
            name: <VideoHeads as Pattern>::NAME,
            family: Family::Sparse,
            summary: "Heads that see near frames, heads that see one place of all frames (Sparse VideoGen, Xi et al. 2025)",
            options: &[
                OptionSpec { name: "frame", default: "128", help: "tokens of a frame" },
                OptionSpec {
                    name: "kinds",
                    default: "alternating",
                    help: "kinds of heads (spatial|temporal|alternating: even ones spatial)",
                },
                OptionSpec {
                    name: "frame_window",
                    default: "1",
                    help: "frames on each side that a spatial head sees",
                },
                OptionSpec {
                    name: "token_window",
                    default: "1",
                    help: "places on each side that a temporal head sees",
                },
                FIRST_FRAME,
                OptionSpec::SCALE,
            ],
            constructor: |options| build_parted(options, video_heads(options)?),
            runner: run_qkv,
        },
    ]
}

fn video_heads(options: &Options) -> Result<VideoHeads> {
    let kinds = match options.get::<String>("kinds")?.as_deref() {
        None | Some("alternating") => VideoKinds::Alternating,
        Some("spatial") => VideoKinds::Spatial,
        Some("temporal") => VideoKinds::Temporal,
        Some(other) => {
            return Err(AttnError::value("option `kinds`", other, "spatial, temporal or alternating"));
        }
    };
    Ok(VideoHeads {
        frame: at_least_1(options, "frame", 128)?,
        kinds,
        frame_window: options.get_or("frame_window", 1)?,
        token_window: options.get_or("token_window", 1)?,
        first_frame: options.get_or("first_frame", true)?,
    })
}
