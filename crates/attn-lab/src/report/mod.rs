//! What a sweep shows: tables on the terminal ([`terminal`]) and one self-contained page with plots ([`page`]).
//!
//! Both read the same cells ([`cells`]) in the same units ([`units`]). The plots are SVG written here ([`plot`]), not by a
//! plotting crate: colours come from the page's style sheet, so that one picture reads in light and dark, and labels
//! stand beside their curves.

mod axis;
pub mod cells;
mod labels;
pub mod page;
mod pareto;
pub mod plot;
pub mod terminal;
pub mod units;
