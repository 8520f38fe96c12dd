//! The engine's option table: a variant is one row of it.

use super::Recurrence;
use attn_core::{AttnError, Result};

/// Which side of the state fades, by how many different rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Nothing fades.
    None,
    /// One rate a token.
    Scalar,
    /// One rate a token and key channel (row of the state).
    Key,
    /// One rate a token and value channel (column of the state).
    Value,
}

/// What a token takes out of the state before it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erase {
    /// Nothing.
    None,
    /// The delta rule: what is read along `a` is written back along the write key itself, `S += k (v + S^T a)^T`.
    Tied,
    /// What is read along `a` is written along another direction, `S += b (S^T a)^T + k v^T`.
    Untied,
}

/// Which state the erase reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EraseAt {
    /// The previous token's, before it fades.
    Before,
    /// The faded one.
    After,
}

/// Which state the query reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// The one its own token has written.
    Post,
    /// The previous token's, not faded, and its own write weighted by the bonus: `q^T (S + diag(u) k v^T)`.
    Pre,
}

/// One row of the option table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The variant's name, for error messages.
    pub name: &'static str,
    /// Rows of the state: width of the engine's queries and keys.
    pub key_dim: usize,
    /// Columns of the state: width of the engine's values.
    pub value_dim: usize,
    /// How the state fades.
    pub decay: Decay,
    /// What a token takes out.
    pub erase: Erase,
    /// Which state the erase reads.
    pub erase_at: EraseAt,
    /// Which state the query reads.
    pub read: Read,
    /// Writes of one token; it reads after the last of them.
    pub writes: usize,
    /// The state has a last row `z [key_dim]`, the sum of the written keys, that fades as they do; with every read goes the
    /// norm `q . z`.
    pub norm: bool,
    /// What takes the place of the engine's recurrence, where no option says it.
    pub recurrence: Option<Recurrence>,
    /// Multiplies the read, never the state.
    pub scale: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Options {
    /// A sum of writes that nothing fades or erases, read after the write.
    pub fn new(name: &'static str, key_dim: usize, value_dim: usize) -> Self {
        Self {
            name,
            key_dim,
            value_dim,
            decay: Decay::None,
            erase: Erase::None,
            erase_at: EraseAt::After,
            read: Read::Post,
            writes: 1,
            norm: false,
            recurrence: None,
            scale: 1.0,
            chunk_len: crate::CHUNK_LEN,
        }
    }

    /// Numbers of one token's decay.
    pub fn decay_width(&self) -> usize {
        match self.decay {
            Decay::None => 0,
            Decay::Scalar => 1,
            Decay::Key => self.key_dim,
            Decay::Value => self.value_dim,
        }
    }

    /// Numbers of a state.
    pub fn state_len(&self) -> usize {
        self.matrix_len() + if self.norm { self.key_dim } else { 0 }
    }

    /// Numbers of its matrix, which come first.
    pub fn matrix_len(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// The write that token `i` reads after.
    #[inline(always)]
    pub(super) fn last_write(&self, i: usize) -> usize {
        (i + 1) * self.writes - 1
    }

    /// Writes of the same chunk that token `i` sees through the state; its own under [`Read::Pre`] not counted.
    #[inline(always)]
    pub(super) fn seen(&self, i: usize) -> usize {
        match self.read {
            Read::Post => (i + 1) * self.writes,
            Read::Pre => i,
        }
    }

    /// Checks that the options do not contradict each other.
    ///
    /// # Errors
    /// [`AttnError::Value`] or [`AttnError::Unsupported`] naming the option.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("key_dim", self.key_dim),
            ("value_dim", self.value_dim),
            ("writes", self.writes),
            ("chunk_len", self.chunk_len),
        ];
        if let Some((name, _)) = positive.into_iter().find(|(_, x)| *x == 0) {
            return Err(AttnError::value(name, 0, "at least 1"));
        }
        if !self.scale.is_finite() {
            return Err(AttnError::value("scale", self.scale, "a finite number"));
        }
        let more = self.writes != 1 || self.erase != Erase::None || self.decay == Decay::Value;
        if self.read == Read::Pre && more {
            let what = "reading before the write with an erase, decays of values or several writes a token";
            return Err(AttnError::unsupported(self.name, what));
        }
        if self.norm && (self.erase != Erase::None || self.decay == Decay::Value || self.read == Read::Pre) {
            let what = "a norm with an erase, decays of values or reading before the write";
            return Err(AttnError::unsupported(self.name, what));
        }
        if self.erase != Erase::None && self.decay == Decay::Value {
            return Err(AttnError::unsupported(
                self.name,
                "a key-side erase with decays of the value channels",
            ));
        }
        Ok(())
    }

    /// FLOPs of the chunked form's products over `tokens` tokens of one head.
    pub fn flops(&self, tokens: usize) -> u64 {
        let (key, value) = (self.key_dim as u64, self.value_dim as u64);
        let (tokens, per) = (tokens as u64, self.writes as u64);
        let chunk = (self.chunk_len as u64).clamp(1, tokens.max(1));
        let pairs = |c: u64| c * per * (c * per + 1) / 2;
        let within = (tokens / chunk) * pairs(chunk) + pairs(tokens % chunk);
        let (state, triangles) = match self.erase {
            Erase::None => (1 + per, 1),
            Erase::Tied => (1 + 2 * per, 2),
            Erase::Untied => (1 + 3 * per, 4),
        };
        2 * (tokens * state * key * value + within * triangles * (key + value))
    }
}
