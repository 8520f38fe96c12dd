//! Real inputs: q, k and v of the shipped model's global layer, reading the first n bytes of a text.

use super::{Fnv, Source, SourceKind, named};
use crate::Result;
use crate::lm::{self, ByteLm, LmError, text};
use attn_core::AttnShape;
use attn_core::registry::NamedTensors;
use std::path::Path;

/// Bytes beyond the longest context that the quality gate would like to have, for stretches spread over the text.
const GATE_BYTES: usize = 256 << 10;

/// The shipped model and a text.
pub struct LmText {
    model: ByteLm,
    text: Vec<u8>,
    place: String,
    model_hash: Fnv,
}

impl LmText {
    /// Reads text for lengths up to `longest`: from `place`, or by default the sources of dependencies in the cargo
    /// registry.
    ///
    /// # Errors
    /// [`crate::LabError::Lm`] if the text is shorter than that or cannot be read.
    pub fn open(place: Option<&Path>, longest: usize) -> Result<Self> {
        let load = |n| match place {
            Some(place) => text::load(place, n),
            None => text::load_default(n),
        };
        let text = match load(longest + GATE_BYTES) {
            // Enough for the sweep, if not for all that the gate would like.
            Err(LmError::TextTooShort { found, .. }) if found >= longest => load(found),
            Err(LmError::TextTooShort { found, place, .. }) => {
                Err(LmError::TextTooShort { found, asked: longest, place })
            }
            other => other,
        };
        let place = place.map_or("sources in the cargo registry".into(), |p| p.display().to_string());
        let model = ByteLm::shipped()?;
        let model_hash = hash_weights(&model).map_err(LmError::from)?;
        Ok(Self { model, text: text?, place, model_hash })
    }

    /// The model.
    pub fn model(&self) -> &ByteLm {
        &self.model
    }

    /// Hash of the model and of all of the text.
    pub fn hash_all(&self) -> String {
        self.model_hash.with(&self.text).hex()
    }

    /// All of the text.
    pub fn text(&self) -> &[u8] {
        &self.text
    }
}

impl Source for LmText {
    fn kind(&self) -> SourceKind {
        SourceKind::Lm
    }

    fn describe(&self) -> String {
        format!("global layer of the shipped byte model reading {}", self.place)
    }

    fn shape(&self, n: usize) -> AttnShape {
        let config = self.model.config();
        AttnShape::square(config.n_heads, n, config.head_dim)
    }

    fn hash(&self, n: usize) -> Result<String> {
        Ok(self.model_hash.with(&self.text[..n.min(self.text.len())]).hex())
    }

    fn inputs(&self, n: usize) -> Result<NamedTensors> {
        if n > self.text.len() {
            let (found, place) = (self.text.len(), self.place.clone());
            return Err(LmError::TextTooShort { found, asked: n, place }.into());
        }
        let lm::Captured { q, k, v, .. } = self.model.capture(&self.text[..n])?;
        named(&self.shape(n), q, k, v)
    }
}

fn hash_weights(model: &ByteLm) -> candle_core::Result<Fnv> {
    model.weights().iter().try_fold(Fnv::new(), |hash, (name, tensor)| {
        let numbers = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(hash.with(name.as_bytes()).with(bytemuck::cast_slice(&numbers)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_text_changes_nothing_before() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("t.txt");
        std::fs::write(&place, "A text that is long enough for a test of forty-eight bytes. ".repeat(2))
            .unwrap();
        let text = LmText::open(Some(&place), 64).unwrap();
        assert_eq!(text.text().len(), 120, "all of it, for the gate");
        let (short, long) = (text.inputs(24).unwrap(), text.inputs(48).unwrap());
        let first = |t: &NamedTensors| t.f32("k").unwrap().unwrap().1[..24 * 64].to_vec();
        let difference =
            first(&short).iter().zip(first(&long)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "{difference}");
        assert_ne!(text.hash(24).unwrap(), text.hash(48).unwrap());
    }

    #[test]
    fn a_text_that_is_too_short_is_refused_with_both_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("t.txt");
        std::fs::write(&place, "short").unwrap();
        let line = LmText::open(Some(&place), 1024).err().unwrap().to_string();
        assert!(line.contains("5 bytes") && line.contains("1024") && line.contains("--text"), "{line}");
    }
}
