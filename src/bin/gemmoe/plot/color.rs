//! Colours that colour-blind people tell apart, on white.

/// From nothing to the largest value. The lightness of OKLab (Ottosson 2020) falls in equal steps, so equal differences look
/// equal, in grey too; the hue goes from yellow over green to blue.
const SCALE: [[u8; 3]; 9] = [
    [250, 249, 222],
    [209, 229, 177],
    [151, 211, 152],
    [74, 192, 148],
    [4, 164, 151],
    [7, 134, 145],
    [5, 105, 133],
    [1, 76, 122],
    [30, 48, 92],
];
/// From this share of the scale on, white is read better than black.
const DARK: f64 = 0.6;

/// Of lines: those of Okabe and Ito (2008), without the yellow, which is too light for white.
const LINES: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"];
/// How the lines after the first seven are dashed.
const DASHES: [&str; 4] = ["", "6 3", "2 2", "8 3 2 3"];

pub const INK: &str = "#1f2933";
pub const FAINT_INK: &str = "#5f6b76";
pub const GRID: &str = "#e1e5e9";
pub const FRAME: &str = "#c3cad1";

/// The colour at a place of the scale from 0 to 1.
pub fn at(place: f64) -> String {
    let place = place.clamp(0.0, 1.0) * (SCALE.len() - 1) as f64;
    let below = (place as usize).min(SCALE.len() - 2);
    let share = place - below as f64;
    let mixed = |channel: usize| {
        let (from, to) = (SCALE[below][channel] as f64, SCALE[below + 1][channel] as f64);
        (from + share * (to - from)).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mixed(0), mixed(1), mixed(2))
}

/// What is written with on the colour at a place of the scale.
pub fn ink_on(place: f64) -> &'static str {
    if place < DARK { INK } else { "#ffffff" }
}

/// The colour of a line, and its dashes.
pub fn line(index: usize) -> (&'static str, &'static str) {
    (LINES[index % LINES.len()], DASHES[index / LINES.len() % DASHES.len()])
}
