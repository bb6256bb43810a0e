//! A heat map in text: a column an expert, a row a layer and a block a domain, or other rows and blocks; as many blocks side by
//! side as the terminal is wide.

use std::fmt::Write;

use anstyle::{Ansi256Color, Style};

use crate::units::cut;

/// One domain's values.
pub struct Block {
    pub title: String,
    /// `[rows][experts]`
    pub rows: Vec<Vec<f64>>,
}

/// What is drawn.
pub struct HeatMap<'a> {
    /// All of one shape.
    pub blocks: &'a [Block],
    /// What the rows are: layers, for example.
    pub rows: &'a [String],
    /// What a value is, for the legend.
    pub measure: &'a str,
    /// The value every cell would have if all experts were used alike.
    pub even: f64,
}

/// What shows how large a value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// The colour behind a number.
    Color,
    /// A character whose ink grows with the value.
    Characters,
}

/// Dark to bright, black apart: an empty cell must stand out from a dark terminal. The 256 colours are known to more
/// terminals than the 16 million.
const COLORS: [u8; 12] = [235, 17, 54, 90, 126, 161, 197, 203, 209, 215, 221, 229];
/// From here on black is read better than white.
const FIRST_BRIGHT: usize = 6;
const WHITE: u8 = 231;
const BLACK: u8 = 16;
const SHADES: [&str; 5] = ["·", "░", "▒", "▓", "█"];
/// What a row is called is cut to so many characters.
const MOST_LABEL: usize = 24;
/// Between two blocks.
const GAP: &str = "  ";

impl Paint {
    /// Colour where standard output shows it and the user lets it.
    pub fn of_stdout() -> Paint {
        match anstream::AutoStream::choice(&std::io::stdout()) {
            anstream::ColorChoice::Never => Paint::Characters,
            _ => Paint::Color,
        }
    }

    /// Widths a cell may have, the preferred one first. Numbers need the first.
    fn cell_widths(self) -> [usize; 3] {
        match self {
            Paint::Color => [4, 2, 1],
            Paint::Characters => [5, 2, 1],
        }
    }

    fn steps(self) -> usize {
        match self {
            Paint::Color => COLORS.len(),
            Paint::Characters => SHADES.len(),
        }
    }

    /// A cell of step `step` with a text of one column less than it is wide, or none.
    fn cell(self, step: usize, width: usize, text: &str) -> String {
        match self {
            Paint::Color => {
                let ink = Ansi256Color(if step < FIRST_BRIGHT { WHITE } else { BLACK });
                let style = Style::new().fg_color(Some(ink.into())).bg_color(Some(Ansi256Color(COLORS[step]).into()));
                format!("{style}{text:<width$}{style:#}")
            }
            Paint::Characters if text.is_empty() => SHADES[step].repeat(width),
            Paint::Characters => format!("{}{text} ", SHADES[step]),
        }
    }
}

impl Block {
    /// The mean over the rows, by expert.
    pub fn mean(&self) -> Vec<f64> {
        let experts = self.rows.first().map_or(0, Vec::len);
        let sum = |expert: usize| self.rows.iter().map(|row| row[expert]).sum::<f64>();
        (0..experts).map(|expert| sum(expert) / self.rows.len() as f64).collect()
    }

    /// The expert whose mean is largest, and that mean.
    pub fn largest_mean(&self) -> (usize, f64) {
        self.mean().into_iter().enumerate().fold((0, 0.0), |best, found| if found.1 > best.1 { found } else { best })
    }
}

impl HeatMap<'_> {
    /// Draws it for a terminal of `width` columns, lines ended.
    pub fn draw(&self, width: usize, paint: Paint) -> String {
        let experts = self.blocks.first().and_then(|block| block.rows.first()).map_or(0, Vec::len);
        let mean = "mean".to_owned();
        let labels: Vec<String> = self.rows.iter().chain([&mean]).map(|label| cut(label, MOST_LABEL)).collect();
        let label_width = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0).max("expert".len());
        let room = width.saturating_sub(label_width + GAP.len());
        let cell_widths = paint.cell_widths();
        let cell_width = cell_widths.into_iter().find(|cell| experts * cell <= room).unwrap_or(1);
        let has_numbers = cell_width == cell_widths[0];
        let titles = self.blocks.iter().map(|block| block.title.chars().count()).max().unwrap_or(0);
        let block_width = (experts * cell_width).max(titles.min(room));
        let in_a_row = ((room + GAP.len()) / (block_width + GAP.len())).max(1);
        let largest = self.largest();

        let mut out = String::new();
        for blocks in self.blocks.chunks(in_a_row) {
            let titles = blocks.iter().map(|block| cut(&block.title, block_width));
            line(&mut out, label_width, "", titles, block_width, GAP);
            let numbers = expert_numbers(experts, cell_width);
            line(&mut out, label_width, "expert", blocks.iter().map(|_| numbers.clone()), block_width, GAP);
            let means: Vec<Vec<f64>> = blocks.iter().map(Block::mean).collect();
            for (row, label) in labels.iter().enumerate() {
                let values = blocks.iter().zip(&means).map(|(block, mean)| block.rows.get(row).unwrap_or(mean));
                let cells = values.map(|values| {
                    let cells = values.iter().map(|value| {
                        let number = if has_numbers { format!("{:>3}", percent(*value)) } else { String::new() };
                        paint.cell(step(*value, largest, paint.steps()), cell_width, &number)
                    });
                    // Padded by hand: what colours a cell has no width.
                    cells.collect::<String>() + &" ".repeat(block_width - experts * cell_width)
                });
                line(&mut out, label_width, label, cells, 0, GAP);
            }
            out.push('\n');
        }
        self.draw_legend(&mut out, largest, paint);
        out
    }

    fn draw_legend(&self, out: &mut String, largest: f64, paint: Paint) {
        let steps = paint.steps();
        let value = |step: usize| percent(largest * step as f64 / (steps - 1) as f64);
        let scale = match paint {
            Paint::Color => {
                let swatches = (0..steps).map(|step| paint.cell(step, 2, "")).collect::<String>();
                format!("0 {swatches} {} %", percent(largest))
            }
            Paint::Characters => {
                (0..steps).map(|step| format!("{} {} %", SHADES[step], value(step))).collect::<Vec<_>>().join("  ")
            }
        };
        let _ = writeln!(out, "{}: {scale}; all alike would be {} %", self.measure, percent(self.even));
    }

    fn largest(&self) -> f64 {
        self.blocks.iter().flat_map(|block| block.rows.iter().flatten()).copied().fold(0.0, f64::max)
    }
}

/// What a row is called that is a layer.
pub fn layer_name(layer: usize) -> String {
    format!("layer {layer}")
}

/// `0.496` as `50`.
pub fn percent(value: f64) -> String {
    format!("{:.0}", value * 100.0)
}

/// Which of `steps` steps from 0 to `largest` is nearest to `value`.
fn step(value: f64, largest: f64, steps: usize) -> usize {
    if largest > 0.0 { (value / largest * (steps - 1) as f64).round() as usize } else { 0 }
}

/// A label and the blocks' parts of a line, each padded to `block_width`.
fn line(
    out: &mut String,
    label_width: usize,
    label: &str,
    parts: impl Iterator<Item = String>,
    block_width: usize,
    gap: &str,
) {
    let parts: Vec<String> = parts.map(|part| format!("{part:<block_width$}")).collect();
    let text = format!("{label:<label_width$}{gap}{}", parts.join(gap));
    let _ = writeln!(out, "{}", text.trim_end());
}

/// The experts' numbers over their columns; where those are narrow, of some of them.
fn expert_numbers(experts: usize, cell_width: usize) -> String {
    if cell_width > 2 {
        return (0..experts).map(|expert| format!("{expert:>number$} ", number = cell_width - 1)).collect();
    }
    let each = 8 / cell_width;
    (0..experts).step_by(each).map(|expert| format!("{expert:<8}")).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(title: &str, layers: &[&[f64]]) -> Block {
        Block { title: title.to_owned(), rows: layers.iter().map(|layer| layer.to_vec()).collect() }
    }

    fn draw(blocks: &[Block], width: usize, paint: Paint) -> String {
        let rows: Vec<String> = (0..blocks.first().map_or(0, |block| block.rows.len())).map(layer_name).collect();
        HeatMap { blocks, rows: &rows, measure: "share", even: 0.5 }.draw(width, paint)
    }

    #[test]
    fn blocks_stand_side_by_side_with_numbers_means_and_a_legend() {
        let blocks = [
            block("prose", &[&[1.0, 0.25, 0.75, 0.0], &[0.5, 0.25, 0.25, 1.0]]),
            block("a name longer than its block", &[&[0.0, 0.0, 1.0, 1.0], &[0.0, 0.0, 1.0, 1.0]]),
        ];
        let expected = "
         prose                         a name longer than its block
expert      0    1    2    3              0    1    2    3
layer 0  █100 ░ 25 ▓ 75 ·  0           ·  0 ·  0 █100 █100
layer 1  ▒ 50 ░ 25 ░ 25 █100           ·  0 ·  0 █100 █100
mean     ▓ 75 ░ 25 ▒ 50 ▒ 50           ·  0 ·  0 █100 █100

share: · 0 %  ░ 25 %  ▒ 50 %  ▓ 75 %  █ 100 %; all alike would be 50 %
";
        assert_eq!(format!("\n{}", draw(&blocks, 100, Paint::Characters)), expected);
    }

    #[test]
    fn blocks_that_do_not_fit_go_below_each_other() {
        let blocks = ["a", "b", "c"].map(|title| block(title, &[&[0.5, 0.5, 0.5, 0.5]]));
        let rows = |width| {
            let text = draw(&blocks, width, Paint::Characters);
            text.lines().filter(|line| line.starts_with("layer 0")).count()
        };
        // 7 for the label, and 2 + 20 a block.
        let needed = [7 + 22, 7 + 44, 7 + 66];
        assert_eq!(needed.map(rows), [3, 2, 1]);
        // Less than one block of numbers: cells without, of which two blocks fit.
        assert_eq!(needed.map(|width| rows(width - 1)), [2, 3, 2]);
    }

    #[test]
    fn many_experts_get_narrow_cells_without_numbers() {
        let values: Vec<f64> = (0..64).map(|expert| expert as f64 / 63.0).collect();
        let blocks = [block("all", &[&values])];
        for (paint, width, cells) in [
            (Paint::Characters, 400, "·  0 ·  2 "),
            (Paint::Characters, 140, "··········"),
            (Paint::Characters, 80, "········░░"),
        ] {
            let text = draw(&blocks, width, paint);
            let row = text.lines().find(|line| line.starts_with("layer 0")).unwrap();
            assert!(row.starts_with(&format!("layer 0  {cells}")), "{row}");
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
        }
        let narrow = draw(&blocks, 80, Paint::Characters);
        assert!(narrow.contains("expert   0       8       16      24      32      40      48      56\n"), "{narrow}");
        // Too narrow for any: a column each all the same.
        assert!(draw(&blocks, 10, Paint::Characters).contains("layer 0  ········░"));
    }

    #[test]
    fn colours_are_the_characters_picture_with_escapes() {
        let blocks = [block("one", &[&[1.0, 0.0]])];
        let text = draw(&blocks, 80, Paint::Color);
        let dark = "\u{1b}[38;5;231m\u{1b}[48;5;235m  0 \u{1b}[0m";
        let bright = "\u{1b}[38;5;16m\u{1b}[48;5;229m100 \u{1b}[0m";
        assert!(text.contains(&format!("layer 0  {bright}{dark}")), "{text:?}");
    }

    #[test]
    fn nothing_used_and_nothing_to_draw_are_drawn_too() {
        assert!(draw(&[block("none", &[&[0.0, 0.0]])], 80, Paint::Characters).contains("·  0 ·  0"));
        draw(&[], 80, Paint::Color);
    }
}
