//! Orders of axes that files use and our registries do not take as they are.

use attn_core::registry::{NamedTensor, TensorData};

/// The numbers at these places.
fn gather(data: &TensorData, places: impl Iterator<Item = usize>) -> TensorData {
    match data {
        TensorData::F32(from) => TensorData::F32(places.map(|at| from[at]).collect()),
        TensorData::Bf16(from) => TensorData::Bf16(places.map(|at| from[at]).collect()),
        TensorData::F16(from) => TensorData::F16(places.map(|at| from[at]).collect()),
        TensorData::I32(from) => TensorData::I32(places.map(|at| from[at]).collect()),
        TensorData::U8(from) => TensorData::U8(places.map(|at| from[at]).collect()),
    }
}

/// `(batch, length, heads * width)` as `(batch, heads, length, width)`; `None` if it is not such a tensor.
pub(super) fn split_heads(tensor: &NamedTensor, heads: usize) -> Option<NamedTensor> {
    let &[batch, n, all] = tensor.shape.as_slice() else { return None };
    if heads == 0 || all % heads != 0 {
        return None;
    }
    let width = all / heads;
    let place = |(b, h, i)| ((b * n + i) * heads + h) * width;
    Some(rows(tensor, vec![batch, heads, n, width], product(batch, heads, n).map(place), width))
}

/// The way back.
pub(super) fn fold_heads(tensor: &NamedTensor) -> Option<NamedTensor> {
    let &[batch, heads, n, width] = tensor.shape.as_slice() else { return None };
    let place = |(b, i, h)| ((b * heads + h) * n + i) * width;
    Some(rows(tensor, vec![batch, n, heads * width], product(batch, n, heads).map(place), width))
}

/// A tensor of this shape whose rows of `width` numbers start at these places.
fn rows(
    tensor: &NamedTensor,
    shape: Vec<usize>,
    starts: impl Iterator<Item = usize>,
    width: usize,
) -> NamedTensor {
    NamedTensor { shape, data: gather(&tensor.data, starts.flat_map(|start| start..start + width)) }
}

fn product(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |x| (0..b).flat_map(move |y| (0..c).map(move |z| (x, y, z))))
}

/// Rows of `first`, then rows of `second`, head by head; `None` unless both are `(batch, heads, length, width)` of one type
/// and equal other axes.
pub(super) fn concat_lengths(first: &NamedTensor, second: &NamedTensor) -> Option<NamedTensor> {
    let &[batch, heads, n, width] = first.shape.as_slice() else { return None };
    let &[b2, h2, m, w2] = second.shape.as_slice() else { return None };
    if (batch, heads, width) != (b2, h2, w2) {
        return None;
    }
    let mut both = first.data.clone();
    match (&mut both, &second.data) {
        (TensorData::F32(a), TensorData::F32(b)) => a.extend(b),
        (TensorData::Bf16(a), TensorData::Bf16(b)) => a.extend(b),
        (TensorData::F16(a), TensorData::F16(b)) => a.extend(b),
        _ => return None,
    }
    let second_at = batch * heads * n * width;
    let places = (0..batch * heads).flat_map(|head| {
        let of_second = second_at + head * m * width..second_at + (head + 1) * m * width;
        (head * n * width..(head + 1) * n * width).chain(of_second)
    });
    Some(NamedTensor { shape: vec![batch, heads, n + m, width], data: gather(&both, places) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::DType;

    fn counted(shape: &[usize]) -> NamedTensor {
        let len = shape.iter().product::<usize>();
        NamedTensor::f32("x", shape, (0..len).map(|x| x as f32).collect()).unwrap()
    }

    #[test]
    fn splitting_and_folding_heads_are_inverse() {
        let folded = counted(&[2, 3, 8]).rounded(DType::F16);
        let split = split_heads(&folded, 4).unwrap();
        assert_eq!(split.shape, [2, 4, 3, 2]);
        assert_eq!(split.data.to_f64()[..4], [0.0, 1.0, 8.0, 9.0], "head 0: rows 0 and 1");
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
        let half = counted(&[1, 2, 2, 2]).rounded(DType::Bf16);
        assert!(concat_lengths(&counted(&[1, 2, 1, 2]), &half).is_none(), "two types");
    }
}
