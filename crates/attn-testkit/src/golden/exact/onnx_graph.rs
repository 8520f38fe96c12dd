//! Graphs in ONNX text that map scores to scores, or indices to visibility, as formulas that `flash` reads.
//!
//! ```text
//! name (float[B,H,L,S] scores) => (float[B,H,L,S] scores_out)
//!    <float bias = {0.5}>
//! { scores_out = Add (scores, bias) }
//! ```
//!
//! The graph works on whole tensors; as all its operators are elementwise but for those that make index tensors (`Shape`,
//! `Gather`, `Range`, `Reshape`), each value is a formula of one pair. A graph may instead take scalars: the score, then
//! `b, h, i, j`.

use std::collections::BTreeMap;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    /// An elementwise tensor.
    Formula(String),
    Numbers(Vec<f64>),
    /// The lengths of the score tensor.
    Shape,
    /// The length of one of its axes.
    Length(usize),
    /// `0, 1, ...` along one of its axes, not yet placed there.
    Range(usize),
}

const AXES: [&str; 4] = ["b", "h", "i", "j"];

/// The formula of the graph's output.
///
/// # Errors
/// What in the text is not understood.
pub(super) fn formula(text: &str) -> Result<String, String> {
    let (head, body) = text.split_once('{').ok_or("a graph without a body")?;
    let (head, body) = match head.rfind('<') {
        // Initialisers hold braces of their own: the body comes behind their closing `>`.
        Some(_) => {
            let (head, rest) = text.split_once('<').ok_or("a graph without a body")?;
            let (initialisers, body) = rest.split_once('>').ok_or("initialisers without an end")?;
            let head = format!("{head}<{initialisers}");
            (head, body.split_once('{').ok_or("a graph without a body")?.1)
        }
        None => (head.to_string(), body),
    };
    let (signature, initialisers) = head.split_once('<').unwrap_or((&head, ""));
    let (inputs, outputs) = signature.split_once("=>").ok_or("a graph without outputs")?;
    let mut values = BTreeMap::new();
    read_inputs(inputs, &mut values)?;
    read_initialisers(initialisers, &mut values)?;
    for line in body.lines().map(str::trim).filter(|line| line.contains('=')) {
        let (name, value) = node(line, &values)?;
        values.insert(name, value);
    }
    let output = parameters(outputs).pop().ok_or("a graph without outputs")?;
    match values.get(&output) {
        Some(value) => elementwise(value).ok_or_else(|| format!("`{output}` is not elementwise")),
        None => Err(format!("nothing computes `{output}`")),
    }
}

/// Names in `(type[B,H] name, type name)`.
fn parameters(text: &str) -> Vec<String> {
    let inside =
        text.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("", |(inside, _)| inside);
    let mut depth = 0;
    let split = inside.split(|c: char| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        c == ',' && depth == 0
    });
    split.filter_map(|one| one.split_whitespace().last().map(str::to_string)).collect()
}

fn read_inputs(text: &str, values: &mut BTreeMap<String, Value>) -> Result<(), String> {
    let names = parameters(text);
    let stand_for: &[&str] = match names.len() {
        1 => &["s"],
        4 => &AXES,
        5 => &["s", "b", "h", "i", "j"],
        n => return Err(format!("a graph of {n} inputs, expected the score, or it and b, h, i, j")),
    };
    let formulas = stand_for.iter().map(|name| Value::Formula((*name).to_string()));
    values.extend(names.into_iter().zip(formulas));
    Ok(())
}

/// `int64[4] q_shape = {1,1,-1,1}, float neg_inf = {-inf}`.
fn read_initialisers(text: &str, values: &mut BTreeMap<String, Value>) -> Result<(), String> {
    for one in text.split('}') {
        let Some((declared, numbers)) = one.split_once('{') else { continue };
        let name = declared.trim_end().trim_end_matches('=').split_whitespace().last().unwrap_or("");
        values.insert(name.to_string(), Value::Numbers(read_numbers(numbers)?));
    }
    Ok(())
}

fn read_numbers(text: &str) -> Result<Vec<f64>, String> {
    let number = |text: &str| text.trim().parse().map_err(|_| format!("`{text}` is no number"));
    text.split(',').map(number).collect()
}

/// `name = Operator <attributes> (arguments)`.
fn node(line: &str, values: &BTreeMap<String, Value>) -> Result<(String, Value), String> {
    let unclear = || format!("`{line}` is not understood");
    let (name, call) = line.split_once('=').ok_or_else(unclear)?;
    let (before, arguments) = call.rsplit_once('(').ok_or_else(unclear)?;
    let (operator, attributes) = before.split_once('<').unwrap_or((before, ""));
    let arguments = arguments.trim_end().trim_end_matches(')').split(',').map(str::trim);
    let find =
        |name: &str| values.get(name).cloned().ok_or_else(|| format!("`{line}`: no `{name}` before it"));
    let arguments: Vec<Value> =
        arguments.filter(|name| !name.is_empty()).map(find).collect::<Result<_, _>>()?;
    let value = match (operator.trim(), arguments.as_slice()) {
        ("Shape", [Value::Formula(_)]) => Value::Shape,
        ("Gather", [Value::Shape, Value::Numbers(at)]) if at.len() == 1 && at[0] >= 0.0 && at[0] < 4.0 => {
            Value::Length(at[0] as usize)
        }
        ("Range", [Value::Numbers(first), Value::Length(axis), Value::Numbers(step)])
            if *first == [0.0] && *step == [1.0] =>
        {
            Value::Range(*axis)
        }
        ("Reshape", [Value::Range(axis), Value::Numbers(shape)])
            if shape.len() <= 4
                && shape.iter().position(|n| *n == -1.0) == (*axis + shape.len()).checked_sub(4)
                && shape.iter().all(|n| *n == 1.0 || *n == -1.0) =>
        {
            Value::Formula(AXES[*axis].to_string())
        }
        ("Cast" | "Identity", [value]) => value.clone(),
        ("Constant", []) => {
            let number = attributes.rsplit_once('=').map_or("", |(_, number)| number);
            Value::Numbers(read_numbers(number.trim_matches(|c: char| "{}> ".contains(c)))?)
        }
        (operator, arguments) => {
            let formulas: Option<Vec<String>> = arguments.iter().map(elementwise).collect();
            let formula = formulas.and_then(|arguments| applied(operator, &arguments)).ok_or_else(unclear)?;
            Value::Formula(formula)
        }
    };
    Ok((name.trim().to_string(), value))
}

fn elementwise(value: &Value) -> Option<String> {
    match value {
        Value::Formula(formula) => Some(formula.clone()),
        Value::Numbers(numbers) if numbers.len() == 1 => Some(format!("({})", numbers[0])),
        _ => None,
    }
}

fn applied(operator: &str, arguments: &[String]) -> Option<String> {
    let infix = |sign: &str| match arguments {
        [a, b] => Some(format!("({a} {sign} {b})")),
        _ => None,
    };
    let called = |function: &str, arity: usize| {
        (arguments.len() == arity).then(|| format!("{function}({})", arguments.join(", ")))
    };
    match operator {
        "Add" => infix("+"),
        "Sub" => infix("-"),
        "Mul" => infix("*"),
        "Div" => infix("/"),
        "Mod" => infix("%"),
        "Less" => infix("<"),
        "LessOrEqual" => infix("<="),
        "Greater" => infix(">"),
        "GreaterOrEqual" => infix(">="),
        "Equal" => infix("=="),
        "And" => infix("and"),
        "Or" => infix("or"),
        "Not" => called("not ", 1).map(|negated| format!("({negated})")),
        "Neg" => called("-", 1).map(|negated| format!("({negated})")),
        "Abs" => called("abs", 1),
        "Tanh" => called("tanh", 1),
        "Exp" => called("exp", 1),
        "Log" => called("ln", 1),
        "Sqrt" => called("sqrt", 1),
        "Floor" => called("floor", 1),
        "Min" => called("min", 2),
        "Max" => called("max", 2),
        "Where" => called("where", 3),
        _ => None,
    }
}
