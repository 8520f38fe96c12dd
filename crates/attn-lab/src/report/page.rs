//! `report.html`: one page that needs nothing else, readable in light and dark.

use super::axis::Quantity;
use super::cells::{self, Table};
use super::pareto::{self, Contender};
use super::plot::{self, Curve, Value};
use super::{terminal, units};
use crate::sweep::Finished;
use crate::sweep::case::{Measurement, Row};
use crate::sweep::summary::{lengths, summarise, variants};
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The whole page.
pub fn html(finished: &Finished) -> String {
    let rows = &finished.rows;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "attn sweep" }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                (head(finished))
                h2 { "Variants" }
                p class="faint" {
                    "Growth is the exponent of time over the largest lengths, by least squares in logarithms, with its \
                     95 % interval. “Faster than flash” is the length where the measured curves cross, interpolated \
                     between measured lengths and never beyond them."
                }
                (table(&cells::summaries(&summarise(rows), rows), rows, 0))
                (gate(finished))
                h2 { "Over the length" }
                div class="grid2" { (pictures(rows)) }
                h2 { "Time against error" }
                p class="faint" {
                    "One picture a length, both axes logarithmic. To the lower left is better; the dashed line joins \
                     the variants that no other beats in both."
                }
                div class="grid3" { @for n in lengths(rows) { (contest(rows, n)) } }
                h2 { "All points" }
                (table(&cells::points(rows), rows, 1))
                (method(finished))
                (environment(finished))
            }
        }
    };
    page.into_string()
}

fn head(finished: &Finished) -> Markup {
    let env = &finished.environment;
    let case = finished.rows.first().map(|row| &row.case);
    html! {
        h1 { "Attention variants, measured" }
        @if let Some(c) = case {
            p {
                "q, k, v: " strong { (c.source) } ", " (c.input) ". "
                (c.n_heads_q) " heads" @if c.n_heads_kv != c.n_heads_q { " (" (c.n_heads_kv) " for keys and values)" }
                " of width " (c.head_dim) @if c.batch != 1 { ", batch " (c.batch) } ", " (c.dtype) ", "
                @if c.causal { "causal" } @else { "bidirectional" } "."
            }
        }
        p class="faint" {
            (env.machine.cpu) ", " (env.limits.threads) " thread(s), " (env.limits.isa) "; multiply-add peak "
            (units::three(env.limits.fma_gflops)) " GFLOP/s, memory " (units::three(env.limits.memory_read_gb_s))
            " GB/s."
        }
        @for remark in terminal::remarks(finished) { p class="faint" { (remark) "." } }
    }
}

fn gate(finished: &Finished) -> Markup {
    let Some(gate) = &finished.gate else { return html! {} };
    let (holds, verdict) = gate.verdict();
    html! {
        h2 { "Are these inputs worth comparing on?" }
        p { span class=(if holds { "good" } else { "bad" }) { (verdict) } "." }
        p class="faint" {
            "Losses of the language model in nats a byte, the same bytes predicted at every length: with exact attention \
             in its global layer, with zeros in its place, and with as few keys as its window layers see. The exact loss \
             must not rise with the length, and removing the layer must cost loss; else the layer's q, k, v say little \
             about attention."
        }
        (table(&cells::gate(gate), &[], usize::MAX))
    }
}

/// A table; the cells of column `named` take their variant's colour.
fn table(table: &Table, rows: &[Row], named: usize) -> Markup {
    let variants = variants(rows);
    html! {
        div class="scroll" {
            table {
                thead { tr { @for name in &table.header { th { (name) } } } }
                tbody {
                    @for cells in &table.rows {
                        @let filled = cells.iter().rposition(|cell| !cell.is_empty()).map_or(0, |last| last + 1);
                        @let rest = cells.len() - filled;
                        tr class=[(named == 1 && !cells[0].is_empty()).then_some("group")] {
                            @for (i, cell) in cells[..filled].iter().enumerate() {
                                @let place = variants.iter().position(|v| i == named && v == cell);
                                @if let Some(place) = place {
                                    td class={ "variant " (plot::style(place)) } { (cell) }
                                } @else if rest > 0 && i + 1 == filled {
                                    td class="reason" colspan=(rest + 1) { (cell) }
                                } @else {
                                    td { (cell) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn pictures(rows: &[Row]) -> Markup {
    let time = |m: &Measurement| Some((m.seconds.median, Some((m.seconds.p20, m.seconds.p80))));
    let error = |m: &Measurement| Some((m.error.rel_l2, Some((m.error.rel_l2_low, m.error.rel_l2_high))));
    let extra = |m: &Measurement| Some((m.extra_bytes? as f64, None));
    let resident = |m: &Measurement| Some((m.peak_rss_bytes? as f64, None));
    let bytes = |x: f64| units::bytes(x as u64);
    html! {
        (picture("Time", "median of the runs; whiskers: 20th to 80th percentile", Quantity::Seconds,
            &curves(rows, time, units::time)))
        (picture("Error", "relative L2 against exact attention; whiskers: 95 % interval of the sample; ↑ is above 10", Quantity::Error,
            &curves(rows, error, units::error)))
        (picture("Extra memory", "allocated beyond q, k, v and output, at the moment of most", Quantity::Bytes,
            &curves(rows, extra, bytes)))
        (picture("Peak resident memory", "of the point's own process: program, inputs, output and extra",
            Quantity::Bytes, &curves(rows, resident, bytes)))
    }
}

fn picture(title: &str, note: &str, quantity: Quantity, curves: &[Curve]) -> Markup {
    html! {
        figure {
            figcaption { (title) " " span { "- " (note) } }
            @if curves.iter().any(|curve| !curve.values.is_empty()) {
                (plot::curves(curves, quantity))
            } @else {
                p class="faint" { "nothing was measured" }
            }
        }
    }
}

/// A value and its interval.
type Figure = Option<(f64, Option<(f64, f64)>)>;

fn curves(rows: &[Row], pick: impl Fn(&Measurement) -> Figure, show: impl Fn(f64) -> String) -> Vec<Curve> {
    let curve = |(style, variant): (usize, &str)| {
        let own = rows.iter().filter(|row| row.case.variant == variant);
        let value = |row: &Row| {
            let (y, interval) = pick(row.measured()?)?;
            let text = format!("{} at n = {}", show(y), units::length(row.case.n));
            Some(Value { x: row.case.n as f64, y, interval, text })
        };
        let mut values: Vec<Value> = own.filter_map(value).collect();
        values.sort_by(|a, b| a.x.total_cmp(&b.x));
        Curve { name: variant.into(), style, values }
    };
    variants(rows).into_iter().enumerate().map(curve).collect()
}

fn contest(rows: &[Row], n: usize) -> Markup {
    let variants = variants(rows);
    let contender = |row: &Row| {
        let m = row.measured().filter(|_| row.case.n == n)?;
        let name = row.case.variant.clone();
        let text =
            format!("{name}: {}, error {}", units::time(m.seconds.median), units::error(m.error.rel_l2));
        Some(Contender {
            style: variants.iter().position(|v| *v == name).unwrap_or(0),
            seconds: m.seconds.median,
            error: m.error.rel_l2,
            name,
            text,
        })
    };
    let contenders: Vec<Contender> = rows.iter().filter_map(contender).collect();
    html! {
        @if !contenders.is_empty() {
            figure {
                figcaption { "n = " (units::length(n)) }
                (pareto::panel(&contenders))
            }
        }
    }
}

fn method(finished: &Finished) -> Markup {
    let env = &finished.environment;
    let rows = finished.rows.first().map_or(0, |row| row.case.rows);
    html! {
        h2 { "How this was measured" }
        p {
            "Each point runs in its own process. All variants of a length are loaded and warmed up with one call; then \
             rounds go over them, one timed call each, until a point has five runs and 0.3 s, or 2 s. Times are of the \
             forward call alone. GFLOP/s count the floating-point operations of each variant's own algorithm, as its cost \
             model states them; the share is of the multiply-add peak measured in the same session on as many threads."
        }
        p {
            "Errors compare " (rows) " query rows (or all, if there are fewer), drawn from equal stretches of positions \
             and all heads, with softmax attention in f64 over all keys they see, on the same stored numbers. Relative \
             L2 is √(Σ|got − exact|² / Σ|exact|²), its 95 % interval that of the stratified ratio estimator. The cosine \
             is that of each row with its exact row."
        }
        p {
            "A point whose predicted time is over " (units::long_time(env.point_budget_seconds))
            ", or over what is left of " (units::long_time(env.budget_seconds))
            " for the sweep, or whose memory does not fit, is not run; nothing is extrapolated. Predictions use the rate \
             that the variant reached at the length before, or the machine's peak if there is none."
        }
    }
}

fn environment(finished: &Finished) -> Markup {
    let env = &finished.environment;
    let m = &env.machine;
    let optional =
        |x: Option<f64>, unit: &str| x.map_or("-".into(), |x| format!("{} {unit}", units::three(x)));
    let mut lines = vec![
        ("command", env.command.join(" ")),
        ("CPU", m.cpu.clone()),
        ("features", m.features.join(" ")),
        ("cores, threads", format!("{}, {}", m.cores.map_or("?".into(), |c| c.to_string()), m.threads)),
        ("memory", units::bytes(m.memory_bytes)),
        ("system", m.os.clone()),
        ("compiler", format!("{} for {}", m.rustc, m.target)),
        ("program", format!("attn {}{}", m.version, if m.optimised { "" } else { " (debug build)" })),
        ("threads of this sweep", format!("{}, {}", env.limits.threads, env.limits.isa)),
        ("multiply-add peak, f32", format!("{} GFLOP/s", units::three(env.limits.fma_gflops))),
        ("the same afterwards", optional(env.fma_gflops_after, "GFLOP/s")),
        ("dot product peak, bf16", optional(env.limits.bf16_gflops, "GFLOP/s")),
        (
            "reads from cache, memory",
            format!(
                "{}, {} GB/s",
                units::three(env.limits.cache_read_gb_s),
                units::three(env.limits.memory_read_gb_s)
            ),
        ),
        ("seed", env.seed.to_string()),
        ("took", env.took_seconds.map_or("-".into(), units::long_time)),
    ];
    let mut seen = Vec::new();
    for row in &finished.rows {
        let options: Vec<String> = row.case.options.0.iter().map(|(k, v)| format!("{k}={v}")).collect();
        if !seen.contains(&&row.case.variant) {
            seen.push(&row.case.variant);
            lines.push(("options", format!("{}: {}", row.case.variant, options.join(" "))));
        }
    }
    html! {
        h2 { "Environment" }
        div class="scroll" {
            table { tbody { @for (name, value) in lines { tr { td class="faint" { (name) } td class="wide" { (value) } } } } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::page;
    use crate::machine::Machine;
    use crate::sweep::Finished;
    use crate::sweep::case::examples::{not_run, row};
    use crate::sweep::environment::Environment;
    use crate::sweep::gate::Gate;
    use crate::sweep::plan::Budget;
    use attn_core::limits::Limits;
    use attn_core::simd::Isa;
    use std::time::Duration;

    fn finished() -> Finished {
        let limits = Limits {
            threads: 2,
            isa: Isa::Portable,
            fma_gflops: 100.0,
            fma_is_estimate: false,
            bf16_gflops: None,
            cache_read_gb_s: 50.0,
            memory_read_gb_s: 10.0,
        };
        let budget = Budget { total: Duration::from_secs(150), point: Duration::from_secs(15) };
        let mut rows = Vec::new();
        for n in [1024, 2048, 4096] {
            rows.push(row("flash", n, 1e-9 * (n * n) as f64, 1e-7));
            rows.push(row("<b>odd & name", n, 1e-7 * n as f64, 0.0));
            rows.push(not_run("naive", n));
        }
        Finished {
            rows,
            gate: Some(Gate { key: String::new(), rows: Vec::new(), missing: vec![1024] }),
            environment: Environment::new(Machine::detect(), limits, "x < y".into(), 0, &budget),
            known: 0,
        }
    }

    /// Every element is closed in order.
    fn check_nesting(page: &str) {
        let mut open = Vec::new();
        let mut rest = page;
        while let Some(at) = rest.find('<') {
            rest = &rest[at..];
            let end = rest.find('>').expect("an unfinished tag");
            let tag = &rest[1..end];
            let name = tag.trim_start_matches('/').split_whitespace().next().unwrap_or("");
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "closing {name}");
            } else if !tag.starts_with('!') && name != "meta" {
                open.push(name);
            }
            rest = &rest[end..];
        }
        assert!(open.is_empty(), "left open: {open:?}");
    }

    #[test]
    fn the_page_is_well_formed_and_stands_alone() {
        let page = page::html(&finished());
        check_nesting(&page);
        assert!(!page.contains("<b>odd") && page.contains("&lt;b&gt;odd &amp; name"));
        for outside in ["http://", "https://", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("not run (predicted 41 min)") && page.contains("prefers-color-scheme: dark"));
        assert!(!page.contains("NaN") && !page.contains("inf,"));
        assert_eq!(
            page.matches("<svg").count(),
            4 + 3,
            "four pictures over the length, one contest a length"
        );
    }

    #[test]
    fn a_sweep_without_measurements_still_has_a_page() {
        let mut finished = finished();
        finished.rows.retain(|row| row.measured().is_none());
        check_nesting(&page::html(&finished));
        finished.rows.clear();
        check_nesting(&page::html(&finished));
    }
}
