//! Where labels stand so that none lies on another.

/// Height of a label, pixels.
const HEIGHT: f64 = 14.0;
/// Width of one letter, pixels; a little more than the font's mean.
const LETTER: f64 = 7.3;

/// Moves labels that want to stand at `wanted` apart, within `top..bottom`; gives their places in the same order.
pub(super) fn spread(wanted: &[f64], top: f64, bottom: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let mut places = wanted.to_vec();
    let mut floor = top;
    for &i in &order {
        places[i] = places[i].max(floor);
        floor = places[i] + HEIGHT;
    }
    let mut ceiling = bottom;
    for &i in order.iter().rev() {
        places[i] = places[i].min(ceiling);
        ceiling = places[i] - HEIGHT;
    }
    places
}

/// A box on the picture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Area {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
}

impl Area {
    fn overlap(&self, other: &Area) -> f64 {
        let x = self.right.min(other.right) - self.left.max(other.left);
        let y = self.bottom.min(other.bottom) - self.top.max(other.top);
        x.max(0.0) * y.max(0.0)
    }

    fn outside(&self, frame: &Area) -> f64 {
        let inside = self.overlap(frame);
        (self.right - self.left) * (self.bottom - self.top) - inside
    }
}

/// Places the `texts` of points beside them: each where it overlaps least with points, labels placed before, and the
/// frame's outside. Gives left end and baseline.
pub(super) fn beside(points: &[(f64, f64)], texts: &[&str], frame: &Area) -> Vec<(f64, f64)> {
    let around = |&(x, y): &(f64, f64)| Area { left: x - 5.0, top: y - 5.0, right: x + 5.0, bottom: y + 5.0 };
    let mut taken: Vec<Area> = points.iter().map(around).collect();
    let mut places = Vec::with_capacity(points.len());
    for (&(x, y), text) in points.iter().zip(texts) {
        let width = LETTER * text.chars().count() as f64;
        let candidates = [0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0, -4.0, 4.0].into_iter().flat_map(|line| {
            [x + 8.0, x - 8.0 - width, x - width / 2.0].map(|left| {
                let middle = y + line * HEIGHT;
                Area { left, top: middle - HEIGHT / 2.0, right: left + width, bottom: middle + HEIGHT / 2.0 }
            })
        });
        let far = |a: &Area| {
            ((a.left + a.right) / 2.0 - x).abs() * 0.02 + ((a.top + a.bottom) / 2.0 - y).abs() * 0.2
        };
        let cost = |a: &Area| {
            3.0 * taken.iter().map(|t| t.overlap(a)).sum::<f64>() + 4.0 * a.outside(frame) + far(a)
        };
        let best = candidates.min_by(|a, b| cost(a).total_cmp(&cost(b)));
        let best = best.unwrap_or(Area { left: x, top: y, right: x, bottom: y });
        places.push((best.left, best.bottom - 3.5));
        taken.push(best);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_labels_keep_their_order_and_distance() {
        let places = spread(&[50.0, 51.0, 10.0, 99.0, 98.0], 0.0, 100.0);
        let mut sorted = places.clone();
        sorted.sort_by(f64::total_cmp);
        assert!(sorted.windows(2).all(|w| w[1] - w[0] >= HEIGHT - 1e-9), "{places:?}");
        assert!(places[0] < places[1] && places[4] < places[3] && places[3] <= 100.0, "{places:?}");
    }

    #[test]
    fn labels_beside_points_do_not_overlap_where_there_is_room() {
        let points = [(100.0, 100.0), (104.0, 102.0), (300.0, 20.0), (396.0, 100.0)];
        let frame = Area { left: 0.0, top: 0.0, right: 400.0, bottom: 200.0 };
        let texts = ["first", "second", "third", "at the edge"];
        let places = beside(&points, &texts, &frame);
        let area = |i: usize| {
            let (left, baseline) = places[i];
            let width = LETTER * texts[i].len() as f64;
            Area { left, top: baseline + 3.5 - HEIGHT, right: left + width, bottom: baseline + 3.5 }
        };
        for i in 0..4 {
            assert!((0..i).all(|j| area(i).overlap(&area(j)) == 0.0), "{places:?}");
            assert!(area(i).outside(&frame) < 1e-9, "{places:?}");
        }
    }
}
