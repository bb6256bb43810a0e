//! The picture of an evaluation, and of a training.

use std::path::Path;

use super::metrics::{Numbers, Step};
use super::report::Report;
use crate::plot::curve::{Chart, Curves, Line, Unit};
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

fn curves(path: &Path, steps: &[Step]) -> Curves {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let own = |name: &str, value: &dyn Fn(&Numbers) -> Option<f64>| Line {
        name: name.to_owned(),
        points: steps.iter().filter_map(|step| Some((step.step as f64, value(&step.own)?))).collect(),
        dots: false,
    };
    let held_out = |name: &str, value: &dyn Fn(&Numbers) -> Option<f64>| Line {
        name: name.to_owned(),
        points: steps.iter().filter_map(|step| Some((step.step as f64, value(step.held_out.as_ref()?)?))).collect(),
        dots: true,
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
    let loss = vec![own("training", &Numbers::text_loss), held_out("held out", &Numbers::text_loss)];
    let accuracy = vec![own("training", &|found| found.accuracy), held_out("held out", &|found| found.accuracy)];
    let balance = vec![own("training", &|found| found.balance), held_out("held out", &|found| found.balance)];
    let experts = steps.iter().map(|step| step.own.mean_shares().len()).max().unwrap_or(0);
    let share = |expert: usize| {
        let of = |found: &Numbers| found.mean_shares().get(expert).copied();
        own(&format!("expert {expert}"), &of)
    };
    let charts = [
        chart("Loss", loss_unit, loss),
        Chart { unit: Unit::Percent, ..chart("Accuracy", "pairs whose chosen answer has the higher reward", accuracy) },
        Chart {
            unit: Unit::Percent,
            mark: (experts > 1).then(|| (1.0 / experts as f64, "all alike".to_owned())),
            from_zero: true,
            ..chart("Experts", "share of choices, mean of the layers", (0..experts).map(share).collect())
        },
        chart("Balancing loss", "num_experts_per_tok is even", balance),
        Chart { from_zero: true, ..chart("Learning rate", "", vec![own("", &|found| found.learning_rate)]) },
        Chart {
            from_zero: true,
            ..chart("Norm of the gradient", "before clipping", vec![own("", &|found| found.gradient_norm)])
        },
    ];
    let mut charts = Vec::from(charts);
    for chart in &mut charts {
        chart.lines.retain(|line| !line.points.is_empty());
    }
    charts.retain(|chart| !chart.lines.is_empty());
    Curves { title: format!("Training: {name}"), charts }
}
