//! The tables that a sweep ends with on the terminal.

use super::cells::{self, Table};
use super::units;
use crate::sweep::Finished;
use crate::sweep::summary::summarise;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, ContentArrangement};

/// All tables, with what has to be said about them.
pub fn text(finished: &Finished) -> String {
    let env = &finished.environment;
    let mut parts = vec![
        format!(
            "{}; {}, {} thread(s), peak {} GFLOP/s",
            env.source,
            env.machine.cpu,
            env.limits.threads,
            units::three(env.limits.fma_gflops)
        ),
        draw(&cells::points(&finished.rows)),
    ];
    if let Some(gate) = &finished.gate {
        parts.push(format!("quality gate of the language model: {}", gate.verdict().1));
        parts.push(draw(&cells::gate(gate)));
    }
    parts.push(draw(&cells::summaries(&summarise(&finished.rows), &finished.rows)));
    parts.extend(remarks(finished));
    parts.join("\n")
}

/// What a reader should know before believing the figures.
pub fn remarks(finished: &Finished) -> Vec<String> {
    let env = &finished.environment;
    let mut remarks = env.left_out.clone();
    if finished.known > 0 {
        remarks.push(format!("{} of {} points were known from before", finished.known, finished.rows.len()));
    }
    if let Some(drift) = env.drift() {
        remarks.push(format!(
            "the machine's peak differed by {:.0} % before and after: something else ran; times are less sure",
            100.0 * drift
        ));
    }
    if !env.machine.optimised {
        remarks.push("this is a debug build; times mean little: use --release".into());
    }
    remarks
}

fn draw(table: &Table) -> String {
    let mut drawn = comfy_table::Table::new();
    drawn.load_preset(UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    drawn.set_header(&table.header).add_rows(&table.rows);
    // The third column is left alone: it also holds the reasons of points that were not run.
    for column in drawn.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    drawn.to_string()
}
