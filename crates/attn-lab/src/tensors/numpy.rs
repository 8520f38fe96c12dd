//! numpy's `.npy` and `.npz` files.

use super::{narrow, tensor};
use crate::{LabError, Result};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use npyz::npz::NpzArchive;
use npyz::{DType, NpyFile, Order, TypeChar};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// One file, one tensor, called like the file.
pub(super) fn load_npy(path: &Path) -> Result<NamedTensors> {
    let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("tensor");
    let file = File::open(path).map_err(|e| LabError::io("read", path, e))?;
    let npy = NpyFile::new(BufReader::new(file)).map_err(|e| not_numpy(path, e))?;
    Ok(NamedTensors([(name.to_string(), array(path, name, npy)?)].into()))
}

/// An archive of arrays.
pub(super) fn load_npz(path: &Path) -> Result<NamedTensors> {
    let file = File::open(path).map_err(|e| LabError::io("read", path, e))?;
    let mut archive = NpzArchive::new(BufReader::new(file)).map_err(|e| not_numpy(path, e))?;
    let names: Vec<String> = archive.array_names().map(str::to_string).collect();
    let mut tensors = NamedTensors::default();
    for name in names {
        if let Some(npy) = archive.by_name(&name).map_err(|e| not_numpy(path, e))? {
            let read = array(path, &name, npy)?;
            tensors.0.insert(name, read);
        }
    }
    Ok(tensors)
}

/// Every `.npy` file of a folder.
pub(super) fn load_folder(path: &Path) -> Result<NamedTensors> {
    let entries = std::fs::read_dir(path).map_err(|e| LabError::io("read", path, e))?;
    let mut tensors = NamedTensors::default();
    for entry in entries {
        let file = entry.map_err(|e| LabError::io("read", path, e))?.path();
        if file.extension().is_some_and(|e| e == "npy") {
            tensors.0.extend(load_npy(&file)?.0);
        }
    }
    if tensors.0.is_empty() {
        return Err(LabError::format(path, "the folder holds no .npy file"));
    }
    Ok(tensors)
}

fn not_numpy(path: &Path, e: std::io::Error) -> LabError {
    LabError::format(path, format!("not a numpy file: {e}"))
}

fn array(path: &Path, name: &str, npy: NpyFile<impl Read>) -> Result<NamedTensor> {
    let refuse = |what: String| LabError::format(path, format!("array `{name}` {what}"));
    if npy.order() == Order::Fortran && npy.shape().len() > 1 {
        return Err(refuse("is stored column by column; save it with numpy.ascontiguousarray".into()));
    }
    let shape: Vec<usize> = npy.shape().iter().map(|&len| len as usize).collect();
    let DType::Plain(kind) = npy.dtype() else {
        return Err(refuse("has several fields; expected plain numbers".into()));
    };
    let read = |e| not_numpy(path, e);
    let data = match (kind.type_char(), kind.num_bytes()) {
        (TypeChar::Float, Some(4)) => TensorData::F32(npy.into_vec().map_err(read)?),
        (TypeChar::Float, Some(2)) => TensorData::F16(npy.into_vec().map_err(read)?),
        (TypeChar::Float, Some(8)) => {
            TensorData::F32(npy.into_vec::<f64>().map_err(read)?.into_iter().map(|x| x as f32).collect())
        }
        (TypeChar::Int, Some(4)) => TensorData::I32(npy.into_vec().map_err(read)?),
        (TypeChar::Int, Some(8)) => narrow(path, name, npy.into_vec::<i64>().map_err(read)?.into_iter())?,
        (TypeChar::Uint, Some(1)) => TensorData::U8(npy.into_vec().map_err(read)?),
        (TypeChar::Bool, _) => {
            TensorData::U8(npy.into_vec::<bool>().map_err(read)?.into_iter().map(u8::from).collect())
        }
        _ => return Err(refuse(format!("is {kind}; expected f2, f4, f8, i4, i8, u1 or bool"))),
    };
    tensor(path, name, shape, data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use npyz::WriterBuilder;

    fn write_npy<T: npyz::AutoSerialize + Copy>(path: &Path, shape: &[u64], data: &[T]) {
        let mut writer = npyz::WriteOptions::new()
            .default_dtype()
            .shape(shape)
            .writer(File::create(path).unwrap())
            .begin_nd()
            .unwrap();
        writer.extend(data.iter().copied()).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn a_folder_gives_one_tensor_a_file() {
        let folder = tempfile::tempdir().unwrap();
        write_npy(&folder.path().join("q.npy"), &[1, 2, 1, 1], &[0.5f32, -1.0]);
        write_npy(&folder.path().join("mask.npy"), &[2], &[true, false]);
        write_npy(&folder.path().join("scale.npy"), &[2], &[0.25f64, 2.0]);
        write_npy(&folder.path().join("index.npy"), &[2], &[3i64, -4]);
        let tensors = super::super::load(folder.path()).unwrap();
        assert_eq!(tensors.0.len(), 4);
        assert_eq!(tensors.get("q").unwrap().shape, [1, 2, 1, 1]);
        assert_eq!(tensors.get("q").unwrap().data, TensorData::F32(vec![0.5, -1.0]));
        assert_eq!(tensors.get("mask").unwrap().data, TensorData::U8(vec![1, 0]));
        assert_eq!(tensors.get("scale").unwrap().data, TensorData::F32(vec![0.25, 2.0]));
        assert_eq!(tensors.get("index").unwrap().data, TensorData::I32(vec![3, -4]));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(super::super::load(folder.path()).unwrap_err().to_string().contains("no .npy"));
        let wide = folder.path().join("i.npy");
        write_npy(&wide, &[1], &[1i64 << 40]);
        assert!(load_npy(&wide).unwrap_err().to_string().contains("32 bits"));
        std::fs::write(folder.path().join("x.npz"), b"nothing").unwrap();
        let line = load_npz(&folder.path().join("x.npz")).unwrap_err().to_string();
        assert!(line.contains("not a numpy file"), "{line}");
    }
}
