//! Pictures as SVG: a page that panels are put on from top to bottom. The same numbers give the same bytes.

mod canvas;
mod color;
pub mod curve;
pub mod heat;

use canvas::Canvas;

/// The width of a page, in pixels as all lengths here.
pub const PAGE_WIDTH: f64 = 1100.0;
/// Around everything.
pub const MARGIN: f64 = 28.0;
/// Sizes of letters that all panels have.
const TITLE_SIZE: f64 = 17.0;
const LABEL_SIZE: f64 = 11.0;

/// What is drawn below each other.
pub trait Panel {
    /// Draws itself with its upper end at `top`, between the margins, and returns where it ends.
    fn draw(&self, canvas: &mut Canvas, top: f64) -> f64;
}

/// The page as the bytes of a file.
pub fn page(panels: &[&dyn Panel]) -> String {
    let mut canvas = Canvas::default();
    let bottom = panels.iter().fold(MARGIN, |top, panel| panel.draw(&mut canvas, top) + MARGIN);
    canvas.into_document(PAGE_WIDTH, bottom)
}
