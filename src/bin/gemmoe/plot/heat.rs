//! Heat maps of experts by layer: a map a domain, side by side, for one router below the other.

use super::canvas::{Anchor, Canvas, Style, fitted};
use super::color::{FAINT_INK, at, ink_on};
use super::{LABEL_SIZE, MARGIN, PAGE_WIDTH, Panel, TITLE_SIZE};
use crate::heat_map::{Block, percent};

/// The maps of one router.
pub struct Router {
    pub name: String,
    /// The value that every cell would have if all experts were used alike.
    pub even: f64,
    /// By domain; a row is a layer.
    pub blocks: Vec<Block>,
}

/// The maps of all routers, in one scale.
pub struct HeatMaps<'a> {
    pub routers: &'a [Router],
    /// What a value is.
    pub measure: &'a str,
}

const HEADING_SIZE: f64 = 14.0;
/// For the layers' numbers, left of each row of maps.
const LABELS_WIDTH: f64 = 58.0;
const GAP: f64 = 22.0;
/// Between the last layer and the mean.
const MEAN_GAP: f64 = 5.0;
const SCALE_WIDTH: f64 = 240.0;

/// Widths of cells that have room for a number, the best first.
const NUMBER_WIDTHS: [f64; 6] = [40.0, 34.0, 30.0, 28.0, 26.0, 25.0];
const ROOM: f64 = PAGE_WIDTH - 2.0 * MARGIN - LABELS_WIDTH;

/// Sizes of cells, the same for all maps of a router.
struct Cells {
    width: f64,
    height: f64,
    /// Of the number in a cell; none where it has no room.
    number_size: Option<f64>,
}

impl Cells {
    /// As wide as lets all maps stand side by side, or if they cannot, as one row of some has room for.
    fn new(maps: usize, experts: usize, layers: usize) -> Cells {
        let fit = |maps: usize, width: f64| maps as f64 * (experts as f64 * width + GAP) - GAP <= ROOM;
        let widest = |maps| NUMBER_WIDTHS.into_iter().find(|width| fit(maps, *width));
        let with_numbers = widest(maps).or_else(|| widest(4)).or_else(|| widest(2)).or_else(|| widest(1));
        let width = with_numbers.unwrap_or_else(|| 16.0f64.min(ROOM / experts as f64));
        let height = if layers <= 12 { 24.0 } else { 18.0 };
        Cells { width, height, number_size: with_numbers.map(|width| if width >= 28.0 { 11.0 } else { 10.0 }) }
    }
}

impl Panel for HeatMaps<'_> {
    fn draw(&self, canvas: &mut Canvas, top: f64) -> f64 {
        let largest = self.scale_end();
        canvas.text(MARGIN, top + TITLE_SIZE, Style::new(TITLE_SIZE).bold(), "Where tokens are sent");
        let (x, y) = (PAGE_WIDTH - MARGIN - SCALE_WIDTH, top + 4.0);
        self.draw_scale(canvas, x, y, largest);
        let mut top = top + TITLE_SIZE + 30.0;
        for router in self.routers {
            top = draw_router(canvas, router, largest, top) + 14.0;
        }
        top - 14.0
    }
}

impl HeatMaps<'_> {
    /// The end of the scale: the largest value, rounded up to a twentieth.
    fn scale_end(&self) -> f64 {
        let blocks = self.routers.iter().flat_map(|router| &router.blocks);
        let largest = blocks.flat_map(|block| block.rows.iter().flatten()).copied().fold(0.0, f64::max);
        ((largest * 20.0 - 1e-9).ceil() / 20.0).max(0.05)
    }

    fn draw_scale(&self, canvas: &mut Canvas, x: f64, y: f64, largest: f64) {
        const STEPS: usize = 60;
        let step = SCALE_WIDTH / STEPS as f64;
        for index in 0..STEPS {
            let color = at((index as f64 + 0.5) / STEPS as f64);
            // A little wider than a step: no seam is seen between two.
            let width = if index + 1 == STEPS { step } else { step + 0.5 };
            canvas.cell([x + index as f64 * step, y, width, 12.0], &color, "");
        }
        canvas.frame([x, y, SCALE_WIDTH, 12.0]);
        let style = Style::new(LABEL_SIZE).inked(FAINT_INK);
        canvas.text(x - 10.0, y + 10.0, style.anchored(Anchor::End), self.measure);
        canvas.text(x, y + 26.0, style, "0 %");
        canvas.text(x + SCALE_WIDTH / 2.0, y + 26.0, style.anchored(Anchor::Middle), &in_percent(largest / 2.0));
        canvas.text(x + SCALE_WIDTH, y + 26.0, style.anchored(Anchor::End), &in_percent(largest));
    }
}

fn in_percent(value: f64) -> String {
    let value = (value * 1000.0).round() / 10.0;
    format!("{value} %")
}

fn draw_router(canvas: &mut Canvas, router: &Router, largest: f64, top: f64) -> f64 {
    let experts = router.blocks.first().and_then(|block| block.rows.first()).map_or(0, Vec::len);
    let layers = router.blocks.first().map_or(0, |block| block.rows.len());
    let cells = Cells::new(router.blocks.len(), experts, layers);
    let width = experts as f64 * cells.width;
    let in_a_row = (((ROOM + GAP) / (width + GAP)) as usize).max(1);
    let even = format!("all experts alike would be {} %", percent(router.even));
    canvas.rule([MARGIN, top, PAGE_WIDTH - MARGIN, top], super::color::GRID);
    let name = fitted(&router.name, HEADING_SIZE, 0.6 * ROOM);
    canvas.text(MARGIN, top + 22.0, Style::new(HEADING_SIZE).bold(), &name);
    let style = Style::new(LABEL_SIZE).inked(FAINT_INK).anchored(Anchor::End);
    canvas.text(PAGE_WIDTH - MARGIN, top + 22.0, style, &even);
    let mut top = top + 34.0;
    for blocks in router.blocks.chunks(in_a_row) {
        let end = draw_labels(canvas, &cells, layers, top);
        for (index, block) in blocks.iter().enumerate() {
            let left = MARGIN + LABELS_WIDTH + index as f64 * (width + GAP);
            draw_block(canvas, &cells, block, [left, top], largest);
        }
        top = end + 14.0;
    }
    top - 14.0
}

/// Above the cells: the domain's name, and the experts' numbers.
const HEAD_HEIGHT: f64 = 36.0;

/// Where a row begins, the mean being the one after the layers.
fn row_top(cells: &Cells, row: usize, layers: usize, top: f64) -> f64 {
    top + HEAD_HEIGHT + row as f64 * cells.height + if row == layers { MEAN_GAP } else { 0.0 }
}

fn draw_labels(canvas: &mut Canvas, cells: &Cells, layers: usize, top: f64) -> f64 {
    let style = Style::new(LABEL_SIZE).inked(FAINT_INK).anchored(Anchor::End);
    let x = MARGIN + LABELS_WIDTH - 8.0;
    canvas.text(x, top + HEAD_HEIGHT - 5.0, style, "expert");
    for row in 0..=layers {
        let y = row_top(cells, row, layers, top) + cells.height / 2.0 + 4.0;
        let name = if row < layers { crate::heat_map::layer_name(row) } else { "mean".to_owned() };
        canvas.text(x, y, style, &name);
    }
    row_top(cells, layers, layers, top) + cells.height
}

fn draw_block(canvas: &mut Canvas, cells: &Cells, block: &Block, [left, top]: [f64; 2], largest: f64) {
    let layers = block.rows.len();
    let mean = block.mean();
    let experts = mean.len();
    let width = experts as f64 * cells.width;
    let title = fitted(&block.title, 12.0, width.max(60.0));
    canvas.text(left, top + 14.0, Style::new(12.0).bold(), &title);
    let style = Style::new(LABEL_SIZE).inked(FAINT_INK).anchored(Anchor::Middle);
    let each = if cells.number_size.is_some() { 1 } else { 8 };
    for expert in (0..experts).step_by(each) {
        let x = left + (expert as f64 + 0.5) * cells.width;
        canvas.text(x, top + HEAD_HEIGHT - 5.0, style, &expert.to_string());
    }
    for (row, values) in block.rows.iter().chain([&mean]).enumerate() {
        let y = row_top(cells, row, layers, top);
        let name = if row < layers { crate::heat_map::layer_name(row) } else { "mean of the layers".to_owned() };
        for (expert, value) in values.iter().enumerate() {
            let x = left + expert as f64 * cells.width;
            let place = value / largest;
            let title = format!("{}, {name}, expert {expert}: {:.1} %", block.title, 100.0 * value);
            // A white seam between cells, so that neighbours of one colour are two.
            canvas.cell([x + 0.5, y + 0.5, cells.width - 1.0, cells.height - 1.0], &at(place), &title);
            if let Some(size) = cells.number_size {
                let style = Style::new(size).inked(ink_on(place)).anchored(Anchor::Middle);
                canvas.text(x + cells.width / 2.0, y + cells.height / 2.0 + 0.36 * size, style, &percent(*value));
            }
        }
    }
    canvas.frame([left, top + HEAD_HEIGHT, width, layers as f64 * cells.height]);
    canvas.frame([left, row_top(cells, layers, layers, top), width, cells.height]);
}
