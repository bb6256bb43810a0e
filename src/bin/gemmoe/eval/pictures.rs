//! The picture of an evaluation, and of a training.

use std::path::Path;

use super::metrics::{Numbers, Step};
use super::report::Report;
use crate::plot::curve::{Chart, Curves, Line, Look, Unit};
use crate::plot::heat::{HeatMaps, Router};
use crate::plot::{Panel, page};

/// Draws what there is, as the bytes of an SVG file.
pub fn draw(report: Option<&Report>, curve: Option<(&Path, &[Step])>) -> String {
    let routers: Vec<Router> = report.map(maps).unwrap_or_default();
    let maps = HeatMaps { routers: &routers, measure: "share of tokens" };
    let curves = curve.map(|(path, steps)| curves(path, steps));
    let mut panels: Vec<&dyn Panel> = Vec::new();
    if !routers.is_empty() {
        panels.push(&maps);
    }
    panels.extend(curves.iter().map(|curves| curves as &dyn Panel));
    page(&panels)
}

fn maps(report: &Report) -> Vec<Router> {
    let with_choice = report.routers.iter().filter(|router| router.config.num_local_experts > 1);
    let map = |router: &super::report::Measured| Router {
        name: router.name.clone(),
        even: router.even(),
        blocks: report.domains.iter().zip(&router.texts).map(|(name, figures)| router.block(name, figures)).collect(),
    };
    if report.domains.is_empty() { Vec::new() } else { with_choice.map(map).collect() }
}

/// Experts that have lines of their own: the names of more have no room.
const MOST_LINES: usize = 10;
/// What is drawn of more experts, by their place in the order of shares.
const QUANTILES: [(&str, f64); 5] =
    [("most used", 1.0), ("upper quartile", 0.75), ("median", 0.5), ("lower quartile", 0.25), ("least used", 0.0)];

/// The share of the expert at a place from 0, the least used one in this step, to 1.
fn quantile(step: &Step, place: f64) -> Option<f64> {
    let mut shares = step.own.mean_shares();
    shares.sort_by(f64::total_cmp);
    shares.get((place * shares.len().saturating_sub(1) as f64).round() as usize).copied()
}

fn curves(path: &Path, steps: &[Step]) -> Curves {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let line = |name: &str, look: Look, value: &dyn Fn(&Step) -> Option<f64>| Line {
        name: name.to_owned(),
        points: steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect(),
        look,
    };
    let own = |look, value: fn(&Numbers) -> Option<f64>| line("training", look, &|step| value(&step.own));
    let both = |value: fn(&Numbers) -> Option<f64>| {
        let held_out = line("held out", Look::Dots, &|step| value(step.held_out.as_ref()?));
        vec![own(Look::Noisy, value), held_out]
    };
    let chart = |title: &str, unit_name: &str, lines: Vec<Line>| Chart {
        title: title.to_owned(),
        unit_name: unit_name.to_owned(),
        unit: Unit::Number,
        lines,
        mark: None,
        from_zero: false,
    };
    let is_pairs = steps.iter().any(|step| step.own.accuracy.is_some());
    let loss_unit = if is_pairs { "mean over pairs" } else { "nats per token" };
    let experts = steps.iter().map(|step| step.own.mean_shares().len()).max().unwrap_or(0);
    let shares: Vec<Line> = match experts {
        ..=MOST_LINES => (0..experts)
            .map(|expert| {
                line(&format!("expert {expert}"), Look::Plain, &|step| step.own.mean_shares().get(expert).copied())
            })
            .collect(),
        _ => QUANTILES.map(|(name, place)| line(name, Look::Plain, &|step| quantile(step, place))).into(),
    };
    let shares_of = match experts {
        ..=MOST_LINES => "share of choices, mean of the layers".to_owned(),
        _ => format!("share of choices, mean of the layers; {experts} experts"),
    };
    let from_zero = true;
    let charts = [
        chart("Loss", loss_unit, both(Numbers::text_loss)),
        Chart {
            unit: Unit::Percent,
            ..chart("Accuracy", "chosen has the higher reward", both(|found| found.accuracy))
        },
        Chart {
            unit: Unit::Percent,
            mark: (experts > 1).then(|| (1.0 / experts as f64, "all alike".to_owned())),
            from_zero,
            ..chart("Experts", &shares_of, shares)
        },
        chart("Balancing loss", "even: num_experts_per_tok", both(|found| found.balance)),
        Chart { from_zero, ..chart("Learning rate", "", vec![own(Look::Plain, |found| found.learning_rate)]) },
        Chart {
            from_zero,
            ..chart("Norm of the gradient", "before clipping", vec![own(Look::Noisy, |found| found.gradient_norm)])
        },
    ];
    let mut charts = Vec::from(charts);
    for chart in &mut charts {
        chart.lines.retain(|line| !line.points.is_empty());
    }
    charts.retain(|chart| !chart.lines.is_empty());
    Curves { title: format!("Training: {name}"), charts }
}
