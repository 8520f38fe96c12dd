use super::*;

const AT: Pair = Pair { batch: 1, head: 2, i: 5, j: 9 };

#[track_caller]
fn assert_value(text: &str, want: f64) {
    let got = FormulaScore::new("score_mod", text).unwrap().apply_f64(0.75, AT);
    assert!((got - want).abs() < 1e-12 || got == want, "{text}: {got}, wanted {want}");
}

#[test]
fn formulas_mean_what_they_say() {
    for (text, want) in [
        ("s", 0.75),
        ("b + 10h + 100i + 1000j", 9521.0),
        ("2 - 3 - 4", -5.0),
        ("2 + 3 * 4 - 1", 13.0),
        ("-2 i", -10.0),
        ("12 / 3 / 2", 2.0),
        ("(i - j) % 3", 2.0), // the sign of its divisor, as in Python
        ("s*(1+0.1h) - 0.05|i-j|", 0.75 * 1.2 - 0.2),
        ("0.5|2 - (3 + |j|)|", 5.0),
        ("1e-3 + 2.5e+2", 250.001),
        ("2exp(0)", 2.0),
        ("tanh(s / 30) * 30", 30.0 * (0.75f64 / 30.0).tanh()),
        ("sqrt(4) + ln(1) + floor(2.7) + min(3, 2) + max(3, 2)", 9.0),
        ("where(j <= i, s, -inf)", f64::NEG_INFINITY),
        ("where(j > i, s, -inf)", 0.75),
        ("i < j and j < 9 or i == 5", 1.0),
        ("i < j and (j < 9 or i != 5)", 0.0),
        ("not i < j or true", 1.0),
    ] {
        assert_value(text, want);
    }
}

#[test]
fn masks_are_conditions() {
    let dilated = FormulaMask::new("mask_mod", "j<=i and (i-j)%3==0").unwrap();
    let seen: Vec<usize> = (0..9).filter(|&j| dilated.sees(Pair { i: 7, j, ..AT })).collect();
    assert_eq!(seen, [1, 4, 7]);
}

#[test]
fn slopes_are_those_of_differences() {
    for text in [
        "s",
        "s*(1+0.1h) - 0.05|i-j|",
        "3 tanh(s / 3)",
        "s * s / (2 + s) - exp(-s)",
        "where(j > i, 2s, s)",
        "ln(s) + sqrt(s) + |0 - s| + s % 0.3 + (2 + s) % (s + 1)",
        "min(s, 2s) + max(s, 2s) + floor(s) * s + not s",
        "(s < 1) * s - -s",
    ] {
        let formula = FormulaScore::new("score_mod", text).unwrap();
        for score in [0.4f64, 0.75, 2.5] {
            let at = |step: f64| formula.apply_f64(score + step, AT);
            let want = (at(1e-6) - at(-1e-6)) / 2e-6;
            let got = formula.derivative_f64(score, AT);
            assert!(
                (got - want).abs() < 1e-7 * (1.0 + want.abs()),
                "{text} at {score}: {got}, wanted {want}"
            );
        }
    }
}

#[test]
fn what_is_no_formula_is_refused_with_its_place() {
    for (text, said) in [
        ("", "at its end"),
        ("i +", "at its end"),
        ("(i", "`)` at its end"),
        ("i ) j", "an operator at `) j`"),
        ("|i - j", "`|` at its end"),
        ("i ? j", "at `? j`"),
        ("abs i", "`(` at `i`"),
        ("max(i)", "`,` at `)`"),
        ("weight", "a function at `weight`"),
        ("s", "at `s`"), // no score in a mask
        ("1.2.3 +", "at its end"),
        ("...", "a number at `...`"),
        ("i j é", "at `é`"),
    ] {
        let error = FormulaMask::new("mask_mod", text).unwrap_err().to_string();
        assert!(error.contains("option `mask_mod`") && error.contains(said), "{text}: {error}");
    }
    for deep in ["(".repeat(3000), "-".repeat(3000) + "i"] {
        assert!(FormulaMask::new("mask_mod", &deep).unwrap_err().to_string().contains("64 levels"));
    }
    let long = FormulaMask::new("mask_mod", &"i".repeat(5000)).unwrap_err().to_string();
    assert!(long.contains("5000 bytes"), "{long}");
    assert!(FormulaMask::new("mask_mod", &"i+".repeat(2000)).is_err());
    assert!(FormulaMask::new("mask_mod", &("1+".repeat(2000) + "1")).unwrap().sees(AT));
}
