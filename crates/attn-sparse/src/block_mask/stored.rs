//! Block masks as bytes, in the safetensors format.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `shape` | `[7]` u64 | batch, n_heads_q, n_heads_kv, n_q, n_kv, head_dim, head_dim_v |
//! | `sizes` | `[2]` u64 | block_q, block_kv |
//! | `lists` | `[2]` u64 | batch entries and heads with lists of their own |
//! | `row_ptr` | `[lists * block rows + 1]` u64 | where each row's entries start |
//! | `blocks` | `[entries]` u32 | blocks of keys, ascending in each row |
//! | `partial` | `[entries]` u8 | 1 where some pairs are not seen |
//! | `bits` | `[partial blocks, words]` u64 | one bit a pair, row-major in the block, lowest bit first |

use super::bits::Bits;
use super::{BlockMask, BlockSizes, Builder};
use attn_core::{AttnError, AttnShape, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::sync::Arc;

impl BlockMask {
    /// The mask as bytes; partial blocks as bits, whatever decided their pairs.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the format cannot hold it.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let s = &self.shape;
        let wide =
            |numbers: &[usize]| numbers.iter().flat_map(|x| (*x as u64).to_le_bytes()).collect::<Vec<u8>>();
        let shape = wide(&[s.batch, s.n_heads_q, s.n_heads_kv, s.n_q, s.n_kv, s.head_dim, s.head_dim_v]);
        let (sizes, lists) = (wide(&[self.sizes.q, self.sizes.kv]), wide(&[self.batch, self.heads]));
        let row_ptr = wide(&self.row_ptr);
        let blocks: Vec<u8> = self.blocks.iter().flat_map(|block| block.to_le_bytes()).collect();
        // A partial block that no mask cuts is a full one.
        let partial: Vec<u8> =
            self.partial.iter().map(|partial| u8::from(*partial && self.inside.is_some())).collect();
        let words = if self.inside.is_some() { self.bits() } else { Vec::new() };
        let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let per_block = Bits::words_a_block(self);
        let entries = self.blocks.len();
        let tensors = [
            ("shape", Dtype::U64, vec![7], &shape),
            ("sizes", Dtype::U64, vec![2], &sizes),
            ("lists", Dtype::U64, vec![2], &lists),
            ("row_ptr", Dtype::U64, vec![self.row_ptr.len()], &row_ptr),
            ("blocks", Dtype::U32, vec![entries], &blocks),
            ("partial", Dtype::U8, vec![entries], &partial),
            ("bits", Dtype::U64, vec![words.len() / per_block, per_block], &bits),
        ];
        let views = tensors.into_iter().map(|(name, dtype, dims, bytes)| {
            TensorView::new(dtype, dims, bytes).map(|view| (name, view)).map_err(malformed)
        });
        serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(malformed)
    }

    /// Reads what [`BlockMask::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`AttnError`] naming the part that is missing or does not fit the others.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
        let [batch, n_heads_q, n_heads_kv, n_q, n_kv, head_dim, head_dim_v] = numbers(&file, "shape")?;
        let shape = AttnShape { batch, n_heads_q, n_heads_kv, n_q, n_kv, head_dim, head_dim_v };
        let [q, kv] = numbers(&file, "sizes")?;
        let [of_batch, of_heads] = numbers(&file, "lists")?;
        let sizes = BlockSizes { q, kv };
        if of_batch != 1 && of_batch != batch {
            return Err(AttnError::value("lists of the batch", of_batch, format!("1 or {batch}")));
        }
        let mut builder = Builder::new(&shape, sizes).per_head(of_heads);
        if of_batch > 1 {
            builder = builder.per_batch();
        }
        let row_ptr = wide(&file, "row_ptr")?;
        let rows = n_q.checked_div(q).and_then(|rows| of_batch.checked_mul(of_heads)?.checked_mul(rows + 1));
        if rows.is_none_or(|rows| rows.checked_mul(2).is_none()) || q.checked_mul(kv).is_none() {
            return Err(AttnError::value("block_q", q, "sizes whose products are numbers"));
        }
        let data = tensor(&file, "blocks", Dtype::U32)?;
        let blocks: Vec<usize> = data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b) as usize).collect();
        let mut mask = builder.from_csr(&row_ptr, &blocks)?;
        if mask.blocks.iter().zip(&blocks).any(|(sorted, given)| *sorted as usize != *given) {
            return Err(AttnError::value("blocks", "unsorted", "ascending in each row"));
        }
        let partial = tensor(&file, "partial", Dtype::U8)?;
        if partial.len() != blocks.len() {
            return Err(AttnError::shape("partial", "elements", partial.len(), blocks.len()));
        }
        mask.partial = partial.iter().map(|partial| *partial != 0).collect();
        let words: Vec<u64> = wide(&file, "bits")?.into_iter().map(|word| word as u64).collect();
        let n_partial = mask.partial.iter().filter(|partial| **partial).count();
        let expected = Bits::words_a_block(&mask).checked_mul(n_partial);
        if Some(words.len()) != expected {
            let expected = expected.map_or("fewer than fit".into(), |words| words.to_string());
            return Err(AttnError::shape("bits", "words", words.len(), expected));
        }
        if n_partial > 0 {
            mask.inside = Some(Arc::new(Bits::new(mask.clone(), words)));
        }
        Ok(mask)
    }
}

fn malformed(error: impl ToString) -> AttnError {
    AttnError::Layout { tensor: "block mask".into(), reason: error.to_string() }
}

fn tensor<'a>(file: &SafeTensors<'a>, name: &str, dtype: Dtype) -> Result<&'a [u8]> {
    let found = || file.names().into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let tensor = file.tensor(name).map_err(|_| AttnError::Missing { name: name.into(), found: found() })?;
    if tensor.dtype() != dtype {
        let (found, expected) = (format!("{:?}", tensor.dtype()), format!("{dtype:?}"));
        return Err(AttnError::DType { tensor: name.into(), found, expected });
    }
    Ok(tensor.data())
}

fn wide(file: &SafeTensors<'_>, name: &str) -> Result<Vec<usize>> {
    let data = tensor(file, name, Dtype::U64)?;
    Ok(data.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes) as usize).collect())
}

fn numbers<const N: usize>(file: &SafeTensors<'_>, name: &str) -> Result<[usize; N]> {
    let numbers = wide(file, name)?;
    let found = numbers.len();
    numbers.try_into().map_err(|_| AttnError::shape(name, "elements", found, N))
}
