//! Sliding tile attention: a video is cut into tiles of frames, rows and columns, and all queries of a tile see the same window
//! of tiles, centred on their own and moved inwards at the borders.
//!
//! Positions are sorted tile by tile, so that a query tile sees whole runs of keys and no tile is partial ([`Parted`]).
//!
//! Source: Zhang et al., "Fast Video Generation with Sliding Tile Attention", 2025. There tiles divide the video; here the last
//! tile of an axis may be shorter.

use crate::parts::{Order, Part, Parted};
use crate::patterns::grid::{Grid, joined, same_lengths};
use crate::patterns::neighborhood::AxisWindow;
use crate::{Pattern, heads};
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use std::ops::Range;
use std::sync::Arc;

/// Windows of tiles. Time `O(n * window * tile)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingTile {
    /// Frames, rows and columns; `None` is the grid of `n_kv` positions that is closest to a cube.
    pub grid: Option<[usize; 3]>,
    /// Positions of a tile along each axis; at least 1.
    pub tile: [usize; 3],
    /// Tiles of a window along each axis; at least 1.
    pub window: [usize; 3],
}

/// The pairs in the order of the sequence.
#[derive(Debug, Clone, Copy)]
pub struct TileMask {
    grid: Grid<3>,
    tile: [usize; 3],
    windows: [AxisWindow; 3],
}

impl TileMask {
    /// Tiles of each axis.
    fn tiles(&self) -> Grid<3> {
        Grid(std::array::from_fn(|a| self.grid.0[a].div_ceil(self.tile[a])))
    }

    /// The window of tiles of a tile.
    fn window(&self, tile: [usize; 3]) -> [Range<usize>; 3] {
        let tiles = self.tiles();
        std::array::from_fn(|a| self.windows[a].window(tiles.0[a], tile[a]))
    }

    fn tile_of(&self, position: usize) -> [usize; 3] {
        let at = self.grid.coordinates(position);
        std::array::from_fn(|a| at[a] / self.tile[a])
    }

    /// Positions of a tile along an axis.
    fn positions(&self, axis: usize, tile: usize) -> Range<usize> {
        let start = tile * self.tile[axis];
        start..(start + self.tile[axis]).min(self.grid.0[axis])
    }

    /// The positions tile by tile, and where each tile starts among them.
    fn sorted(&self) -> (Vec<u32>, Vec<usize>) {
        let (mut order, mut starts) = (Vec::new(), vec![0]);
        for tile in self.tiles().all() {
            let [frames, rows, columns] = std::array::from_fn(|a| self.positions(a, tile[a]));
            for (f, r) in frames.flat_map(|f| rows.clone().map(move |r| (f, r))) {
                order.extend(columns.clone().map(|c| self.grid.position([f, r, c]) as u32));
            }
            starts.push(order.len());
        }
        (order, starts)
    }
}

impl Mask for TileMask {
    fn sees(&self, pair: Pair) -> bool {
        let window = self.window(self.tile_of(pair.i));
        window.iter().zip(self.tile_of(pair.j)).all(|(window, tile)| window.contains(&tile))
    }
}

/// The pairs of sorted positions.
#[derive(Debug, Clone)]
struct SortedTiles {
    mask: TileMask,
    starts: Vec<usize>,
}

impl SortedTiles {
    /// The tile of a sorted position, by number.
    fn tile(&self, x: usize) -> usize {
        self.starts.partition_point(|start| *start <= x) - 1
    }
}

impl Mask for SortedTiles {
    fn sees(&self, pair: Pair) -> bool {
        let tiles = self.mask.tiles();
        let window = self.mask.window(tiles.coordinates(self.tile(pair.i)));
        let key = tiles.coordinates(self.tile(pair.j));
        (0..3).all(|a| window[a].contains(&key[a]))
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() || n_kv == 0 {
            return Vec::new();
        }
        let (tiles, mut spans) = (self.mask.tiles(), Vec::new());
        for tile in self.tile(rows.start)..=self.tile(rows.end - 1) {
            let [a, b, c] = self.mask.window(tiles.coordinates(tile));
            for (a, b) in a.flat_map(|a| b.clone().map(move |b| (a, b))) {
                let first = tiles.position([a, b, c.start]);
                spans.push(self.starts[first]..self.starts[first + c.len()]);
            }
        }
        joined(spans)
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let tiles = self.mask.tiles();
        let (first, last) = (self.tile(rows.start), self.tile(rows.end - 1));
        let (k0, k1) = (self.tile(keys.start), self.tile(keys.end - 1));
        // Windows of one row of tiles against one run of tiles; longer ones are asked tile by tile.
        if first != last || k1 - k0 > 64 {
            return Cover::Partial;
        }
        let window = self.mask.window(tiles.coordinates(first));
        let seen = |tile: usize| {
            let at = tiles.coordinates(tile);
            (0..3).all(|a| window[a].contains(&at[a]))
        };
        match (k0..=k1).filter(|tile| seen(*tile)).count() {
            0 => Cover::Empty,
            all if all == k1 - k0 + 1 => Cover::Full,
            _ => Cover::Partial,
        }
    }
}

impl Pattern for SlidingTile {
    type Mask = TileMask;

    const NAME: &'static str = "sliding-tile";

    fn mask(&self, shape: &AttnShape) -> Result<TileMask> {
        same_lengths(shape)?;
        for (name, sizes) in [("tile", self.tile), ("window", self.window)] {
            if sizes.contains(&0) {
                return Err(AttnError::value(name, format!("{sizes:?}"), "at least 1 along each axis"));
            }
        }
        let grid = Grid::of(self.grid, shape.n_kv)?;
        Ok(TileMask { grid, tile: self.tile, windows: self.window.map(AxisWindow::of) })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let Ok(mask) = self.mask(shape) else { return 0 };
        let tiles = mask.tiles();
        // Axes are independent: pairs of coordinates along each, multiplied.
        let along = |axis: usize| -> u64 {
            let of_tile = |tile: usize| {
                let keys = mask.windows[axis].window(tiles.0[axis], tile);
                let keys: usize = keys.map(|key| mask.positions(axis, key).len()).sum();
                (mask.positions(axis, tile).len() * keys) as u64
            };
            (0..tiles.0[axis]).map(of_tile).sum()
        };
        heads(shape) * (0..3).map(along).product::<u64>()
    }

    fn is_causal(&self) -> bool {
        false
    }

    fn cross_lengths(&self) -> bool {
        false
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl Parted for SlidingTile {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let mask = self.mask(shape)?;
        let (order, starts) = mask.sorted();
        let order = Order::of(order);
        let mask = Arc::new(SortedTiles { mask, starts });
        Ok(vec![Part { queries: order.clone(), keys: order, mask, source: 0 }])
    }
}
