//! `attn list`: the registries as a table.

use crate::{Result, output, registry};
use attn_core::registry::{Entry, OptionSpec, Options};
use attn_core::{Family, Profile};
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use std::process::ExitCode;

/// Lists the variants and their options.
#[derive(Debug, Args)]
pub struct List {
    /// Only this family: exact, sparse, linear, hier or classic
    #[arg(long)]
    pub family: Option<Family>,
    /// One JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// A variant as JSON.
#[derive(Debug, serde::Serialize)]
struct Listed {
    name: &'static str,
    family: Family,
    summary: &'static str,
    options: &'static [OptionSpec],
    /// Of the variant with default options.
    profile: Profile,
}

impl Listed {
    fn of(entry: &Entry) -> Result<Self> {
        let profile = entry.build(&Options::new())?.profile();
        let Entry { name, family, summary, options, .. } = *entry;
        Ok(Self { name, family, summary, options, profile })
    }
}

impl List {
    /// Prints the table or the array.
    ///
    /// # Errors
    /// A variant whose defaults do not build, or an output that cannot be written.
    pub fn run(&self) -> Result<ExitCode> {
        let entries = registry::all();
        let wanted = entries.iter().filter(|entry| self.family.is_none_or(|family| entry.family == family));
        let listed: Vec<Listed> = wanted.map(Listed::of).collect::<Result<_>>()?;
        if self.json {
            output::print_json(&listed)?;
        } else {
            output::print(&table(&listed).to_string())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn table(listed: &[Listed]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["variant", "family", "what", "options (default)"]);
    for variant in listed {
        let option = |o: &OptionSpec| match o.default {
            "" => format!("{}: {}", o.name, o.help),
            default => format!("{} ({default}): {}", o.name, o.help),
        };
        let options: Vec<String> = variant.options.iter().map(option).collect();
        let family = variant.family.to_string();
        table.add_row([variant.name, &family, variant.summary, &options.join("\n")]);
    }
    table
}
