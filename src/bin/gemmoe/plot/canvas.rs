//! The few shapes that pictures here are made of.

use svg::node::element::Element;
use svg::node::{Node, Text};

use super::color::{FRAME, INK};

/// Sans-serif fonts that systems have; all of them have figures of one width.
const FONTS: &str = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif";

/// Shapes, the first ones behind.
#[derive(Default)]
pub struct Canvas {
    shapes: Vec<Element>,
}

/// Where a text's place is in it.
#[derive(Clone, Copy, PartialEq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy)]
pub struct Style {
    pub size: f64,
    pub anchor: Anchor,
    pub ink: &'static str,
    pub bold: bool,
}

impl Style {
    /// Of a size, from its place on, in the usual ink.
    pub fn new(size: f64) -> Style {
        Style { size, anchor: Anchor::Start, ink: INK, bold: false }
    }

    pub fn anchored(self, anchor: Anchor) -> Style {
        Style { anchor, ..self }
    }

    pub fn inked(self, ink: &'static str) -> Style {
        Style { ink, ..self }
    }

    pub fn bold(self) -> Style {
        Style { bold: true, ..self }
    }
}

impl Canvas {
    /// A text on the line at `y`.
    pub fn text(&mut self, x: f64, y: f64, style: Style, content: &str) {
        let mut element = Element::new("text");
        element.assign("x", number(x));
        element.assign("y", number(y));
        element.assign("font-size", number(style.size));
        element.assign("fill", style.ink);
        match style.anchor {
            Anchor::Start => {}
            Anchor::Middle => element.assign("text-anchor", "middle"),
            Anchor::End => element.assign("text-anchor", "end"),
        }
        if style.bold {
            element.assign("font-weight", "600");
        }
        element.append(Text::new(printable(content)));
        self.shapes.push(element);
    }

    /// A filled rectangle, whose `title` is shown where a pointer rests on it.
    pub fn cell(&mut self, [x, y, width, height]: [f64; 4], fill: &str, title: &str) {
        let mut element = rectangle([x, y, width, height], fill);
        if !title.is_empty() {
            let mut node = Element::new("title");
            node.append(Text::new(printable(title)));
            element.append(node);
        }
        self.shapes.push(element);
    }

    /// The outline of a rectangle.
    pub fn frame(&mut self, area: [f64; 4]) {
        let mut element = rectangle(area, "none");
        element.assign("stroke", FRAME);
        self.shapes.push(element);
    }

    /// A straight line.
    pub fn rule(&mut self, [x1, y1, x2, y2]: [f64; 4], ink: &str) {
        let mut element = Element::new("line");
        for (name, value) in [("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)] {
            element.assign(name, number(value));
        }
        element.assign("stroke", ink);
        self.shapes.push(element);
    }

    /// A line through points; one point alone is a dot.
    pub fn curve(&mut self, points: &[(f64, f64)], width: f64, (ink, dashes): (&str, &str)) {
        let mut path = String::new();
        for (index, (x, y)) in points.iter().enumerate() {
            path += &format!("{}{} {}", if index == 0 { "M" } else { " L" }, number(*x), number(*y));
        }
        if points.len() == 1 {
            path += " h0.01";
        }
        let mut element = Element::new("path");
        element.assign("d", path);
        element.assign("fill", "none");
        element.assign("stroke", ink);
        element.assign("stroke-width", number(width));
        element.assign("stroke-linejoin", "round");
        element.assign("stroke-linecap", "round");
        if !dashes.is_empty() {
            element.assign("stroke-dasharray", dashes);
        }
        self.shapes.push(element);
    }

    /// A dot with a white edge.
    pub fn dot(&mut self, x: f64, y: f64, fill: &str) {
        let mut element = Element::new("circle");
        for (name, value) in [("cx", x), ("cy", y), ("r", 3.5)] {
            element.assign(name, number(value));
        }
        element.assign("fill", fill);
        element.assign("stroke", "#ffffff");
        self.shapes.push(element);
    }

    /// All of it on white.
    pub fn into_document(self, width: f64, height: f64) -> String {
        let mut document = Element::new("svg");
        document.assign("xmlns", "http://www.w3.org/2000/svg");
        document.assign("width", number(width));
        document.assign("height", number(height));
        document.assign("viewBox", format!("0 0 {} {}", number(width), number(height)));
        document.assign("font-family", FONTS);
        document.append(rectangle([0.0, 0.0, width, height], "#ffffff"));
        self.shapes.into_iter().for_each(|shape| document.append(shape));
        format!("{document}\n")
    }
}

fn rectangle([x, y, width, height]: [f64; 4], fill: &str) -> Element {
    let mut element = Element::new("rect");
    for (name, value) in [("x", x), ("y", y), ("width", width), ("height", height)] {
        element.assign(name, number(value));
    }
    element.assign("fill", fill);
    element
}

/// With at most two places after the point: `12`, `12.5`.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Without the characters that XML has no place for.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c }).collect()
}

/// About how wide a text is, for what must not run into it.
pub fn width_of(text: &str, size: f64) -> f64 {
    0.6 * size * text.chars().count() as f64
}

/// A text cut to about a width.
pub fn fitted(text: &str, size: f64, width: f64) -> String {
    if width_of(text, size) <= width {
        return text.to_owned();
    }
    let most = (width / (0.6 * size)) as usize;
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}
