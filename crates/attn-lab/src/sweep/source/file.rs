//! The user's own q, k and v. A file that is longer than the length asked for gives its first positions.

use super::{Fnv, Source, SourceKind, convert};
use crate::{LabError, Result, tensors};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnShape, DType};
use std::path::{Path, PathBuf};

/// Tensors `q (batch, heads, n, head_dim)`, `k`, `v` of a file.
pub struct FileTensors {
    path: PathBuf,
    whole: NamedTensors,
    shape: AttnShape,
    hash: String,
}

impl FileTensors {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`LabError`] for a file that cannot be read, a missing tensor, sizes that do not fit together, NaN.
    pub fn open(path: &Path) -> Result<Self> {
        let mut all = tensors::load(path)?;
        all.0.retain(|name, _| ["q", "k", "v"].contains(&name.as_str()));
        let complaint = |e: attn_core::AttnError| LabError::format(path, e);
        for name in ["q", "k", "v"] {
            all.require(name).map_err(complaint)?;
        }
        let whole = convert(all, DType::F32)?;
        let shape = whole.qkv().map_err(complaint)?.shape();
        if shape.n_q != shape.n_kv {
            let AttnShape { n_q, n_kv, .. } = shape;
            return Err(LabError::format(
                path,
                format!("q has {n_q} positions and k has {n_kv}; a sweep needs as many queries as keys"),
            ));
        }
        let mut hash = Fnv::new();
        for name in ["q", "k", "v"] {
            let numbers = numbers(&whole, name)?;
            if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                let index = tensors::index_of(at, &whole.require(name)?.shape);
                let found = numbers[at];
                return Err(LabError::format(
                    path,
                    format!(
                        "tensor `{name}` is {found} at {index:?}; errors can be measured on finite inputs only"
                    ),
                ));
            }
            hash = hash.with(bytemuck::cast_slice(numbers));
        }
        Ok(Self { path: path.to_path_buf(), hash: hash.hex(), shape, whole })
    }

    /// Positions in the file.
    pub fn len(&self) -> usize {
        self.shape.n_q
    }

    /// True for a file without positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Refuses lengths that the file does not hold.
    ///
    /// # Errors
    /// [`LabError::Format`] with both lengths.
    pub fn check(&self, n: usize) -> Result<()> {
        if n <= self.len() {
            return Ok(());
        }
        let holds = self.len();
        Err(LabError::format(
            &self.path,
            format!("holds {holds} positions, {n} asked for; choose a smaller --n"),
        ))
    }
}

impl Source for FileTensors {
    fn kind(&self) -> SourceKind {
        SourceKind::File
    }

    fn describe(&self) -> String {
        format!("first positions of {}", self.path.display())
    }

    fn shape(&self, n: usize) -> AttnShape {
        AttnShape { n_q: n, n_kv: n, ..self.shape }
    }

    fn hash(&self, n: usize) -> Result<String> {
        self.check(n)?;
        Ok(self.hash.clone())
    }

    fn inputs(&self, n: usize) -> Result<NamedTensors> {
        self.check(n)?;
        let mut inputs = NamedTensors::default();
        for (name, tensor) in &self.whole.0 {
            let [batch, heads, length, width] = tensor.shape[..] else { continue };
            let heads_of = numbers(&self.whole, name)?.chunks_exact((length * width).max(1));
            let first: Vec<f32> = heads_of.flat_map(|head| &head[..n * width]).copied().collect();
            inputs.0.insert(name.clone(), NamedTensor::f32(name, &[batch, heads, n, width], first)?);
        }
        Ok(inputs)
    }
}

fn numbers<'a>(tensors: &'a NamedTensors, name: &str) -> Result<&'a [f32]> {
    match &tensors.require(name)?.data {
        TensorData::F32(data) => Ok(data),
        _ => Err(LabError::Argument(format!("tensor `{name}` was not converted to f32"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, lengths: [usize; 3], spoil: impl Fn(&mut NamedTensors)) {
        let tensor = |name: &str, n: usize| {
            let data = (0..2 * n * 3).map(|x| x as f32).collect();
            (name.to_string(), NamedTensor::f32(name, &[1, 2, n, 3], data).unwrap())
        };
        let [q, k, v] = lengths;
        let mut all =
            NamedTensors([tensor("q", q), tensor("k", k), tensor("v", v), tensor("other", 1)].into());
        spoil(&mut all);
        tensors::save(path, &all).unwrap();
    }

    #[test]
    fn the_first_positions_of_every_head_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, [4; 3], |_| ());
        let file = FileTensors::open(&path).unwrap();
        let inputs = file.inputs(2).unwrap();
        let (shape, k) = inputs.f32("k").unwrap().unwrap();
        assert_eq!(shape, [1, 2, 2, 3]);
        assert_eq!(k, [0., 1., 2., 3., 4., 5., 12., 13., 14., 15., 16., 17.]);
        assert_eq!(inputs.0.len(), 3, "other tensors are left out");
        let line = file.inputs(5).unwrap_err().to_string();
        assert!(line.contains("4 positions, 5 asked for"), "{line}");
    }

    #[test]
    fn what_cannot_be_swept_is_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let complaint = || FileTensors::open(&path).err().unwrap().to_string();
        write(&path, [4; 3], |t| drop(t.0.remove("k")));
        assert!(complaint().contains("missing tensor `k`"), "{}", complaint());
        write(&path, [4, 5, 5], |_| ());
        assert!(complaint().contains("as many queries as keys"), "{}", complaint());
        write(&path, [4, 4, 5], |_| ());
        assert!(complaint().contains("n_kv"), "{}", complaint());
        write(&path, [4; 3], |t| {
            let TensorData::F32(v) = &mut t.0.get_mut("v").unwrap().data else { unreachable!() };
            v[13] = f32::NAN;
        });
        assert!(complaint().contains("`v` is NaN at [0, 1, 0, 1]"), "{}", complaint());
    }
}
