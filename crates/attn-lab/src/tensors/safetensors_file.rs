//! safetensors files.

use super::{narrow, tensor};
use crate::{LabError, Result};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use bytemuck::{AnyBitPattern, cast_slice, pod_collect_to_vec};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use tempfile::NamedTempFile;

/// Reads all tensors of a file.
pub(super) fn load(path: &Path) -> Result<NamedTensors> {
    let bytes = std::fs::read(path).map_err(|e| LabError::io("read", path, e))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| LabError::format(path, format!("not a safetensors file: {e}")))?;
    let mut tensors = NamedTensors::default();
    for (name, view) in file.iter() {
        let data = numbers(path, name, &view)?;
        tensors.0.insert(name.into(), tensor(path, name, view.shape().to_vec(), data)?);
    }
    Ok(tensors)
}

fn numbers(path: &Path, name: &str, view: &TensorView<'_>) -> Result<TensorData> {
    fn wide<T: AnyBitPattern + bytemuck::NoUninit>(bytes: &[u8]) -> Vec<T> {
        pod_collect_to_vec(bytes)
    }
    // The format is little-endian, and so is every machine these kernels are written for.
    let bytes = view.data();
    Ok(match view.dtype() {
        Dtype::F32 => TensorData::F32(wide(bytes)),
        Dtype::F64 => TensorData::F32(wide::<f64>(bytes).into_iter().map(|x| x as f32).collect()),
        Dtype::BF16 => TensorData::Bf16(wide(bytes)),
        Dtype::F16 => TensorData::F16(wide(bytes)),
        Dtype::I32 => TensorData::I32(wide(bytes)),
        Dtype::I64 => narrow(path, name, wide::<i64>(bytes).into_iter())?,
        Dtype::U8 | Dtype::BOOL => TensorData::U8(bytes.to_vec()),
        other => {
            let reason =
                format!("tensor `{name}` is {other:?}; expected f32, f64, bf16, f16, i32, i64, u8 or bool");
            return Err(LabError::format(path, reason));
        }
    })
}

/// Writes all tensors to a safetensors file, in one step.
///
/// # Errors
/// [`LabError::Io`] if the folder or the file cannot be written; an existing file is then still the old one.
pub fn save(path: &Path, tensors: &NamedTensors) -> Result<()> {
    save_with_metadata(path, tensors, &BTreeMap::new())
}

/// As [`save`], with texts that say where the tensors come from.
///
/// # Errors
/// As [`save`].
pub fn save_with_metadata(
    path: &Path,
    tensors: &NamedTensors,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let views: Result<Vec<(&str, TensorView<'_>)>> =
        tensors.0.iter().map(|(name, tensor)| Ok((name.as_str(), view(path, name, tensor)?))).collect();
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    let bytes = safetensors::serialize(views?, metadata).map_err(|e| LabError::format(path, e))?;
    write_in_one_step(path, &bytes)
}

fn view<'a>(path: &Path, name: &str, tensor: &'a NamedTensor) -> Result<TensorView<'a>> {
    let (dtype, bytes): (Dtype, &[u8]) = match &tensor.data {
        TensorData::F32(d) => (Dtype::F32, cast_slice(d)),
        TensorData::Bf16(d) => (Dtype::BF16, cast_slice(d)),
        TensorData::F16(d) => (Dtype::F16, cast_slice(d)),
        TensorData::I32(d) => (Dtype::I32, cast_slice(d)),
        TensorData::U8(d) => (Dtype::U8, d),
    };
    TensorView::new(dtype, tensor.shape.clone(), bytes)
        .map_err(|e| LabError::format(path, format!("tensor `{name}`: {e}")))
}

/// Writes beside the file, then renames: a reader sees the old file or the whole new one.
fn write_in_one_step(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |e| LabError::io("write", path, e);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = NamedTempFile::new_in(folder).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_dtype_survives_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let all = [
            ("a", TensorData::F32(vec![1.5, f32::NEG_INFINITY])),
            ("b", TensorData::Bf16(vec![bf16::ONE, bf16::MIN])),
            ("c", TensorData::F16(vec![f16::ONE, f16::MAX])),
            ("d", TensorData::I32(vec![-7, i32::MAX])),
            ("e", TensorData::U8(vec![0, 1])),
        ];
        let tensors = all.map(|(name, data)| (name.to_string(), NamedTensor { shape: vec![2, 1], data }));
        let tensors = NamedTensors(tensors.into());
        save(&path, &tensors).unwrap();
        assert_eq!(load(&path).unwrap(), tensors);
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/such/folder/t.safetensors");
        let line = save(&missing, &NamedTensors::default()).unwrap_err().to_string();
        assert!(line.starts_with("cannot write") && line.contains("t.safetensors"), "{line}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
