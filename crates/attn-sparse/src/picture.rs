//! Masks as pictures: SVG or PNG, queries downwards, keys to the right.
//!
//! A cell is a tile of pairs: white where none is seen, dark where all are, and between these by the share that is seen.
//! Long sequences are drawn with cells of many pairs; where a mask does not know how much of a cell it sees, some pairs of it
//! are asked.

mod png;

use crate::block_mask::BlockMask;
use attn_core::mask::{Cover, Head, Mask};
use attn_core::{AttnError, AttnShape, Result};
use std::fmt::Write;
use std::ops::Range;

/// Pixels of the longer side of the grid.
const SIDE: f64 = 512.0;
/// Pairs a side of a cell that are asked one by one; of larger cells, so many rows and keys are asked, evenly spread.
const ASKED: usize = 16;

/// How a mask is drawn.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::{Align, Band};
/// use attn_sparse::Picture;
///
/// let shape = AttnShape::square(1, 16, 8);
/// let svg = Picture::new("causal").svg(&Band::causal(&shape, Align::BottomRight), &shape)?;
/// assert!(svg.starts_with("<svg") && svg.contains("causal"));
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// Stands above the grid.
    pub title: &'a str,
    /// Whose pairs are drawn.
    pub head: Head,
    /// Most cells along each axis.
    pub max_cells: usize,
}

impl<'a> Picture<'a> {
    /// The first head, at most 256 cells along each axis.
    pub fn new(title: &'a str) -> Self {
        Self { title, head: Head { batch: 0, head: 0 }, max_cells: 256 }
    }

    /// Draws any mask; a cell is one pair while there is room for all of them.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a head outside the problem or no cells; those of [`Mask::check`].
    pub fn svg(&self, mask: &dyn Mask, shape: &AttnShape) -> Result<String> {
        self.draw(mask, shape, [1, 1])
    }

    /// Draws a block mask; a cell is one block, or several.
    ///
    /// # Errors
    /// As [`Picture::svg`].
    pub fn svg_of_blocks(&self, mask: &BlockMask) -> Result<String> {
        self.draw(mask, mask.shape(), [mask.sizes().q, mask.sizes().kv])
    }

    /// The grid alone as a PNG file, cells as in [`Picture::svg`]: no title, no axes.
    ///
    /// # Errors
    /// As [`Picture::svg`]; [`AttnError::Value`] for a problem without queries or keys, of which there is no such file.
    pub fn png(&self, mask: &dyn Mask, shape: &AttnShape) -> Result<Vec<u8>> {
        let [rows, keys] = self.cells(mask, shape, [1, 1])?;
        if shape.n_q == 0 || shape.n_kv == 0 {
            let found = format!("{} queries and {} keys", shape.n_q, shape.n_kv);
            return Err(AttnError::value("a picture", found, "at least one of both"));
        }
        let row = |first: usize| -> Vec<u8> {
            let of_queries = first..(first + rows).min(shape.n_q);
            let cell =
                |first: usize| share(mask, self.head, &of_queries, &(first..(first + keys).min(shape.n_kv)));
            (0..shape.n_kv).step_by(keys).map(|first| png::index_of(cell(first))).collect()
        };
        let grid: Vec<Vec<u8>> = (0..shape.n_q).step_by(rows).map(row).collect();
        let longer = grid.len().max(grid[0].len());
        Ok(png::encode(&grid, (SIDE as usize / longer).max(1)))
    }

    /// Rows and keys of a cell.
    fn cells(&self, mask: &dyn Mask, shape: &AttnShape, least: [usize; 2]) -> Result<[usize; 2]> {
        let head = self.head;
        if head.batch >= shape.batch || head.head >= shape.n_heads_q {
            let expected = format!("below batch {} and head {}", shape.batch, shape.n_heads_q);
            return Err(AttnError::value("head", format!("{head:?}"), expected));
        }
        if self.max_cells == 0 {
            return Err(AttnError::value("max_cells", 0, "at least 1"));
        }
        mask.check(shape)?;
        let size = |n: usize, least: usize| n.div_ceil(self.max_cells).max(1).next_multiple_of(least.max(1));
        Ok([size(shape.n_q, least[0]), size(shape.n_kv, least[1])])
    }

    fn draw(&self, mask: &dyn Mask, shape: &AttnShape, least: [usize; 2]) -> Result<String> {
        let (head, [rows, keys]) = (self.head, self.cells(mask, shape, least)?);
        let (n_q, n_kv) = (shape.n_q, shape.n_kv);
        let pixel = SIDE / n_q.max(n_kv).max(1) as f64;
        let (width, height) = ((n_kv as f64 * pixel).max(8.0), (n_q as f64 * pixel).max(8.0));

        let mut svg = String::new();
        let (left, top) = (64.0, 72.0);
        let (full_width, full_height) = ((left + width + 24.0).max(360.0), top + height + 56.0);
        // Writing to a string does not fail.
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {full_width:.0} {full_height:.0}\" \
             width=\"{full_width:.0}\" height=\"{full_height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <text x=\"{left}\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
            escaped(self.title)
        );
        let _ = writeln!(svg, "<g transform=\"translate({left} {top})\">");
        let _ = writeln!(svg, "<g shape-rendering=\"crispEdges\">");
        for first in (0..n_q).step_by(rows) {
            let of_queries = first..(first + rows).min(n_q);
            let shares = (0..n_kv).step_by(keys).map(|first| {
                let keys = first..(first + keys).min(n_kv);
                (share(mask, head, &of_queries, &keys), keys)
            });
            let mut run: Option<(u32, Range<usize>)> = None;
            let mut put = |run: Option<(u32, Range<usize>)>| {
                if let Some((colour, keys)) = run.filter(|(colour, _)| *colour != colour_of(0.0)) {
                    let _ = writeln!(
                        svg,
                        "<rect x=\"{:.3}\" y=\"{:.3}\" width=\"{:.3}\" height=\"{:.3}\" fill=\"#{colour:06x}\"/>",
                        keys.start as f64 * pixel,
                        of_queries.start as f64 * pixel,
                        keys.len() as f64 * pixel,
                        of_queries.len() as f64 * pixel
                    );
                }
            };
            // Neighbours of one colour are one rectangle.
            for (share, keys) in shares {
                let colour = colour_of(share);
                run = match run {
                    Some((same, before)) if same == colour => Some((colour, before.start..keys.end)),
                    other => {
                        put(other);
                        Some((colour, keys))
                    }
                };
            }
            put(run);
        }
        svg.push_str("</g>\n");
        let _ = writeln!(
            svg,
            "<rect width=\"{width:.2}\" height=\"{height:.2}\" fill=\"none\" stroke=\"#444444\"/>"
        );
        axes(&mut svg, [n_q, n_kv], pixel, [width, height]);
        legend(&mut svg, height + 26.0, [rows, keys]);
        svg.push_str("</g>\n</svg>\n");
        Ok(svg)
    }
}

/// The share of a cell's pairs that is seen, by all of them or by some.
fn share(mask: &dyn Mask, head: Head, rows: &Range<usize>, keys: &Range<usize>) -> f64 {
    match mask.cover(head, rows.clone(), keys.clone()) {
        Cover::Empty => return 0.0,
        Cover::Full => return 1.0,
        Cover::Partial => {}
    }
    let seen = |i: usize, j: usize| mask.sees(head.pair(i, j));
    let some_rows: Vec<usize> = spread(rows).collect();
    let some_keys: Vec<usize> = spread(keys).collect();
    let count = some_rows.iter().map(|i| some_keys.iter().filter(|j| seen(*i, **j)).count()).sum::<usize>();
    count as f64 / (some_rows.len() * some_keys.len()) as f64
}

/// At most [`ASKED`] numbers of a range; where they are not all, from ever other places of equal steps, so that regular
/// patterns do not hide between them.
fn spread(range: &Range<usize>) -> impl Iterator<Item = usize> {
    let (start, len, n) = (range.start, range.len(), range.len().min(ASKED));
    (0..n).map(move |x| {
        let (first, end) = (x * len / n, (x + 1) * len / n);
        start + first + (x * 7 + start / len.max(1) * 3) % (end - first).max(1)
    })
}

/// White, or from pale to dark blue.
fn colour_of(share: f64) -> u32 {
    if share <= 0.0 {
        return 0x00ff_ffff;
    }
    let (pale, dark) = ([0xc6, 0xdb, 0xef], [0x08, 0x30, 0x6b]);
    // Steps that the eye can tell apart; full cells alone have the last one.
    let step = if share >= 1.0 { 1.0 } else { (share * 8.0).floor() / 10.0 };
    let mix =
        |c: usize| (f64::from(pale[c]) + step * (f64::from(dark[c]) - f64::from(pale[c]))).round() as u32;
    mix(0) << 16 | mix(1) << 8 | mix(2)
}

/// Ticks at round numbers along both axes, and what the axes are.
fn axes(svg: &mut String, [n_q, n_kv]: [usize; 2], pixel: f64, [width, height]: [f64; 2]) {
    for at in ticks(n_kv, width) {
        let x = at as f64 * pixel;
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.2} 0v-5\" stroke=\"#444444\"/><text x=\"{x:.2}\" y=\"-9\" text-anchor=\"middle\">{at}</text>"
        );
    }
    for at in ticks(n_q, height) {
        let y = at as f64 * pixel;
        let _ = writeln!(
            svg,
            "<path d=\"M0 {y:.2}h-5\" stroke=\"#444444\"/><text x=\"-8\" y=\"{:.2}\" text-anchor=\"end\">{at}</text>",
            y + 4.0
        );
    }
    let _ = writeln!(svg, "<text x=\"{:.2}\" y=\"-28\" text-anchor=\"middle\">keys</text>", width / 2.0);
    let y = height / 2.0;
    let _ = writeln!(
        svg,
        "<text x=\"-52\" y=\"{y:.2}\" text-anchor=\"middle\" transform=\"rotate(-90 -52 {y:.2})\">queries</text>"
    );
}

/// Multiples of a round step, at most about one every 64 pixels, and the end.
fn ticks(n: usize, pixels: f64) -> Vec<usize> {
    let most = (pixels / 64.0).max(1.0);
    let powers = (0..usize::BITS).map(|power| 1usize << power);
    let step = powers.into_iter().find(|step| n as f64 / *step as f64 <= most).unwrap_or(n.max(1));
    let mut ticks: Vec<usize> = (0..n).step_by(step).collect();
    // The end has its number; the one before it only if there is room for both.
    if ticks.last().is_some_and(|last| *last > 0 && (n - last) * 2 < step) {
        ticks.pop();
    }
    ticks.push(n);
    ticks
}

fn legend(svg: &mut String, y: f64, [rows, keys]: [usize; 2]) {
    let entries = [("no pair", 0.0), ("some", 0.5), ("all", 1.0)];
    let mut x = 0.0;
    for (words, share) in entries {
        let colour = colour_of(share);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{:.2}\" width=\"12\" height=\"12\" fill=\"#{colour:06x}\" stroke=\"#444444\"/>\
             <text x=\"{}\" y=\"{y:.2}\">{words}</text>",
            y - 10.0,
            x + 17.0
        );
        x += 36.0 + 7.0 * words.len() as f64;
    }
    let cell = match [rows, keys] {
        [1, 1] => "a cell is a pair".to_string(),
        _ => format!("a cell is {rows} x {keys} pairs"),
    };
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y:.2}\" fill=\"#444444\">{cell}</text>");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
