//! Curves over the steps of a training.

use super::canvas::{Anchor, Canvas, Style, fitted};
use super::color::{FAINT_INK, GRID, faint, line};
use super::{LABEL_SIZE, MARGIN, PAGE_WIDTH, Panel, TITLE_SIZE};

/// Numbers over steps.
pub struct Line {
    pub name: String,
    /// `(step, value)`, by step.
    pub points: Vec<(f64, f64)>,
    pub look: Look,
}

/// How a line is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// As it is.
    Plain,
    /// Of many noisy points a running mean before the faint line.
    Noisy,
    /// Few measurements, each of which is seen as a dot.
    Dots,
}

/// A noisy line of so many points has a running mean, over a fiftieth of them.
const NOISY_POINTS: usize = 200;

/// What a value is, and how an axis tells it.
#[derive(Clone, Copy, PartialEq)]
pub enum Unit {
    Number,
    Percent,
}

/// Lines over the same axes.
pub struct Chart {
    pub title: String,
    /// Of the values, beside the title.
    pub unit_name: String,
    pub unit: Unit,
    pub lines: Vec<Line>,
    /// A value to compare with, and what it is.
    pub mark: Option<(f64, String)>,
    /// The axis begins at 0.
    pub from_zero: bool,
}

/// Charts of one training: the first as wide as the page, the others in pairs below it.
pub struct Curves {
    pub title: String,
    pub charts: Vec<Chart>,
}

/// For the numbers left of a chart, and the names right of its lines.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 104.0;
const HEAD: f64 = 30.0;
const FOOT: f64 = 38.0;
const GAP: f64 = 20.0;

impl Panel for Curves {
    fn draw(&self, canvas: &mut Canvas, top: f64) -> f64 {
        let width = PAGE_WIDTH - 2.0 * MARGIN;
        let title = fitted(&self.title, TITLE_SIZE, width);
        canvas.text(MARGIN, top + TITLE_SIZE, Style::new(TITLE_SIZE).bold(), &title);
        let mut top = top + TITLE_SIZE + 14.0;
        let steps = self.steps();
        let Some((first, others)) = self.charts.split_first() else { return top };
        first.draw(canvas, [MARGIN, top, width, 290.0], steps);
        top += 290.0;
        for pair in others.chunks(2) {
            let half = (width - GAP) / 2.0;
            for (index, chart) in pair.iter().enumerate() {
                chart.draw(canvas, [MARGIN + index as f64 * (half + GAP), top + GAP, half, 220.0], steps);
            }
            top += GAP + 220.0;
        }
        top
    }
}

impl Curves {
    /// The first and the last step of all lines.
    fn steps(&self) -> [f64; 2] {
        let steps = self.charts.iter().flat_map(|chart| &chart.lines).flat_map(|line| &line.points);
        let [first, last] = range(steps.map(|(step, _)| *step)).unwrap_or([0.0, 1.0]);
        // From 0 where that is near.
        [if first <= last / 20.0 { 0.0 } else { first }, last]
    }
}

/// The least and the largest of finite numbers.
fn range(numbers: impl Iterator<Item = f64>) -> Option<[f64; 2]> {
    numbers.filter(|number| number.is_finite()).fold(None, |found, number| match found {
        None => Some([number, number]),
        Some([least, largest]) => Some([least.min(number), largest.max(number)]),
    })
}

/// An axis from one of its round numbers, or from the data's end, to another.
struct Axis {
    from: f64,
    to: f64,
    step: f64,
}

impl Axis {
    /// About `count` round numbers over a range; the axis ends at some of them.
    fn around([from, to]: [f64; 2], count: usize) -> Axis {
        let (from, to) =
            if to > from { (from, to) } else { (from - 0.5 * from.abs().max(1e-6), to + 0.5 * to.abs().max(1e-6)) };
        let step = round_step((to - from) / count as f64);
        Axis { from: (from / step + 1e-9).floor() * step, to: (to / step - 1e-9).ceil() * step, step }
    }

    /// The same over steps, which are whole; the axis ends where they do.
    fn of_steps([from, to]: [f64; 2], count: usize) -> Axis {
        let to = if to > from { to } else { from + 1.0 };
        Axis { from, to, step: round_step((to - from) / count as f64).max(1.0) }
    }

    /// From 0 to 1 along the axis.
    fn place(&self, value: f64) -> f64 {
        (value - self.from) / (self.to - self.from)
    }

    /// Its round numbers.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let first = (self.from / self.step - 1e-9).ceil() as i64;
        let last = (self.to / self.step + 1e-9).floor() as i64;
        (first..=last).map(|tick| tick as f64 * self.step)
    }

    /// A tick's text: as many places as steps have.
    fn text(&self, value: f64, unit: Unit) -> String {
        let (value, step, sign) = match unit {
            Unit::Number => (value, self.step, ""),
            Unit::Percent => (100.0 * value, 100.0 * self.step, " %"),
        };
        if step < 1e-4 {
            return if value.abs() < step / 2.0 { "0".to_owned() } else { format!("{value:.0e}") };
        }
        let places = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
        let zero_as_positive = if value.abs() < step / 2.0 { 0.0 } else { value };
        format!("{zero_as_positive:.places$}{sign}")
    }
}

/// The number of 1, 2 and 5 times powers of ten that is next above.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powi(step.log10().floor() as i32);
    let digit = [1.0, 2.0, 5.0].into_iter().find(|digit| step <= digit * power * (1.0 + 1e-9));
    digit.unwrap_or(10.0) * power
}

impl Line {
    fn finite_points(&self) -> Vec<(f64, f64)> {
        self.points.iter().filter(|point| point.1.is_finite()).copied().collect()
    }

    /// Over how many points its running mean is; none where it has none.
    fn mean_length(&self) -> Option<usize> {
        (self.look == Look::Noisy && self.points.len() >= NOISY_POINTS).then_some(self.points.len() / 50)
    }
}

/// The mean of about `length` points around each; of fewer at the ends.
fn running_mean(points: &[(f64, f64)], length: usize) -> Vec<(f64, f64)> {
    let half = length / 2;
    let mean = |at: usize| {
        let around = &points[at.saturating_sub(half)..(at + half + 1).min(points.len())];
        around.iter().map(|(_, value)| value).sum::<f64>() / around.len() as f64
    };
    points.iter().enumerate().map(|(at, (step, _))| (*step, mean(at))).collect()
}

impl Chart {
    fn draw(&self, canvas: &mut Canvas, [left, top, width, height]: [f64; 4], steps: [f64; 2]) {
        let heading = Style::new(13.0).bold();
        canvas.text(left, top + 16.0, heading, &self.title);
        let beside = left + super::canvas::width_of(&self.title, 13.0) + 10.0;
        let unit_name = match self.lines.iter().find_map(Line::mean_length) {
            Some(length) if self.unit_name.is_empty() => format!("thick: mean of {length} steps"),
            Some(length) => format!("{}; thick: mean of {length} steps", self.unit_name),
            None => self.unit_name.clone(),
        };
        canvas.text(beside, top + 16.0, Style::new(LABEL_SIZE).inked(FAINT_INK), &unit_name);
        let (x, y) = (left + LEFT, top + HEAD);
        let (width, height) = (width - LEFT - RIGHT, height - HEAD - FOOT);
        let across = Axis::of_steps(steps, if width > 600.0 { 10 } else { 5 });
        let values = self.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
        let also = self.mark.iter().map(|(value, _)| *value).chain(self.from_zero.then_some(0.0));
        let along = Axis::around(range(values.chain(also)).unwrap_or([0.0, 1.0]), if height > 200.0 { 6 } else { 4 });
        let at = |(step, value): (f64, f64)| (x + across.place(step) * width, y + height - along.place(value) * height);

        let label = Style::new(LABEL_SIZE).inked(FAINT_INK);
        for tick in along.ticks() {
            let (_, at) = at((across.from, tick));
            canvas.rule([x, at, x + width, at], GRID);
            canvas.text(x - 8.0, at + 4.0, label.anchored(Anchor::End), &along.text(tick, self.unit));
        }
        for tick in across.ticks() {
            let (at, _) = at((tick, along.from));
            canvas.rule([at, y + height, at, y + height + 4.0], FAINT_INK);
            canvas.text(at, y + height + 17.0, label.anchored(Anchor::Middle), &across.text(tick, Unit::Number));
        }
        canvas.rule([x, y + height, x + width, y + height], FAINT_INK);
        canvas.text(x - 14.0, y + height + 17.0, label.anchored(Anchor::End), "step");
        let mut names = Vec::new();
        if let Some((value, name)) = &self.mark {
            let (_, at) = at((across.from, *value));
            canvas.curve(&[(x, at), (x + width, at)], 1.0, (FAINT_INK, "2 3"));
            names.push((at, FAINT_INK, name.as_str()));
        }
        for (index, drawn) in self.lines.iter().enumerate() {
            let (ink, dashes) = line(index);
            let (points, look) = (drawn.finite_points(), drawn.look);
            let places: Vec<(f64, f64)> = points.iter().map(|point| at(*point)).collect();
            let Some(mut last) = places.last().copied() else { continue };
            match drawn.mean_length() {
                Some(length) => {
                    canvas.curve(&thinned(&places), 1.0, (&faint(ink), ""));
                    let mean: Vec<(f64, f64)> = running_mean(&points, length).into_iter().map(at).collect();
                    canvas.curve(&thinned(&mean), 2.0, (ink, dashes));
                    last = mean.last().copied().unwrap_or(last);
                }
                None => canvas.curve(&thinned(&places), if look == Look::Dots { 2.0 } else { 1.4 }, (ink, dashes)),
            }
            if look == Look::Dots {
                places.iter().for_each(|(x, y)| canvas.dot(*x, *y, ink));
            }
            names.push((last.1, ink, drawn.name.as_str()));
        }
        // Names stand at the ends of their lines, which need no legend then.
        for ((_, ink, name), place) in names.iter().zip(apart(&names, 13.0, [y, y + height])) {
            let name = fitted(name, LABEL_SIZE, RIGHT - 8.0);
            canvas.text(x + width + 8.0, place + 4.0, Style::new(LABEL_SIZE).inked(ink), &name);
        }
    }
}

/// Where texts that belong at some heights go so that they are apart, as near as they can be.
fn apart(names: &[(f64, &'static str, &str)], distance: f64, [top, bottom]: [f64; 2]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by(|a, b| names[*a].0.total_cmp(&names[*b].0));
    let mut places: Vec<f64> = order.iter().map(|index| names[*index].0.clamp(top, bottom)).collect();
    for index in 1..places.len() {
        places[index] = places[index].max(places[index - 1] + distance);
    }
    // What was pushed out below goes up again.
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - distance;
    }
    let mut found = vec![0.0; names.len()];
    order.into_iter().zip(places).for_each(|(index, place)| found[index] = place);
    found
}

/// At most the lowest and the highest point of each pixel column, in their order: more would not be seen.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut thin: Vec<(f64, f64)> = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        if column.len() <= 2 {
            thin.extend(column);
            continue;
        }
        let by_height = |(a, b): (&usize, &usize)| column[*a].1.total_cmp(&column[*b].1);
        let lowest = (0..column.len()).min_by(|a, b| by_height((a, b))).unwrap_or(0);
        let highest = (0..column.len()).max_by(|a, b| by_height((a, b))).unwrap_or(0);
        thin.push(column[lowest.min(highest)]);
        thin.push(column[lowest.max(highest)]);
    }
    thin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers_around_the_data() {
        let axis = Axis::around([2.31, 3.87], 6);
        let ticks: Vec<String> = axis.ticks().map(|tick| axis.text(tick, Unit::Number)).collect();
        assert_eq!(ticks, ["2.0", "2.5", "3.0", "3.5", "4.0"]);
        let axis = Axis::around([0.0, 3e-5], 4);
        let ticks: Vec<String> = axis.ticks().map(|tick| axis.text(tick, Unit::Number)).collect();
        assert_eq!(ticks, ["0", "1e-5", "2e-5", "3e-5"]);
        let axis = Axis::around([0.2, 0.31], 4);
        let ticks: Vec<String> = axis.ticks().map(|tick| axis.text(tick, Unit::Percent)).collect();
        assert_eq!(ticks, ["20 %", "25 %", "30 %", "35 %"]);
        // All the same, and a single step.
        let axis = Axis::around([2.0, 2.0], 4);
        assert!(axis.from < 2.0 && axis.to > 2.0 && axis.ticks().count() > 2);
        assert_eq!(Axis::of_steps([7.0, 7.0], 5).ticks().collect::<Vec<_>>(), [7.0, 8.0]);
    }

    #[test]
    fn names_that_would_overlap_are_moved_apart_inside_the_chart() {
        let names = [(98.0, "", "a"), (99.0, "", "b"), (10.0, "", "c")];
        assert_eq!(apart(&names, 13.0, [0.0, 100.0]), [87.0, 100.0, 10.0]);
    }

    #[test]
    fn a_running_mean_is_of_the_points_around_each() {
        let noise: Vec<(f64, f64)> = (0..5).map(|step| (step as f64, (step % 2) as f64)).collect();
        let expected = [0.5, 1.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0, 0.5];
        assert_eq!(running_mean(&noise, 3), (0..5).map(|step| (step as f64, expected[step])).collect::<Vec<_>>());
    }

    #[test]
    fn long_lines_are_thinned_to_their_extremes() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (i as f64 / 100.0, (i % 100) as f64)).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0], thin[1]), (200, (0.0, 0.0), (0.99, 99.0)));
        assert_eq!(thinned(&points[..2]), &points[..2]);
    }
}
