//! Masks and score mods written as text, for the command line and for files: `(i + j) % 2 == 0`,
//! `s * (1 + 0.1 h) - 0.05 |i - j|`.
//!
//! | | |
//! |---|---|
//! | the pair | `b` batch entry, `h` query head, `i` query row, `j` key row; in score mods also the score `s` |
//! | numbers | `3`, `0.5`, `1e-3`, `inf`; a condition is 1 where it holds, else 0: `true`, `false` |
//! | operators | `+ - * /`, `%` with the sign of its divisor, `2i` for `2 * i`, the size `|x|` |
//! | conditions | `< <= > >= == !=`, `and`, `or`, `not` |
//! | functions | `abs tanh exp ln sqrt floor min max`, `where(condition, a, b)` |
//!
//! Everything is computed in f64, with the slope in `s` beside it for the backward pass. A kernel walks the formula for
//! every pair: for speed, write a closure instead (see [`crate::FlashCall`]).

mod parse;
#[cfg(test)]
mod tests;

use attn_core::Result;
use attn_core::mask::{Mask, Pair};
use attn_core::score::ScoreMod;

/// A formula that has been read.
#[derive(Debug, Clone, PartialEq)]
enum Formula {
    Number(f64),
    Variable(Variable),
    Call(Function, Vec<Formula>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    Score,
    Batch,
    Head,
    Query,
    Key,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    Neg,
    Abs,
    Tanh,
    Exp,
    Ln,
    Sqrt,
    Floor,
    Min,
    Max,
    Where,
    Less,
    LessOrEqual,
    Equal,
    And,
    Or,
    Not,
}

/// A number and how fast it grows with the score.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Dual {
    value: f64,
    slope: f64,
}

impl Dual {
    fn constant(value: f64) -> Self {
        Self { value, slope: 0.0 }
    }

    fn holds(self) -> bool {
        self.value != 0.0
    }
}

impl Formula {
    fn speaks_of(&self, variable: Variable) -> bool {
        match self {
            Self::Number(_) => false,
            Self::Variable(own) => *own == variable,
            Self::Call(_, arguments) => arguments.iter().any(|argument| argument.speaks_of(variable)),
        }
    }

    fn at(&self, score: f64, at: Pair) -> Dual {
        let (function, arguments) = match self {
            Self::Number(number) => return Dual::constant(*number),
            Self::Variable(Variable::Score) => return Dual { value: score, slope: 1.0 },
            Self::Variable(Variable::Batch) => return Dual::constant(at.batch as f64),
            Self::Variable(Variable::Head) => return Dual::constant(at.head as f64),
            Self::Variable(Variable::Query) => return Dual::constant(at.i as f64),
            Self::Variable(Variable::Key) => return Dual::constant(at.j as f64),
            Self::Call(function, arguments) => (*function, arguments),
        };
        let argument = |index: usize| arguments[index].at(score, at);
        let a = argument(0);
        let b = || argument(1);
        let condition = |holds: bool| Dual::constant(f64::from(u8::from(holds)));
        match function {
            Function::Add => sum(a, b(), 1.0),
            Function::Sub => sum(a, b(), -1.0),
            Function::Mul => {
                let b = b();
                Dual { value: a.value * b.value, slope: a.slope * b.value + a.value * b.slope }
            }
            Function::Div => {
                let b = b();
                let value = a.value / b.value;
                Dual { value, slope: (a.slope - value * b.slope) / b.value }
            }
            Function::Rem => {
                let b = b();
                let times = (a.value / b.value).floor();
                Dual { value: a.value - times * b.value, slope: a.slope - times * b.slope }
            }
            Function::Neg => Dual { value: -a.value, slope: -a.slope },
            Function::Abs => Dual { value: a.value.abs(), slope: a.slope * a.value.signum() },
            Function::Tanh => {
                let tanh = a.value.tanh();
                Dual { value: tanh, slope: a.slope * (1.0 - tanh * tanh) }
            }
            Function::Exp => Dual { value: a.value.exp(), slope: a.slope * a.value.exp() },
            Function::Ln => Dual { value: a.value.ln(), slope: a.slope / a.value },
            Function::Sqrt => Dual { value: a.value.sqrt(), slope: a.slope / (2.0 * a.value.sqrt()) },
            Function::Floor => Dual::constant(a.value.floor()),
            Function::Min => Some(b()).filter(|b| b.value < a.value).unwrap_or(a),
            Function::Max => Some(b()).filter(|b| b.value > a.value).unwrap_or(a),
            Function::Where => argument(if a.holds() { 1 } else { 2 }),
            Function::Less => condition(a.value < b().value),
            Function::LessOrEqual => condition(a.value <= b().value),
            Function::Equal => condition(a.value == b().value),
            Function::And => condition(a.holds() && b().holds()),
            Function::Or => condition(a.holds() || b().holds()),
            Function::Not => condition(!a.holds()),
        }
    }
}

fn sum(a: Dual, b: Dual, sign: f64) -> Dual {
    Dual { value: a.value + sign * b.value, slope: a.slope + sign * b.slope }
}

/// A mask: the pairs for which a formula is not 0.
///
/// ```
/// use attn_core::mask::{Head, Mask};
/// use attn_flash::FormulaMask;
///
/// let mask = FormulaMask::new("mask_mod", "j <= i and (i - j) % 3 == 0")?;
/// let head = Head { batch: 0, head: 0 };
/// assert!(mask.sees(head.pair(7, 4)) && !mask.sees(head.pair(7, 5)) && !mask.sees(head.pair(4, 7)));
/// assert!(!mask.tells_heads_apart());
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct FormulaMask(Formula);

impl FormulaMask {
    /// Reads the formula: `j <= i and i - j < 40`, of batch entry `b`, query head `h`, query row `i` and key row `j`.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] naming the option, the place and what was expected there.
    pub fn new(option: &str, text: &str) -> Result<Self> {
        parse::formula(option, text, false).map(Self)
    }

    /// Whether it speaks of heads.
    pub fn tells_heads_apart(&self) -> bool {
        self.0.speaks_of(Variable::Head)
    }

    /// Whether it speaks of batch entries.
    pub fn tells_entries_apart(&self) -> bool {
        self.0.speaks_of(Variable::Batch)
    }
}

impl Mask for FormulaMask {
    fn sees(&self, at: Pair) -> bool {
        self.0.at(f64::NAN, at).holds()
    }
}

/// A score mod: a formula of the score and the pair.
///
/// ```
/// use attn_core::mask::Head;
/// use attn_core::score::ScoreMod;
/// use attn_flash::FormulaScore;
///
/// let faded = FormulaScore::new("score_mod", "s * (1 + 0.5 h) - |i - j|")?;
/// let at = Head { batch: 0, head: 1 }.pair(7, 4);
/// assert_eq!((faded.apply(2.0, at), faded.derivative(2.0, at)), (0.0, 1.5));
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct FormulaScore(Formula);

impl FormulaScore {
    /// Reads the formula: as in [`FormulaMask::new`], and of the score `s`.
    ///
    /// # Errors
    /// As [`FormulaMask::new`].
    pub fn new(option: &str, text: &str) -> Result<Self> {
        parse::formula(option, text, true).map(Self)
    }
}

impl ScoreMod for FormulaScore {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.apply_f64(f64::from(score), at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.0.at(score, at).value
    }

    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.derivative_f64(f64::from(score), at) as f32
    }

    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        self.0.at(score, at).slope
    }
}
