//! What users see of a mask: pictures, and how much of exact attention it keeps.

use attn_core::exact::RowId;
use attn_core::mask::{Align, And, Band, KeysBelow, Mask, Or, Predicate, SeeAll};
use attn_core::{AttnShape, Qkv, View};
use attn_sparse::{BlockSizes, Builder, Mass, Picture};

fn causal(n: usize) -> (AttnShape, Band) {
    let shape = AttnShape::square(1, n, 4);
    (shape, Band::causal(&shape, Align::BottomRight))
}

/// Rectangles of the grid as `[x, y, width, height]` in pairs, with their colours.
fn cells(svg: &str, pixels_a_pair: f64) -> Vec<([usize; 4], String)> {
    let grid = svg.split("crispEdges\">").nth(1).unwrap().split("</g>").next().unwrap();
    let number = |line: &str, name: &str| -> usize {
        let value = line.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap();
        (value.parse::<f64>().unwrap() / pixels_a_pair).round() as usize
    };
    let cell = |line: &str| {
        let colour = line.split("fill=\"").nth(1).unwrap().split('"').next().unwrap().to_string();
        (["x", "y", "width", "height"].map(|name| number(line, &format!(" {name}"))), colour)
    };
    grid.lines().filter(|line| line.starts_with("<rect")).map(cell).collect()
}

#[test]
fn small_masks_are_drawn_pair_by_pair() {
    let (shape, causal) = causal(16);
    let mask = And(causal, Or(KeysBelow(2), Band { left: Some(3), ..causal }));
    let svg = Picture::new("sinks <&> window").svg(&mask, &shape).unwrap();
    assert!(svg.contains("sinks &lt;&amp;&gt; window") && svg.contains("a cell is a pair"));
    let mut drawn = vec![false; 16 * 16];
    for ([x, y, width, height], colour) in cells(&svg, 512.0 / 16.0) {
        assert_eq!(colour, "#08306b", "a pair is seen or not");
        for (i, j) in (y..y + height).flat_map(|i| (x..x + width).map(move |j| (i, j))) {
            assert!(!std::mem::replace(&mut drawn[i * 16 + j], true), "{i}, {j} twice");
        }
    }
    let head = attn_core::mask::Head { batch: 0, head: 0 };
    let seen: Vec<bool> = (0..256).map(|x| mask.sees(head.pair(x / 16, x % 16))).collect();
    assert_eq!(drawn, seen);
}

#[test]
fn long_masks_are_drawn_in_at_most_so_many_cells() {
    let (shape, causal) = causal(1 << 20);
    let svg = Picture::new("causal").svg(&causal, &shape).unwrap();
    let cells = cells(&svg, 512.0 / 256.0);
    // Each row: what is seen completely, and the cell on the diagonal.
    assert_eq!(cells.len(), 2 * 256 - 1);
    let diagonal = cells.iter().filter(|(place, _)| place[0] == place[1]);
    assert!(diagonal.clone().count() >= 256 && diagonal.clone().all(|(place, _)| place[3] == 1));
    let partial = cells.iter().filter(|(_, colour)| colour != "#08306b").count();
    assert_eq!(partial, 256);
    // Every 7th key of each query: thinly seen everywhere, which no cell may hide.
    let dilated = Predicate(|p: attn_core::mask::Pair| p.i.abs_diff(p.j).is_multiple_of(7));
    let svg = Picture { max_cells: 32, ..Picture::new("dilated") }.svg(&dilated, &shape).unwrap();
    assert!(svg.matches("<rect").count() > 32, "something is drawn in every row");
}

#[test]
fn blocks_are_cells() {
    let (shape, causal) = causal(40);
    let builder = Builder::new(&shape, BlockSizes::square(10)).inside(std::sync::Arc::new(causal));
    let mask = builder.from_inside().unwrap();
    let svg = Picture::new("blocks").svg_of_blocks(&mask).unwrap();
    assert!(svg.contains("a cell is 10 x 10 pairs"));
    let cells = cells(&svg, 512.0 / 40.0);
    assert_eq!(cells.iter().filter(|(_, colour)| colour != "#08306b").count(), 4, "the diagonal is partial");
    assert_eq!(cells.len(), 4 + 3);
}

/// Colours of a PNG's pixels as numbers of its palette, `[height][width]`; its data are stored, not compressed.
fn pixels(png: &[u8]) -> Vec<Vec<u8>> {
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    let (width, height) = (number(16), number(20));
    let (mut at, mut stream) = (8, Vec::new());
    while at < png.len() {
        if &png[at + 4..at + 8] == b"IDAT" {
            stream.extend_from_slice(&png[at + 8..at + 8 + number(at)]);
        }
        at += 12 + number(at);
    }
    let (mut at, mut lines) = (2, Vec::new());
    loop {
        let len = usize::from(u16::from_le_bytes([stream[at + 1], stream[at + 2]]));
        lines.extend_from_slice(&stream[at + 5..at + 5 + len]);
        if stream[at] == 1 {
            break;
        }
        at += 5 + len;
    }
    let line = 1 + width.div_ceil(2);
    assert_eq!(lines.len(), line * height);
    let row = |line: &[u8]| line[1..].iter().flat_map(|pair| [pair >> 4, pair & 15]).take(width).collect();
    lines.chunks_exact(line).map(row).collect()
}

#[test]
fn the_same_cells_are_drawn_as_pixels() {
    let (shape, causal) = causal(40);
    let pixels_of = |max_cells: usize| {
        pixels(&Picture { max_cells, ..Picture::new("") }.png(&causal as &dyn Mask, &shape).unwrap())
    };
    let pixels = pixels_of(256);
    // Twelve pixels a pair.
    assert_eq!((pixels.len(), pixels[0].len()), (480, 480));
    for (y, row) in pixels.iter().enumerate() {
        for (x, colour) in row.iter().enumerate() {
            assert_eq!(*colour, if x / 12 <= y / 12 { 11 } else { 0 }, "{x}, {y}");
        }
    }
    let pixels = pixels_of(4);
    assert_eq!((pixels[0][0], pixels[0][511], pixels[511][0]), (6, 0, 11), "half of a cell on the diagonal");
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let (shape, causal) = causal(8);
    let none = Picture { max_cells: 0, ..Picture::new("") }.svg(&causal, &shape).unwrap_err();
    assert!(none.to_string().contains("max_cells"), "{none}");
    let head = attn_core::mask::Head { batch: 0, head: 3 };
    let no_head = Picture { head, ..Picture::new("") }.svg(&causal, &shape).unwrap_err();
    assert!(no_head.to_string().contains("head"), "{no_head}");
    let nothing = AttnShape { n_q: 0, ..shape };
    assert!(Picture::new("").svg(&SeeAll, &nothing).unwrap().ends_with("</svg>\n"));
    assert!(Picture::new("").png(&SeeAll, &nothing).unwrap_err().to_string().contains("0 queries"));
}

/// Scores of the only query: `ln` of the given weights.
fn weighted(weights: &[f32]) -> (Vec<f32>, Vec<f32>) {
    (vec![1.0], weights.iter().map(|weight| weight.ln()).collect())
}

fn measure(
    q: &[f32],
    k: &[f32],
    all: &dyn Mask,
    chosen: &dyn Mask,
    top_k: Option<usize>,
) -> attn_sparse::RowMass {
    let v = vec![0.0; k.len()];
    let view = |name, data| View::contiguous(name, data, [1, 1, k.len(), 1]).unwrap();
    let x = Qkv::new(View::contiguous("q", q, [1, 1, 1, 1]).unwrap(), view("k", k), view("v", &v)).unwrap();
    let mass = Mass { softmax_scale: Some(1.0), all, chosen, top_k };
    mass.rows(&x, &[RowId { batch: 0, head: 0, i: 0 }]).unwrap()[0]
}

#[test]
fn mass_and_recall_are_those_of_the_definition() {
    let (q, k) = weighted(&[1.0, 4.0, 2.0, 2.0, 1.0]);
    let evens = Predicate(|p: attn_core::mask::Pair| p.j.is_multiple_of(2));
    let found = measure(&q, &k, &SeeAll, &evens, None);
    assert!((found.kept - 0.4).abs() < 1e-6, "{found:?}");
    // The top three are keys 1, 2 and 3; of these, key 2 was chosen.
    assert_eq!((found.n_all, found.n_chosen, found.recall), (5, 3, 1.0 / 3.0));
    // Keys 2 and 3 are equal: the lower one is the second best.
    assert_eq!(measure(&q, &k, &SeeAll, &evens, Some(2)).recall, 0.5);
    assert_eq!(measure(&q, &k, &SeeAll, &evens, Some(100)).recall, 0.6);
    // What exact attention does not see does not count.
    let found = measure(&q, &k, &KeysBelow(3), &evens, None);
    assert!((found.kept - 3.0 / 7.0).abs() < 1e-6 && found.n_chosen == 2, "{found:?}");
    let nothing = measure(&q, &k, &KeysBelow(0), &evens, None);
    assert_eq!((nothing.kept, nothing.recall, nothing.n_all), (1.0, 1.0, 0));
    let nobody = measure(&q, &k, &SeeAll, &KeysBelow(0), Some(2));
    assert_eq!((nobody.kept, nobody.recall), (0.0, 0.0));
}

#[test]
fn rows_outside_are_refused() {
    let data = [0.0; 4];
    let view = |name| View::contiguous(name, &data, [1, 1, 4, 1]).unwrap();
    let x = Qkv::new(view("q"), view("k"), view("v")).unwrap();
    let mass = Mass { softmax_scale: None, all: &SeeAll, chosen: &SeeAll, top_k: None };
    let error = mass.rows(&x, &[RowId { batch: 0, head: 0, i: 4 }]).unwrap_err();
    assert!(error.to_string().contains("row"), "{error}");
    let error = Mass { softmax_scale: Some(f32::NAN), ..mass }.rows(&x, &[]).unwrap_err();
    assert!(error.to_string().contains("softmax_scale"), "{error}");
}
