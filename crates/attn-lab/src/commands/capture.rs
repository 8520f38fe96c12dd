//! `attn capture`: q, k and v of one layer of a language model that reads a text.

use crate::lm::{ByteLm, Captured, LlamaLike, LmError, Tokenizer, llama_safetensors, llama2c, text};
use crate::{LabError, Result, output, tensors};
use attn_core::registry::{NamedTensor, NamedTensors};
use clap::Args;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Bytes of text for each token asked for, for models with a tokenizer: few pieces are longer.
const BYTES_A_TOKEN: usize = 16;

/// Writes q, k and v of one layer of a language model.
#[derive(Debug, Args)]
pub struct Capture {
    /// A text or a folder of texts; default: the Rust sources in cargo's registry
    #[arg(long, value_name = "FILE|DIR")]
    pub text: Option<PathBuf>,
    /// Layer, counted from 0; default: the global layer of the shipped model, else 0
    #[arg(long)]
    pub layer: Option<usize>,
    /// Positions
    #[arg(long)]
    pub n: usize,
    /// Where q, k and v go, as .safetensors, each (1, heads, n, head_dim)
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// A llama2.c .bin, a folder with config.json and safetensors, or a byte model of this program; default: the
    /// shipped byte model
    #[arg(long, value_name = "FILE|DIR")]
    pub model: Option<PathBuf>,
    /// The model's tokenizer in the format of llama2.c; needed by all but byte models
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

impl Capture {
    /// Runs the model over the text and writes the tensors.
    ///
    /// # Errors
    /// Too little text, a layer that does not exist, a model or tokenizer that cannot be read, an output that cannot be
    /// written.
    pub fn run(&self) -> Result<ExitCode> {
        if self.n == 0 {
            return Err(LabError::Argument("--n is 0, expected at least 1".into()));
        }
        let (captured, layer) = match &self.model {
            None => self.run_on_bytes(&ByteLm::shipped()?)?,
            Some(path) if path.extension().is_some_and(|e| e == "bin") => {
                self.run_on_tokens(&llama2c::load(path)?)?
            }
            Some(path) if path.is_dir() || has_config(path) => {
                self.run_on_tokens(&llama_safetensors::load(path)?)?
            }
            Some(path) => self.run_on_bytes(&ByteLm::load(path)?)?,
        };
        let model =
            self.model.as_ref().map_or("the shipped byte model".into(), |path| path.display().to_string());
        let text = self.text.as_ref().map_or("cargo's registry".into(), |path| path.display().to_string());
        let origin = [("model", model), ("layer", layer.to_string()), ("text", text)];
        let origin: BTreeMap<String, String> = origin.map(|(key, value)| (key.to_string(), value)).into();
        let sizes = format!(
            "{} query heads, {} key/value heads, {} positions, head_dim {}",
            captured.n_heads_q, captured.n_heads_kv, captured.n, captured.head_dim
        );
        tensors::save_with_metadata(&self.output, &named(captured)?, &origin)?;
        output::print(&format!("{}: layer {layer}, {sizes}", self.output.display()))?;
        Ok(ExitCode::SUCCESS)
    }

    fn text(&self, n_bytes: usize) -> Result<Vec<u8>> {
        Ok(match &self.text {
            Some(place) => text::load(place, n_bytes)?,
            None => text::load_default(n_bytes)?,
        })
    }

    fn run_on_bytes(&self, model: &ByteLm) -> Result<(Captured, usize)> {
        let layer = self.layer.unwrap_or(model.config().global_layer);
        Ok((model.capture_layer(&self.text(self.n)?, layer)?, layer))
    }

    fn run_on_tokens(&self, model: &LlamaLike) -> Result<(Captured, usize)> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(LabError::Argument(
                "this model reads tokens; give its tokenizer with --tokenizer FILE".into(),
            ));
        };
        let tokenizer = Tokenizer::load(tokenizer)?;
        let layer = self.layer.unwrap_or(0);
        // How many bytes n tokens take is known only afterwards: all of a short text, enough of a long one.
        let text = match self.text(self.n.saturating_mul(BYTES_A_TOKEN)) {
            Err(LabError::Lm(LmError::TextTooShort { found, .. })) if found > 0 => self.text(found)?,
            text => text?,
        };
        let mut tokens = tokenizer.encode(&text);
        if tokens.len() < self.n {
            return Err(LabError::Argument(format!(
                "the text gives {} tokens, {} asked for; choose a smaller --n or give more text with --text",
                tokens.len(),
                self.n
            )));
        }
        tokens.truncate(self.n);
        Ok((model.capture_layer(&tokens, layer)?, layer))
    }
}

/// A safetensors file of a Llama-style model has its `config.json` beside it.
fn has_config(path: &Path) -> bool {
    path.parent().is_some_and(|folder| folder.join("config.json").is_file())
}

fn named(captured: Captured) -> Result<NamedTensors> {
    let Captured { q, k, v, n_heads_q, n_heads_kv, n, head_dim } = captured;
    let mut tensors = NamedTensors::default();
    for (name, heads, data) in [("q", n_heads_q, q), ("k", n_heads_kv, k), ("v", n_heads_kv, v)] {
        tensors.0.insert(name.into(), NamedTensor::f32(name, &[1, heads, n, head_dim], data)?);
    }
    Ok(tensors)
}
