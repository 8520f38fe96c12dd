//! Draws the mask of every registered static pattern into a folder, one SVG each:
//! `cargo run --example mask_pictures -- FOLDER [LENGTH]`.
#![allow(clippy::print_stdout)] // what it is for

use attn_core::AttnShape;
use attn_core::mask::Mask;
use attn_sparse::{
    ChunkedCausal, DilatedWindow, Intersection, LocalBuckets, Padded, Pattern, Picture, PrefixLm, SinkWindow,
    SlidingWindow, Union,
};
use std::error::Error;
use std::path::Path;

fn draw<P: Pattern>(folder: &Path, shape: &AttnShape, pattern: P) -> Result<(), Box<dyn Error>> {
    let mask = pattern.mask(shape)?;
    let svg = Picture::new(&format!("{}, {} tokens", P::NAME, shape.n_q)).svg(&mask as &dyn Mask, shape)?;
    let path = folder.join(format!("{}.svg", P::NAME));
    std::fs::write(&path, svg)?;
    println!("{}: {} pairs", path.display(), pattern.pairs(shape));
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| "masks".into());
    let n: usize = arguments.next().map_or(Ok(64), |n| n.parse())?;
    let (folder, shape) = (Path::new(&folder), AttnShape::square(1, n, 64));
    std::fs::create_dir_all(folder)?;
    let part = |share: usize| (n / share).max(1);
    draw(folder, &shape, SlidingWindow::causal(part(4)))?;
    draw(folder, &shape, SinkWindow { n_sinks: part(16), window: part(8) })?;
    draw(folder, &shape, ChunkedCausal { chunk_len: part(4) })?;
    draw(folder, &shape, DilatedWindow::new(part(8), 3, true))?;
    draw(folder, &shape, LocalBuckets { bucket: part(8), back: 1, forward: 0, causal: true })?;
    draw(folder, &shape, PrefixLm { prefix: vec![part(4)] })?;
    draw(folder, &shape, Padded { lengths: vec![n - n / 4], causal: true })?;
    let wide = SlidingWindow::causal(part(2));
    draw(folder, &shape, Union(DilatedWindow::new(part(4), 4, true), SlidingWindow::causal(part(16))))?;
    draw(
        folder,
        &shape,
        Intersection(LocalBuckets { bucket: part(4), back: 1, forward: 0, causal: true }, wide),
    )?;
    Ok(())
}
