//! Curves over the length: points with whiskers, joined, with their names beside the last point.

use super::axis::{Axis, Quantity};
use super::labels;
use maud::{Markup, html};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 82.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 48.0;

/// One value with its interval.
#[derive(Debug, Clone)]
pub struct Value {
    /// Where on the horizontal axis.
    pub x: f64,
    /// The value.
    pub y: f64,
    /// Its interval, if it has one.
    pub interval: Option<(f64, f64)>,
    /// The value in words.
    pub text: String,
}

/// A named curve.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Which colour and dash of the style sheet.
    pub style: usize,
    /// Ascending in `x`.
    pub values: Vec<Value>,
}

/// A picture of curves over the length.
pub fn curves(curves: &[Curve], quantity: Quantity) -> Markup {
    let values = || curves.iter().flat_map(|curve| &curve.values);
    let x = Axis::over(Quantity::Length, values().map(|v| v.x), LEFT, WIDTH - RIGHT);
    let ys = values().flat_map(|v| {
        let (low, high) = v.interval.unwrap_or((v.y, v.y));
        // An interval that reaches zero must not stretch a logarithmic axis.
        [v.y, low.max(v.y / 4.0), high]
    });
    let y = Axis::over(quantity, ys, HEIGHT - BOTTOM, TOP);
    let drawn: Vec<&Curve> = curves.iter().filter(|curve| !curve.values.is_empty()).collect();
    let ends: Vec<(f64, f64)> =
        drawn.iter().filter_map(|c| c.values.last()).map(|v| (x.at(v.x), y.at(v.y))).collect();
    let wanted: Vec<f64> = ends.iter().map(|(_, y)| *y).collect();
    let places = labels::spread(&wanted, TOP + 4.0, HEIGHT - BOTTOM - 2.0);
    let label_x = WIDTH - RIGHT + 14.0;
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" {
            (frame(&x, &y, 8, 8))
            @for curve in &drawn { (line(curve, &x, &y)) }
            @for ((curve, (end_x, end_y)), place) in drawn.iter().zip(&ends).zip(&places) {
                g class=(style(curve.style)) {
                    path class="leader" d=(format!("M{:.1},{end_y:.1} L{:.1},{place:.1}", end_x + 5.0, label_x - 3.0)) {}
                    text class="name" x=(px(label_x)) y=(px(place + 4.0)) {
                        (curve.name)
                        @if curve.values.last().is_some_and(|v| y.is_beyond(v.y)) { " ↑" }
                    }
                }
            }
        }
    }
}

fn line(curve: &Curve, x: &Axis, y: &Axis) -> Markup {
    let corners: Vec<String> =
        curve.values.iter().map(|v| format!("{:.1},{:.1}", x.at(v.x), y.at(v.y))).collect();
    html! {
        g class=(style(curve.style)) {
            path class="line" d=(format!("M{}", corners.join(" L"))) {}
            @for v in &curve.values {
                @if let Some((low, high)) = v.interval {
                    (whisker(x.at(v.x), y.at(low), y.at(high)))
                }
                (dot(x.at(v.x), y.at(v.y), &format!("{}: {}", curve.name, v.text)))
            }
        }
    }
}

fn whisker(x: f64, from: f64, to: f64) -> Markup {
    let cap = 3.0;
    let d = format!(
        "M{x:.1},{from:.1} V{to:.1} M{:.1},{from:.1} h{} M{:.1},{to:.1} h{}",
        x - cap,
        2.0 * cap,
        x - cap,
        2.0 * cap
    );
    html! { path class="whisker" d=(d) {} }
}

/// A marked point that says what it is when pointed at.
pub(super) fn dot(x: f64, y: f64, text: &str) -> Markup {
    html! { circle class="dot" cx=(px(x)) cy=(px(y)) r="3.4" { title { (text) } } }
}

/// Grid, ticks and titles of both axes.
pub(super) fn frame(x: &Axis, y: &Axis, most_x: usize, most_y: usize) -> Markup {
    let ((left, right), (bottom, top)) = (x.pixels(), y.pixels());
    html! {
        g class="axes" {
            @for (at, label) in x.ticks(most_x) {
                path class="grid" d=(format!("M{at:.1},{bottom:.1} V{top:.1}")) {}
                text class="tick" x=(px(at)) y=(px(bottom + 16.0)) text-anchor="middle" { (label) }
            }
            @for (at, label) in y.ticks(most_y) {
                path class="grid" d=(format!("M{left:.1},{at:.1} H{right:.1}")) {}
                text class="tick" x=(px(left - 7.0)) y=(px(at + 4.0)) text-anchor="end" { (label) }
            }
            path class="axis" d=(format!("M{left:.1},{top:.1} V{bottom:.1} H{right:.1}")) {}
            text class="title" x=(px((left + right) / 2.0)) y=(px(bottom + 36.0)) text-anchor="middle" {
                (x.quantity().title())
            }
            text class="title" text-anchor="middle"
                transform=(format!("translate(14,{:.1}) rotate(-90)", (top + bottom) / 2.0)) {
                (y.quantity().title())
            }
        }
    }
}

/// The classes of the style sheet for curve `i`.
pub(super) fn style(i: usize) -> String {
    format!("c{} d{}", i % 10, i / 10 % 3)
}

fn px(x: f64) -> String {
    format!("{x:.1}")
}
