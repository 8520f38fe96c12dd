//! Orders of axes that files use and our registries do not take as they are.

use attn_core::registry::{NamedTensor, TensorData};

/// `(batch, length, heads * width)` as `(batch, heads, length, width)`; `None` if it is not such a tensor of f32.
pub(crate) fn split_heads(tensor: &NamedTensor, heads: usize) -> Option<NamedTensor> {
    let (&[batch, n, all], TensorData::F32(from)) = (tensor.shape.as_slice(), &tensor.data) else {
        return None;
    };
    if heads == 0 || all % heads != 0 {
        return None;
    }
    let width = all / heads;
    let mut to = Vec::with_capacity(from.len());
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..n {
                to.extend_from_slice(&from[((b * n + i) * heads + h) * width..][..width]);
            }
        }
    }
    Some(NamedTensor { shape: vec![batch, heads, n, width], data: TensorData::F32(to) })
}

/// The way back, for f32.
pub(crate) fn fold_heads(tensor: &NamedTensor) -> Option<NamedTensor> {
    let (&[batch, heads, n, width], TensorData::F32(from)) = (tensor.shape.as_slice(), &tensor.data) else {
        return None;
    };
    let mut to = Vec::with_capacity(from.len());
    for b in 0..batch {
        for i in 0..n {
            for h in 0..heads {
                to.extend_from_slice(&from[((b * heads + h) * n + i) * width..][..width]);
            }
        }
    }
    Some(NamedTensor { shape: vec![batch, n, heads * width], data: TensorData::F32(to) })
}

/// Rows of `first`, then rows of `second`, head by head; `None` unless both are f32 `(batch, heads, length, width)` of
/// equal other axes.
pub(crate) fn concat_lengths(first: &NamedTensor, second: &NamedTensor) -> Option<NamedTensor> {
    let (&[batch, heads, n, width], TensorData::F32(a)) = (first.shape.as_slice(), &first.data) else {
        return None;
    };
    let (&[b2, h2, m, w2], TensorData::F32(b)) = (second.shape.as_slice(), &second.data) else { return None };
    if (batch, heads, width) != (b2, h2, w2) {
        return None;
    }
    let mut to = Vec::with_capacity(a.len() + b.len());
    for head in 0..batch * heads {
        to.extend_from_slice(&a[head * n * width..][..n * width]);
        to.extend_from_slice(&b[head * m * width..][..m * width]);
    }
    Some(NamedTensor { shape: vec![batch, heads, n + m, width], data: TensorData::F32(to) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shape: &[usize]) -> NamedTensor {
        let len = shape.iter().product::<usize>();
        NamedTensor::f32("x", shape, (0..len).map(|x| x as f32).collect()).unwrap()
    }

    #[test]
    fn splitting_and_folding_heads_are_inverse() {
        let folded = counted(&[2, 3, 8]);
        let split = split_heads(&folded, 4).unwrap();
        assert_eq!(split.shape, [2, 4, 3, 2]);
        let TensorData::F32(numbers) = &split.data else { panic!("f32") };
        assert_eq!(numbers[..4], [0.0, 1.0, 8.0, 9.0], "head 0: rows 0 and 1");
        assert_eq!(fold_heads(&split).unwrap(), folded);
        assert!(split_heads(&folded, 3).is_none());
    }

    #[test]
    fn lengths_join_head_by_head() {
        let joined = concat_lengths(&counted(&[1, 2, 1, 2]), &counted(&[1, 2, 2, 2])).unwrap();
        assert_eq!(joined.shape, [1, 2, 3, 2]);
        let wanted = [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6, 7].map(|x| x as f32);
        assert_eq!(joined.data, TensorData::F32(wanted.to_vec()));
        assert!(concat_lengths(&counted(&[1, 2, 1, 2]), &counted(&[1, 1, 2, 2])).is_none());
    }
}
