//! Numbers side by side: a line a figure, a column a router, each with what sets it apart from the first one's.

use std::fmt::Write;

use anstyle::{AnsiColor, Style};

use crate::units::cut;

/// What is better.
#[derive(Clone, Copy, PartialEq)]
pub enum Better {
    Lower,
    Higher,
    Neither,
}

/// How a value is written, and its difference to the first column's.
#[derive(Clone, Copy, PartialEq)]
pub enum Format {
    /// `12.3456`, and by how many percent it differs.
    Ratio,
    /// `2.5133`, and the difference.
    Number,
    /// `75.0 %`, and the difference in percentage points.
    Percent,
}

/// A line of a table.
pub struct Row {
    pub label: String,
    pub format: Format,
    pub better: Better,
    /// By column; none where there is no such figure, for which `missing` stands.
    pub values: Vec<Option<f64>>,
    pub missing: &'static str,
}

/// Lines under a heading.
pub struct Section {
    pub title: String,
    pub rows: Vec<Row>,
}

/// All of it.
pub struct Table<'a> {
    pub columns: &'a [String],
    pub sections: &'a [Section],
}

const VALUE: usize = 9;
const DIFFERENCE: usize = 9;
/// The mark of the best behind a value.
const MARK: usize = 1;
const GAP: &str = "  ";
/// Labels are cut to it.
const MOST_LABEL: usize = 26;

impl Format {
    fn value(self, value: f64) -> String {
        match self {
            Format::Ratio | Format::Number => {
                let text = format!("{value:.4}");
                if text.len() > VALUE { format!("{value:.3e}") } else { text }
            }
            Format::Percent => format!("{:.1} %", 100.0 * value),
        }
    }

    fn difference(self, value: f64, first: f64) -> String {
        match self {
            Format::Ratio => {
                let percent = 100.0 * (value / first - 1.0);
                if percent.abs() < 1000.0 { format!("{percent:+.2} %") } else { format!("{percent:+.0e} %") }
            }
            Format::Number => format!("{:+.4}", value - first),
            Format::Percent => format!("{:+.1}", 100.0 * (value - first)),
        }
    }
}

impl Row {
    /// The columns that are best; none where all are alike, or nothing is better.
    fn best(&self) -> Vec<bool> {
        let found = self.values.iter().flatten().copied();
        let best = match self.better {
            Better::Lower => found.clone().reduce(f64::min),
            Better::Higher => found.clone().reduce(f64::max),
            Better::Neither => None,
        };
        let all_alike = found.clone().all(|value| Some(value) == best);
        self.values.iter().map(|value| value.is_some() && *value == best && !all_alike).collect()
    }
}

impl Table<'_> {
    /// Draws it for `width` columns, lines ended: what has no room beside the others goes below them.
    pub fn draw(&self, width: usize) -> String {
        let labels = self.sections.iter().flat_map(|section| &section.rows).map(|row| row.label.chars().count() + 2);
        let label_width = labels.max().unwrap_or(0).min(MOST_LABEL);
        let column = GAP.len() + VALUE + MARK + DIFFERENCE;
        // The first column has no differences.
        let first = GAP.len() + VALUE + MARK;
        let fits = 1 + width.saturating_sub(label_width + first) / column;
        let mut out = String::new();
        let mut begin = 0;
        while begin < self.columns.len() {
            let count = if begin == 0 { fits } else { (width.saturating_sub(label_width) / column).max(1) };
            let end = (begin + count).min(self.columns.len());
            if begin > 0 {
                out.push('\n');
            }
            self.draw_columns(&mut out, begin..end, label_width);
            begin = end;
        }
        out
    }

    fn draw_columns(&self, out: &mut String, columns: std::ops::Range<usize>, label_width: usize) {
        let width_of = |column: usize| VALUE + MARK + if column == 0 { 0 } else { DIFFERENCE };
        let mut line = " ".repeat(label_width);
        for column in columns.clone() {
            let width = width_of(column);
            // Above the values, and as far to the right as a long name needs.
            let name = cut(&self.columns[column], width);
            let name = format!("{name:>to$}", to = VALUE);
            line += &format!("{GAP}{name:<width$}");
        }
        let _ = writeln!(out, "{}", line.trim_end());
        for section in self.sections {
            let _ = writeln!(out, "{}", section.title);
            for row in &section.rows {
                let best = row.best();
                let label = cut(&row.label, label_width - 2);
                let mut line = format!("  {label:<to$}", to = label_width - 2);
                for column in columns.clone() {
                    line += GAP;
                    line += &row.cell(column, best[column]);
                }
                let _ = writeln!(out, "{}", line.trim_end());
            }
        }
    }
}

impl Row {
    fn cell(&self, column: usize, is_best: bool) -> String {
        let Some(value) = self.values[column] else {
            let to = VALUE + MARK + if column == 0 { 0 } else { DIFFERENCE };
            return format!("{:<to$}", format!("{:>VALUE$}", self.missing));
        };
        let (style, mark) = match is_best {
            true => (AnsiColor::Green.on_default().bold(), "*"),
            false => (Style::new(), " "),
        };
        let cell = format!("{style}{:>VALUE$}{mark}{style:#}", self.format.value(value));
        match self.values[0] {
            Some(first) if column > 0 => cell + &format!("{:>DIFFERENCE$}", self.format.difference(value, first)),
            _ if column > 0 => cell + &" ".repeat(DIFFERENCE),
            _ => cell,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(columns: usize) -> (Vec<String>, Vec<Section>) {
        let row = |label: &str, format, better, values: &[Option<f64>]| Row {
            label: label.to_owned(),
            format,
            better,
            values: values[..columns].to_vec(),
            missing: "-",
        };
        let perplexity = row("english", Format::Ratio, Better::Lower, &[Some(10.0), Some(9.0), Some(11.0)]);
        let nothing = row("german", Format::Ratio, Better::Lower, &[Some(4.0), Some(4.0), Some(4.0)]);
        let accuracy = row("accuracy", Format::Percent, Better::Higher, &[None, Some(0.75), Some(0.5)]);
        let sections = vec![
            Section { title: "perplexity".to_owned(), rows: vec![perplexity, nothing] },
            Section { title: "pairs".to_owned(), rows: vec![accuracy] },
        ];
        let names = ["stored", "after-a-very-long-training", "dpo"];
        (names[..columns].iter().map(|name| name.to_string()).collect(), sections)
    }

    fn plain(columns: usize, width: usize) -> String {
        let (columns, sections) = table(columns);
        let text = Table { columns: &columns, sections: &sections }.draw(width);
        anstream::adapter::strip_str(&text).to_string()
    }

    #[test]
    fn routers_stand_side_by_side_with_differences_and_the_best_marked() {
        let expected = "
               stored   after-a-very-long-…        dpo
perplexity
  english     10.0000      9.0000* -10.00 %    11.0000  +10.00 %
  german       4.0000      4.0000   +0.00 %     4.0000   +0.00 %
pairs
  accuracy          -      75.0 %*              50.0 %
";
        assert_eq!(format!("\n{}", plain(3, 100)), expected);
    }

    #[test]
    fn routers_that_do_not_fit_go_below_the_others() {
        let text = plain(3, 50);
        assert!(text.lines().all(|line| line.chars().count() <= 50), "{text}");
        assert_eq!(text.matches("perplexity\n").count(), 2, "{text}");
        assert!(text.contains(&format!("\n{}dpo\n", " ".repeat(18))), "{text}");
    }

    #[test]
    fn one_router_alone_is_not_the_best_of_anything() {
        let text = plain(1, 80);
        assert!(!text.contains('*') && !text.contains("+0"), "{text}");
    }
}
