//! From text to a formula, by recursive descent.
//!
//! ```text
//! any        = all ("or" all)*
//! all        = comparison ("and" comparison)*
//! comparison = sum (("<" | "<=" | ">" | ">=" | "==" | "!=") sum)?
//! sum        = product (("+" | "-") product)*
//! product    = signed (("*" | "/" | "%") signed | atom)*          an atom right behind: times
//! signed     = ("-" | "not") signed | atom
//! atom       = number | name | name "(" any ("," any)* ")" | "(" any ")" | "|" any "|"
//! ```

use super::{Formula, Function, Variable};
use attn_core::{AttnError, Result};

/// Longest text, and deepest nesting, that is read: formulas are walked by recursion.
const LONGEST: usize = 4096;
const DEEPEST: usize = 64;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number(f64),
    Name(String),
    Sign(&'static str),
}

const SIGNS: [&str; 15] = ["<=", ">=", "==", "!=", "<", ">", "+", "-", "*", "/", "%", "(", ")", "|", ","];

const FUNCTIONS: [(&str, Function, usize); 9] = [
    ("abs", Function::Abs, 1),
    ("tanh", Function::Tanh, 1),
    ("exp", Function::Exp, 1),
    ("ln", Function::Ln, 1),
    ("sqrt", Function::Sqrt, 1),
    ("floor", Function::Floor, 1),
    ("min", Function::Min, 2),
    ("max", Function::Max, 2),
    ("where", Function::Where, 3),
];

/// Reads a formula; `scores` says whether it may speak of the score `s`.
pub(super) fn formula(option: &str, text: &str, scores: bool) -> Result<Formula> {
    let wrong = |(at, expected): Wrong| {
        let place = if at >= text.len() { "its end".into() } else { format!("`{}`", &text[at..]) };
        AttnError::value(format!("option `{option}`"), format!("`{text}`"), format!("{expected} at {place}"))
    };
    if text.len() > LONGEST {
        let found = format!("{} bytes long", text.len());
        return Err(AttnError::value(format!("option `{option}`"), found, format!("at most {LONGEST}")));
    }
    let tokens = tokens(text).map_err(wrong)?;
    let mut parser = Parser { tokens: &tokens, end: text.len(), scores, depth: 0, inside_size: false };
    let formula = parser.any().map_err(wrong)?;
    match parser.tokens.first() {
        None => Ok(formula),
        Some((at, _)) => Err(wrong((*at, "an operator".into()))),
    }
}

/// Where something else was expected, and what.
type Wrong = (usize, String);
type Parsed = std::result::Result<Formula, Wrong>;

fn tokens(text: &str) -> std::result::Result<Vec<(usize, Token)>, Wrong> {
    let (mut tokens, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let rest = &text[at..];
        let first = rest.chars().next().unwrap_or(' ');
        let length = if first.is_whitespace() {
            first.len_utf8()
        } else if first.is_ascii_digit() || first == '.' {
            let length = number_length(rest);
            let number = rest[..length].parse().map_err(|_| (at, "a number".to_string()))?;
            tokens.push((at, Token::Number(number)));
            length
        } else if first.is_ascii_alphabetic() {
            let length = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push((at, Token::Name(rest[..length].to_string())));
            length
        } else {
            let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign));
            let sign = sign.ok_or_else(|| (at, "a number, a name or an operator".to_string()))?;
            tokens.push((at, Token::Sign(sign)));
            sign.len()
        };
        at += length;
    }
    Ok(tokens)
}

/// Digits, a point, and an exponent if digits follow its `e`: `2e` is 2 and a name.
fn number_length(text: &str) -> usize {
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let mut length = digits(text);
    if text[length..].starts_with('.') {
        length += 1 + digits(&text[length + 1..]);
    }
    if let Some(exponent) = text[length..].strip_prefix(['e', 'E']) {
        let unsigned = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        if digits(unsigned) > 0 {
            length += 1 + (exponent.len() - unsigned.len()) + digits(unsigned);
        }
    }
    length
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    end: usize,
    scores: bool,
    depth: usize,
    /// Between two `|`: the next one closes.
    inside_size: bool,
}

fn call(function: Function, arguments: impl Into<Vec<Formula>>) -> Formula {
    Formula::Call(function, arguments.into())
}

impl Parser<'_> {
    fn place(&self) -> usize {
        self.tokens.first().map_or(self.end, |(at, _)| *at)
    }

    fn next_is(&self, word: &str) -> bool {
        match self.tokens.first() {
            Some((_, Token::Sign(sign))) => *sign == word,
            Some((_, Token::Name(name))) => name == word,
            _ => false,
        }
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.next_is(word);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn expect(&mut self, word: &str) -> std::result::Result<(), Wrong> {
        if self.take(word) { Ok(()) } else { Err((self.place(), format!("`{word}`"))) }
    }

    fn any(&mut self) -> Parsed {
        let mut a = self.all()?;
        while self.take("or") {
            a = call(Function::Or, [a, self.all()?]);
        }
        Ok(a)
    }

    fn all(&mut self) -> Parsed {
        let mut a = self.comparison()?;
        while self.take("and") {
            a = call(Function::And, [a, self.comparison()?]);
        }
        Ok(a)
    }

    fn comparison(&mut self) -> Parsed {
        let a = self.sum()?;
        let signs = ["<=", ">=", "==", "!=", "<", ">"];
        let Some(sign) = signs.into_iter().find(|sign| self.take(sign)) else { return Ok(a) };
        let b = self.sum()?;
        Ok(match sign {
            "<=" => call(Function::LessOrEqual, [a, b]),
            ">=" => call(Function::LessOrEqual, [b, a]),
            "<" => call(Function::Less, [a, b]),
            ">" => call(Function::Less, [b, a]),
            "==" => call(Function::Equal, [a, b]),
            _ => call(Function::Not, [call(Function::Equal, [a, b])]),
        })
    }

    fn sum(&mut self) -> Parsed {
        let mut a = self.product()?;
        loop {
            let function = match () {
                () if self.take("+") => Function::Add,
                () if self.take("-") => Function::Sub,
                () => return Ok(a),
            };
            a = call(function, [a, self.product()?]);
        }
    }

    fn product(&mut self) -> Parsed {
        let mut a = self.signed()?;
        loop {
            let function = match () {
                () if self.take("*") => Function::Mul,
                () if self.take("/") => Function::Div,
                () if self.take("%") => Function::Rem,
                () if self.atom_follows() => Function::Mul,
                () => return Ok(a),
            };
            a = call(function, [a, self.signed()?]);
        }
    }

    fn atom_follows(&self) -> bool {
        match self.tokens.first() {
            Some((_, Token::Number(_))) => true,
            Some((_, Token::Name(name))) => !["and", "or", "not"].contains(&name.as_str()),
            Some((_, Token::Sign(sign))) => *sign == "(" || (*sign == "|" && !self.inside_size),
            None => false,
        }
    }

    fn signed(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err((self.place(), format!("at most {DEEPEST} levels")));
        }
        let formula = match () {
            () if self.take("-") => call(Function::Neg, [self.signed()?]),
            () if self.take("not") => call(Function::Not, [self.signed()?]),
            () => self.atom()?,
        };
        self.depth -= 1;
        Ok(formula)
    }

    fn atom(&mut self) -> Parsed {
        if self.take("(") {
            return self.within(false, ")");
        }
        if !self.inside_size && self.take("|") {
            return Ok(call(Function::Abs, [self.within(true, "|")?]));
        }
        let at = self.place();
        let expected = || (at, "a number, a name or `(`".to_string());
        let Some(((_, token), rest)) = self.tokens.split_first() else { return Err(expected()) };
        self.tokens = rest;
        match token {
            Token::Number(number) => Ok(Formula::Number(*number)),
            Token::Name(name) => self.named(name, at),
            Token::Sign(_) => Err(expected()),
        }
    }

    /// What stands before `closing`.
    fn within(&mut self, size: bool, closing: &str) -> Parsed {
        let outside = std::mem::replace(&mut self.inside_size, size);
        let formula = self.any()?;
        self.expect(closing)?;
        self.inside_size = outside;
        Ok(formula)
    }

    fn named(&mut self, name: &str, at: usize) -> Parsed {
        if let Some((_, function, arity)) = FUNCTIONS.iter().find(|(known, ..)| *known == name) {
            self.expect("(")?;
            let mut arguments = Vec::with_capacity(*arity);
            for left in (0..*arity).rev() {
                arguments.push(self.within(false, if left == 0 { ")" } else { "," })?);
            }
            return Ok(Formula::Call(*function, arguments));
        }
        match name {
            "s" if self.scores => Ok(Formula::Variable(Variable::Score)),
            "b" => Ok(Formula::Variable(Variable::Batch)),
            "h" => Ok(Formula::Variable(Variable::Head)),
            "i" => Ok(Formula::Variable(Variable::Query)),
            "j" => Ok(Formula::Variable(Variable::Key)),
            "inf" => Ok(Formula::Number(f64::INFINITY)),
            "true" => Ok(Formula::Number(1.0)),
            "false" => Ok(Formula::Number(0.0)),
            _ => {
                let score = if self.scores { "s, " } else { "" };
                Err((at, format!("{score}b, h, i, j, inf, true, false or a function")))
            }
        }
    }
}
