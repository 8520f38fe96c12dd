//! Named tensors from and to files.
//!
//! Read: `.safetensors`, `.npz`, one `.npy` (the tensor is called like the file), or a folder of `.npy` files. Numbers
//! stay as they are stored; f64 is rounded to f32 (what numpy makes by default and no kernel reads), i64 must fit i32,
//! bool becomes 0 and 1. Written: `.safetensors`, in one step, so that a file is either the old one or the whole new
//! one.

mod numpy;
mod safetensors_file;

pub use safetensors_file::{save, save_with_metadata};

use crate::{LabError, Result};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use std::path::Path;

/// Reads all tensors of a file or of a folder of `.npy` files.
///
/// # Errors
/// [`LabError::Io`], and [`LabError::Format`] for a file of another kind or with a tensor that cannot be used.
pub fn load(path: &Path) -> Result<NamedTensors> {
    if path.is_dir() {
        return numpy::load_folder(path);
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => safetensors_file::load(path),
        Some("npz") => numpy::load_npz(path),
        Some("npy") => numpy::load_npy(path),
        _ => Err(LabError::format(
            path,
            "unknown kind of file; expected .safetensors, .npz, .npy or a folder of .npy",
        )),
    }
}

/// Refuses NaN in any floating-point tensor.
///
/// # Errors
/// [`LabError::Argument`] naming the tensor and the index of the first NaN.
pub fn refuse_nan(tensors: &NamedTensors) -> Result<()> {
    for (name, tensor) in &tensors.0 {
        let at = match &tensor.data {
            TensorData::F32(data) => data.iter().position(|x| x.is_nan()),
            TensorData::Bf16(data) => data.iter().position(|x| x.is_nan()),
            TensorData::F16(data) => data.iter().position(|x| x.is_nan()),
            TensorData::I32(_) | TensorData::U8(_) => None,
        };
        if let Some(at) = at {
            let index = index_of(at, &tensor.shape);
            return Err(LabError::Argument(format!(
                "tensor `{name}` is NaN at {index:?}; fix the input, or go on with --allow-nan"
            )));
        }
    }
    Ok(())
}

/// The index of element `at` of a row-major tensor.
pub fn index_of(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &len) in index.iter_mut().zip(shape).rev() {
        *i = at % len.max(1);
        at /= len.max(1);
    }
    index
}

/// A tensor of `shape`, checked against its number of elements.
fn tensor(path: &Path, name: &str, shape: Vec<usize>, data: TensorData) -> Result<NamedTensor> {
    let found = match &data {
        TensorData::F32(d) => d.len(),
        TensorData::Bf16(d) => d.len(),
        TensorData::F16(d) => d.len(),
        TensorData::I32(d) => d.len(),
        TensorData::U8(d) => d.len(),
    };
    let wanted: usize = shape.iter().product();
    if found != wanted {
        let reason = format!("tensor `{name}`: shape {shape:?} has {wanted} elements, found {found}");
        return Err(LabError::format(path, reason));
    }
    Ok(NamedTensor { shape, data })
}

/// 64-bit indices as 32-bit ones.
fn narrow(path: &Path, name: &str, wide: impl Iterator<Item = i64>) -> Result<TensorData> {
    let narrow: std::result::Result<Vec<i32>, _> = wide.map(i32::try_from).collect();
    Ok(TensorData::I32(
        narrow.map_err(|_| {
            LabError::format(path, format!("tensor `{name}`: an integer does not fit 32 bits"))
        })?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_found_with_its_index() {
        let mut data = vec![0.0; 24];
        data[17] = f32::NAN;
        let k = NamedTensor::f32("k", &[1, 2, 3, 4], data).unwrap();
        let line = refuse_nan(&NamedTensors([("k".into(), k)].into())).unwrap_err().to_string();
        assert!(
            line.contains("`k`") && line.contains("[0, 1, 1, 1]") && line.contains("--allow-nan"),
            "{line}"
        );
    }

    #[test]
    fn unknown_files_are_refused() {
        let line = load(Path::new("q.txt")).unwrap_err().to_string();
        assert!(line.contains("q.txt") && line.contains(".safetensors"), "{line}");
    }
}
