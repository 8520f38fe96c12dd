//! Text for the models: a file, a directory of sources, or by default the sources in the cargo registry.
//!
//! Files of a directory follow each other sorted by path, so that the same directory gives the same text everywhere.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{LmError, Result};

/// What [`load`] takes from a directory.
const TEXT_EXTENSIONS: &[&str] = &[
    "rs", "txt", "md", "py", "c", "h", "cc", "cpp", "hpp", "cu", "js", "ts", "go", "java", "toml", "tex",
    "html",
];

/// What [`load_default`] takes from the registry.
const RUST: &[&str] = &["rs"];

/// The first `n_bytes` of a file, or of a directory's text files one after the other.
///
/// # Errors
/// [`LmError::TextTooShort`] with both sizes; [`LmError::NoText`] if a directory holds no text file;
/// [`LmError::Io`] naming what could not be read.
pub fn load(place: &Path, n_bytes: usize) -> Result<Vec<u8>> {
    let kind = std::fs::metadata(place).map_err(|e| LmError::io(place, e))?;
    let files = if kind.is_dir() { files(place, TEXT_EXTENSIONS)? } else { vec![place.to_path_buf()] };
    if files.is_empty() {
        let extensions = TEXT_EXTENSIONS.join(", .");
        return Err(LmError::NoText(format!("no text file (.{extensions}) in {}", place.display())));
    }
    concatenate(&files, n_bytes, &place.display().to_string())
}

/// The first `n_bytes` of the Rust sources in [`default_dirs`].
///
/// # Errors
/// As [`default_dirs`] and [`load`].
pub fn load_default(n_bytes: usize) -> Result<Vec<u8>> {
    let dirs = default_dirs()?;
    let files = dirs.iter().map(|dir| files(dir, RUST)).collect::<Result<Vec<_>>>()?.concat();
    let places = dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>();
    concatenate(&files, n_bytes, &places.join(", "))
}

/// Where cargo keeps the sources of dependencies: `registry/src/*` in `$CARGO_HOME` or `~/.cargo`, sorted.
///
/// # Errors
/// [`LmError::NoText`] if there are none.
pub fn default_dirs() -> Result<Vec<PathBuf>> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".cargo"));
    let cargo_home = set("CARGO_HOME").or_else(home);
    let cargo_home =
        cargo_home.ok_or_else(|| LmError::NoText("neither CARGO_HOME nor HOME is set".to_string()))?;
    let sources = cargo_home.join("registry").join("src");
    let absent = || LmError::NoText(format!("no sources of dependencies in {}", sources.display()));
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(&sources).map_err(|_| absent())? {
        let path = entry.map_err(|e| LmError::io(&sources, e))?.path();
        if path.is_dir() {
            dirs.push(path);
        }
    }
    if dirs.is_empty() {
        return Err(absent());
    }
    dirs.sort();
    Ok(dirs)
}

/// All files below `dir` with one of the `extensions`, sorted by path; hidden ones and links left out.
///
/// # Errors
/// [`LmError::Io`] naming the directory that could not be read.
pub fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).map_err(|e| LmError::io(&dir, e))? {
            let entry = entry.map_err(|e| LmError::io(&dir, e))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(|e| LmError::io(&dir, e))?);
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let extension = path.extension().and_then(|extension| extension.to_str());
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() && extension.is_some_and(|e| extensions.contains(&e)) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn concatenate(files: &[PathBuf], n_bytes: usize, place: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for path in files {
        if text.len() == n_bytes {
            break;
        }
        let file = File::open(path).map_err(|e| LmError::io(path, e))?;
        let missing = (n_bytes - text.len()) as u64;
        file.take(missing).read_to_end(&mut text).map_err(|e| LmError::io(path, e))?;
    }
    if text.len() < n_bytes {
        return Err(LmError::TextTooShort { found: text.len(), asked: n_bytes, place: place.to_string() });
    }
    Ok(text)
}
