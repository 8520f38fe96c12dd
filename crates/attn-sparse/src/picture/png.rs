//! Pictures of masks as PNG: a grey-blue palette, one square of pixels a cell, no axes.
//!
//! The file is written as its standard describes it: chunks `length, name, data, CRC-32`, the rows as a zlib stream of stored
//! (not compressed) blocks with their Adler-32. Half a byte a pixel.
//!
//! Source: PNG specification, W3C 2003; RFC 1950 (zlib), RFC 1951 (deflate).

use super::colour_of;

/// Colours of a palette: none, ten steps of some, all.
const STEPS: usize = 12;
/// Most bytes of a stored block.
const BLOCK: usize = 0xffff;

/// The palette's colour of a share of seen pairs.
pub(super) fn index_of(share: f64) -> u8 {
    match share {
        _ if share <= 0.0 => 0,
        _ if share >= 1.0 => STEPS as u8 - 1,
        _ => 1 + (share * 10.0) as u8,
    }
}

/// A picture of `rows` of palette colours, each `scale` pixels wide and high.
pub(super) fn encode(rows: &[Vec<u8>], scale: usize) -> Vec<u8> {
    let (width, height) = (rows.first().map_or(0, Vec::len) * scale, rows.len() * scale);
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let size = |x: usize| u32::try_from(x).unwrap_or(u32::MAX).to_be_bytes();
    // Four bits a pixel, with a palette.
    chunk(&mut png, b"IHDR", &[&size(width)[..], &size(height), &[4, 3, 0, 0, 0]].concat());
    let colour = |step: usize| {
        let share = step as f64 / (STEPS - 1) as f64;
        let [_, r, g, b] = colour_of(share).to_be_bytes();
        [r, g, b]
    };
    chunk(&mut png, b"PLTE", &(0..STEPS).flat_map(colour).collect::<Vec<u8>>());
    let mut lines = Vec::new();
    for row in rows {
        let pixels: Vec<u8> = row.iter().flat_map(|colour| std::iter::repeat_n(*colour, scale)).collect();
        let packed = pixels.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0));
        // Each line starts with its filter: none.
        let line: Vec<u8> = std::iter::once(0).chain(packed).collect();
        (0..scale).for_each(|_| lines.extend_from_slice(&line));
    }
    chunk(&mut png, b"IDAT", &zlib(&lines));
    chunk(&mut png, b"IEND", &[]);
    png
}

fn chunk(png: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
    png.extend((data.len() as u32).to_be_bytes());
    let checked = png.len();
    png.extend(name);
    png.extend(data);
    let sum = crc32(&png[checked..]);
    png.extend(sum.to_be_bytes());
}

/// CRC-32 of the polynomial `0xedb88320`, reflected.
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |sum: u32, _| if sum & 1 == 1 { 0xedb8_8320 ^ (sum >> 1) } else { sum >> 1 };
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), bit))
}

fn zlib(data: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let last = data.len().div_ceil(BLOCK).max(1) - 1;
    for at in 0..=last {
        let block = &data[at * BLOCK..data.len().min((at + 1) * BLOCK)];
        let len = block.len() as u16;
        stream.push(u8::from(at == last));
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
        stream.extend(block);
    }
    let (a, b) = data.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65_521;
        (a, (a + b) % 65_521)
    });
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standards() {
        // The check values of both.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(zlib(b"Wikipedia")[16..], 0x11e6_0398_u32.to_be_bytes());
        assert_eq!(crc32(b"IEND"), 0xae42_6082);
    }
}
