//! One picture in SVG: what share of the copy bandwidth each kernel of a step of one session reaches, and tokens a second
//! by batch and context.

use std::fmt::Write;

use super::report::{Report, context_name};

const WIDTH: f64 = 960.0;
const ROW: f64 = 18.0;
const LEFT: f64 = 300.0;
const BAR: f64 = 560.0;
const COLORS: [&str; 5] = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2"];

/// A bar: its name, its length as a share of the longest there may be, and the figure at its end.
struct Bar {
    name: String,
    share: f64,
    figure: String,
    color: &'static str,
}

pub fn svg(report: &Report) -> String {
    let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
    if let Some(roofs) = &report.roofs {
        for format in &report.formats {
            for stage in format.kernels.iter().filter(|stage| stage.name.starts_with("a step of 1 ")) {
                let bar = |kernel: &super::report::Kernel| {
                    let share = kernel.gb_per_s? / roofs.copy_gb_per_s;
                    let name = format!("{} {}", kernel.kernel, kernel.part);
                    Some(Bar { name, share, figure: format!("{:.0} %", 100.0 * share), color: COLORS[0] })
                };
                let title = format!("{}: share of the copy bandwidth in {}", format.format, stage.name);
                groups.push((title, stage.kernels.iter().filter_map(bar).collect()));
            }
        }
    }
    for format in &report.formats {
        let most = format.steps.iter().map(|step| step.tokens_per_s).fold(0.0, f64::max);
        let mut batches: Vec<usize> = format.steps.iter().map(|step| step.sessions).collect();
        batches.dedup();
        let bar = |step: &super::report::Step| Bar {
            name: format!("{} sessions at {}", step.sessions, context_name(step.context)),
            share: step.tokens_per_s / most,
            figure: format!("{:.1}", step.tokens_per_s),
            color: COLORS[batches.iter().position(|batch| *batch == step.sessions).unwrap_or(0) % COLORS.len()],
        };
        groups.push((format!("{}: tokens/s", format.format), format.steps.iter().map(bar).collect()));
    }
    groups.retain(|(_, bars)| !bars.is_empty());
    let rows: usize = groups.iter().map(|(_, bars)| bars.len() + 2).sum();
    let height = (rows + 3) as f64 * ROW;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut y = 1.5 * ROW;
    let note = if report.machine.is_gpu { "" } else { " (not a GPU: no figure says anything about speed)" };
    text(&mut out, (12.0, y), "start", &format!("gemmoe on {}{note}", report.machine.device));
    for (title, bars) in groups {
        y += 1.5 * ROW;
        text(&mut out, (12.0, y), "start", &title);
        for Bar { name, share, figure, color } in bars {
            y += ROW;
            let length = BAR * share.clamp(0.0, 1.0);
            text(&mut out, (LEFT - 8.0, y), "end", &name);
            let top = y - 12.0;
            // Writing to a text does not fail; so in `text`.
            let _ =
                writeln!(out, "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"14\" fill=\"{color}\"/>");
            text(&mut out, (LEFT + length + 6.0, y), "start", &figure);
        }
        y += 0.5 * ROW;
    }
    out + "</svg>\n"
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
}
