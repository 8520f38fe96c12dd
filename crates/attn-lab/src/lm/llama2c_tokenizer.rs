//! The tokenizer file that comes with a llama2.c checkpoint: byte pair merges by score.
//!
//! Encoding starts from one id per character (one per byte where a character has no piece) and joins the adjacent pair
//! whose joined piece has the highest score, the first such pair on ties, until none is left. A space goes in front.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

use super::error::{LmError, Result};

/// The id that begins a text.
pub const BOS: u32 = 1;
/// The id of byte 0; the other bytes follow.
const BYTE_0: u32 = 3;

/// Pieces with their scores; the index is the id.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Vec<(Vec<u8>, f32)>,
    ids: HashMap<Vec<u8>, u32>,
}

impl Tokenizer {
    /// Reads a tokenizer file.
    ///
    /// # Errors
    /// [`LmError::Io`] and [`LmError::Format`], naming the file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
        Self::parse(&bytes, &path.display().to_string())
    }

    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<Self> {
        let cut_off = || LmError::format(what, "not a llama2.c tokenizer, or cut off");
        let (_max_len, mut rest) = bytes.split_first_chunk::<4>().ok_or_else(cut_off)?;
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (score, after) = rest.split_first_chunk::<4>().ok_or_else(cut_off)?;
            let (len, after) = after.split_first_chunk::<4>().ok_or_else(cut_off)?;
            let len = usize::try_from(i32::from_le_bytes(*len)).map_err(|_| cut_off())?;
            let (piece, after) = after.split_at_checked(len).ok_or_else(cut_off)?;
            pieces.push((piece.to_vec(), f32::from_le_bytes(*score)));
            rest = after;
        }
        if pieces.len() < BYTE_0 as usize + 256 {
            return Err(LmError::format(what, format!("{} pieces, expected at least 259", pieces.len())));
        }
        let mut ids = HashMap::new();
        for (id, (piece, _)) in (0..).zip(&pieces) {
            ids.entry(piece.clone()).or_insert(id);
        }
        Ok(Self { pieces, ids })
    }

    /// The ids of `text`, [`BOS`] first. `O(n log n)`.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        let mut merges = Merges::new(self, self.characters(text));
        merges.run();
        std::iter::once(BOS).chain(merges.remaining()).collect()
    }

    /// The bytes that the ids stand for; ids that stand for no text are left out.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut text = Vec::new();
        for &id in ids {
            match id.checked_sub(BYTE_0) {
                Some(byte @ 0..256) => text.push(byte as u8),
                Some(_) => text.extend(self.pieces.get(id as usize).into_iter().flat_map(|(piece, _)| piece)),
                None => {}
            }
        }
        // The space that encoding put in front.
        if text.first() == Some(&b' ') && ids.first() == Some(&BOS) {
            text.remove(0);
        }
        text
    }

    pub(crate) fn characters(&self, text: &[u8]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() + 1);
        let bytes =
            |bytes: &[u8], ids: &mut Vec<u32>| ids.extend(bytes.iter().map(|&b| BYTE_0 + u32::from(b)));
        let mut character = |piece: &[u8]| match self.ids.get(piece) {
            Some(&id) => ids.push(id),
            None => bytes(piece, &mut ids),
        };
        if !text.is_empty() {
            character(b" ");
        }
        for chunk in text.utf8_chunks() {
            chunk.valid().chars().for_each(|c| character(c.encode_utf8(&mut [0; 4]).as_bytes()));
            chunk.invalid().iter().for_each(|&b| character(&[b]));
        }
        ids
    }

    pub(crate) fn joined(&self, left: u32, right: u32) -> Option<(u32, f32)> {
        let piece = [self.pieces[left as usize].0.as_slice(), &self.pieces[right as usize].0].concat();
        self.ids.get(&piece).map(|&id| (id, self.pieces[id as usize].1))
    }
}

/// A pair that could be joined; the greatest is joined first.
struct Pair {
    score: f32,
    at: Reverse<usize>,
    // ids when the pair was found: if they have changed since, it no longer exists
    ids: (u32, u32),
    joined: u32,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.at.cmp(&other.at))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

/// The text while its pairs are joined: a linked list over the places of its characters.
struct Merges<'a> {
    tokenizer: &'a Tokenizer,
    // `None` once joined to the left
    ids: Vec<Option<u32>>,
    previous: Vec<usize>,
    next: Vec<usize>,
    pairs: BinaryHeap<Pair>,
}

impl<'a> Merges<'a> {
    fn new(tokenizer: &'a Tokenizer, ids: Vec<u32>) -> Self {
        let n = ids.len();
        let mut merges = Self {
            tokenizer,
            ids: ids.into_iter().map(Some).collect(),
            previous: (0..n).map(|i| i.wrapping_sub(1)).collect(),
            next: (1..=n).collect(),
            pairs: BinaryHeap::new(),
        };
        (0..n).for_each(|at| merges.offer(at));
        merges
    }

    fn id(&self, at: usize) -> Option<u32> {
        self.ids.get(at).copied().flatten()
    }

    /// Notes the pair that begins at `at`, if there is one.
    fn offer(&mut self, at: usize) {
        let Some(left) = self.id(at) else { return };
        let Some(right) = self.id(self.next[at]) else { return };
        if let Some((joined, score)) = self.tokenizer.joined(left, right) {
            self.pairs.push(Pair { score, at: Reverse(at), ids: (left, right), joined });
        }
    }

    fn run(&mut self) {
        while let Some(Pair { at: Reverse(at), ids: (left, right), joined, .. }) = self.pairs.pop() {
            if self.id(at) != Some(left) || self.id(self.next[at]) != Some(right) {
                continue;
            }
            let gone = self.next[at];
            self.ids[at] = Some(joined);
            self.ids[gone] = None;
            self.next[at] = self.next[gone];
            if let Some(previous) = self.previous.get_mut(self.next[at]) {
                *previous = at;
            }
            self.offer(at);
            if self.previous[at] < self.ids.len() {
                self.offer(self.previous[at]);
            }
        }
    }

    fn remaining(&self) -> impl Iterator<Item = u32> {
        self.ids.iter().copied().flatten()
    }
}
