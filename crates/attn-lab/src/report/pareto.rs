//! Time against error at one length: what lies to the lower left is better in both.

use super::axis::{Axis, Quantity};
use super::labels::{self, Area};
use super::plot::{dot, frame, style};
use maud::{Markup, html};

const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 310.0;

/// One variant at one length.
#[derive(Debug, Clone)]
pub(super) struct Contender {
    pub(super) name: String,
    pub(super) style: usize,
    pub(super) seconds: f64,
    pub(super) error: f64,
    pub(super) text: String,
}

/// The picture, with a line along the variants that no other beats in both.
pub(super) fn panel(contenders: &[Contender]) -> Markup {
    let x = Axis::over(Quantity::Seconds, contenders.iter().map(|c| c.seconds), 58.0, WIDTH - 14.0);
    let y = Axis::over(Quantity::Error, contenders.iter().map(|c| c.error), HEIGHT - 46.0, 12.0);
    let at = |c: &Contender| (x.at(c.seconds), y.at(c.error));
    let points: Vec<(f64, f64)> = contenders.iter().map(at).collect();
    let names: Vec<&str> = contenders.iter().map(|c| c.name.as_str()).collect();
    let frame_area = Area { left: 60.0, top: 4.0, right: WIDTH - 2.0, bottom: HEIGHT - 48.0 };
    let places = labels::beside(&points, &names, &frame_area);
    let front: Vec<String> =
        front(contenders).into_iter().map(|c| format!("{:.1},{:.1}", at(c).0, at(c).1)).collect();
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" {
            (frame(&x, &y, 5, 6))
            @if front.len() > 1 { path class="front" d=(format!("M{}", front.join(" L"))) {} }
            @for ((c, (px, py)), (left, baseline)) in contenders.iter().zip(&points).zip(&places) {
                g class=(style(c.style)) {
                    (dot(*px, *py, &c.text))
                    @if (py - baseline).abs() > 16.0 {
                        path class="leader" d=(format!("M{px:.1},{py:.1} L{:.1},{:.1}", left + 8.0, baseline - 4.0)) {}
                    }
                    text class="name" x=(format!("{left:.1}")) y=(format!("{baseline:.1}")) { (c.name) @if y.is_beyond(c.error) { " ↑" } }
                }
            }
        }
    }
}

/// The contenders that no other beats in both, by time.
fn front(contenders: &[Contender]) -> Vec<&Contender> {
    let mut by_time: Vec<&Contender> = contenders.iter().collect();
    by_time.sort_by(|a, b| a.seconds.total_cmp(&b.seconds).then(a.error.total_cmp(&b.error)));
    let mut lowest = f64::INFINITY;
    by_time.retain(|c| {
        let better = c.error < lowest;
        lowest = lowest.min(c.error);
        better
    });
    by_time
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_leaves_out_what_is_beaten_in_both() {
        let contender = |name: &str, seconds, error| Contender {
            name: name.into(),
            style: 0,
            seconds,
            error,
            text: String::new(),
        };
        let all = [
            contender("exact", 4.0, 1e-7),
            contender("slow and exact", 9.0, 1e-7),
            contender("quick", 1.0, 0.5),
            contender("quick and worse", 1.5, 0.6),
            contender("middle", 2.0, 0.1),
        ];
        assert_eq!(
            front(&all).iter().map(|c| c.name.as_str()).collect::<Vec<_>>(),
            ["quick", "middle", "exact"]
        );
    }
}
