//! Comparisons as one SVG: a bar per lane from zero to its median, a line from its slowest window to its quickest.

use plotters::prelude::*;

use super::report::{Comparison, LaneReport};

/// Pixels.
const WIDTH: u32 = 900;
const MARGIN: i32 = 20;
const ROW: i32 = 22;
const BAR: i32 = 14;
/// Where bars begin, and how long the longest is.
const LABELS: i32 = 240;
const BARS: i32 = 420;

/// Draws them one below the other, each to its own scale.
///
/// # Errors
/// The drawing library's words.
pub fn svg(comparisons: &[Comparison]) -> Result<String, String> {
    let rows: usize = comparisons.iter().map(|comparison| comparison.lanes.len() + 2).sum();
    let height = rows as u32 * ROW as u32 + 2 * MARGIN as u32;
    let mut text = String::new();
    draw(&mut text, (WIDTH, height), comparisons).map_err(|error| error.to_string())?;
    Ok(text)
}

fn draw(text: &mut String, size: (u32, u32), comparisons: &[Comparison]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, size).into_drawing_area();
    root.fill(&WHITE)?;
    let write = |words: String, at: (i32, i32), pixels: i32| {
        root.draw(&Text::new(words, at, ("sans-serif", pixels).into_font().color(&BLACK)))
    };
    let mut y = MARGIN;
    for comparison in comparisons {
        write(format!("{} (Mpps)", comparison.title), (MARGIN, y), 16)?;
        y += ROW;
        let most = comparison.lanes.iter().filter_map(LaneReport::mpps).map(|mpps| mpps.max).fold(0.0, f64::max);
        let x = |mpps: f64| LABELS + (f64::from(BARS) * mpps / most.max(f64::MIN_POSITIVE)) as i32;
        for (index, report) in comparison.lanes.iter().enumerate() {
            write(report.lane.label.clone(), (MARGIN, y), 13)?;
            if let Some(mpps) = report.mpps() {
                let colour = Palette99::pick(index);
                root.draw(&Rectangle::new([(LABELS, y), (x(mpps.median), y + BAR)], colour.filled()))?;
                let middle = y + BAR / 2;
                root.draw(&PathElement::new([(x(mpps.min), middle), (x(mpps.max), middle)], BLACK))?;
                let ratio = comparison.ratio(index).map_or(String::new(), |ratio| format!(", {:.2} x", ratio.median));
                write(format!("{:.2}{ratio}", mpps.median), (LABELS + BARS + MARGIN, y), 13)?;
            } else {
                write("not measured".into(), (LABELS, y), 13)?;
            }
            y += ROW;
        }
        y += ROW;
    }
    root.present()?;
    Ok(())
}
