//! Comparisons as one SVG: a bar per lane from zero to its median, a line from its slowest window to its quickest.
//!
//! One colour per device, the same in every comparison. Each comparison has an axis of its own: Mpps, or Gbit/s where frames are
//! so large that frames per second say little.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{Comparison, LaneReport};
use crate::report::Summary;
use crate::traffic::LIMITED_BYTES;

/// Pixels.
const WIDTH: u32 = 900;
const MARGIN: i32 = 20;
const ROW: i32 = 22;
const BAR: i32 = 14;
/// Where bars begin, and how long the axis is.
const LABELS: i32 = 240;
const BARS: i32 = 460;
/// Above the first comparison: legend, caption, a gap.
const HEAD_ROWS: usize = 3;
/// Of a comparison besides its lanes: title, axis, a gap.
const FRAME_ROWS: usize = 3;
/// Steps between the marks of an axis, at most.
const STEPS_MAX: f64 = 6.0;
const TITLE_PIXELS: i32 = 16;
const TEXT_PIXELS: i32 = 13;
const MARK_PIXELS: i32 = 11;

const CAPTION: &str = "Bar: median over rounds. Line: least to most over rounds. \
                       x: ratio to the baseline named, median over paired rounds. \
                       Latency: 50 %, line to 99 %.";

/// Devices with a colour of their own in every report; others take the rest in turn.
const KNOWN: [&str; 4] = ["io", "dreamwire", "ovs", "kernel"];
/// Grey, and the colours of Okabe and Ito, which people who see no red or no green can tell apart.
const COLOURS: [RGBColor; 7] = [
    RGBColor(153, 153, 153),
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
];
const GRID: RGBColor = RGBColor(221, 221, 221);

/// Draws them one below the other, each to its own scale.
///
/// # Errors
/// The drawing library's words.
pub fn svg(comparisons: &[Comparison]) -> Result<String, String> {
    let rows: usize = comparisons.iter().map(|comparison| comparison.lanes.len() + FRAME_ROWS).sum();
    let height = (HEAD_ROWS + rows) as u32 * ROW as u32 + 2 * MARGIN as u32;
    let mut text = String::new();
    draw(&mut text, (WIDTH, height), comparisons).map_err(|error| error.to_string())?;
    Ok(text)
}

type Done = Result<(), Box<dyn std::error::Error>>;

fn draw(text: &mut String, size: (u32, u32), comparisons: &[Comparison]) -> Done {
    let root = SVGBackend::with_string(text, size).into_drawing_area();
    root.fill(&WHITE)?;
    let sheet = Sheet { root: &root, devices: devices(comparisons) };
    sheet.legend(comparisons, MARGIN)?;
    sheet.write(CAPTION, (MARGIN, MARGIN + ROW), TEXT_PIXELS, HPos::Left)?;
    let mut y = MARGIN + HEAD_ROWS as i32 * ROW;
    for comparison in comparisons {
        sheet.comparison(comparison, y)?;
        y += (comparison.lanes.len() + FRAME_ROWS) as i32 * ROW;
    }
    root.present()?;
    Ok(())
}

/// What is drawn on.
struct Sheet<'a, 'b> {
    root: &'a DrawingArea<SVGBackend<'b>, Shift>,
    /// In the order of their colours.
    devices: Vec<&'a str>,
}

impl Sheet<'_, '_> {
    fn colour(&self, device: &str) -> RGBColor {
        let index = self.devices.iter().position(|known| *known == device).unwrap_or(0);
        COLOURS[index % COLOURS.len()]
    }

    fn write(&self, words: impl Into<String>, at: (i32, i32), pixels: i32, anchor: HPos) -> Done {
        let style = ("sans-serif", pixels).into_font().color(&BLACK).pos(Pos::new(anchor, VPos::Top));
        Ok(self.root.draw(&Text::new(words.into(), at, style))?)
    }

    fn line(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Done {
        Ok(self.root.draw(&PathElement::new([from, to], colour))?)
    }

    fn bar(&self, from: (i32, i32), width: i32, device: &str) -> Done {
        let corners = [from, (from.0 + width, from.1 + BAR)];
        Ok(self.root.draw(&Rectangle::new(corners, self.colour(device).filled()))?)
    }

    /// The devices of which there is a bar.
    fn legend(&self, comparisons: &[Comparison], y: i32) -> Done {
        let mut x = MARGIN;
        for device in &self.devices {
            let mut lanes = comparisons.iter().flat_map(|comparison| &comparison.lanes);
            if lanes.any(|report| {
                report.lane.device == *device && (!report.rounds().is_empty() || report.latency().is_some())
            }) {
                self.bar((x, y), BAR, device)?;
                self.write(*device, (x + BAR + 6, y), TEXT_PIXELS, HPos::Left)?;
                x += BAR + 30 + device.chars().count() as i32 * TEXT_PIXELS * 2 / 3;
            }
        }
        Ok(())
    }

    fn comparison(&self, comparison: &Comparison, mut y: i32) -> Done {
        let baseline = comparison.lanes.first().map_or("", |report| &report.lane.label);
        let title = format!("{} (baseline: {baseline})", comparison.title);
        self.write(title, (MARGIN, y), TITLE_PIXELS, HPos::Left)?;
        y += ROW;
        let figure = Figure::of(comparison);
        let most = comparison.lanes.iter().filter_map(|report| figure.summary(report)).map(|figure| figure.max);
        let scale = Scale::to(most.fold(0.0, f64::max));
        self.axis(&scale, figure.unit(), y, comparison.lanes.len() as i32 * ROW)?;
        for (index, report) in comparison.lanes.iter().enumerate() {
            self.write(report.lane.label.clone(), (MARGIN, y), TEXT_PIXELS, HPos::Left)?;
            if let Some(summary) = figure.summary(report) {
                self.bar((LABELS, y), scale.pixels(summary.median), &report.lane.device)?;
                let (from, to) = (LABELS + scale.pixels(summary.min), LABELS + scale.pixels(summary.max));
                self.line((from, y + BAR / 2), (to, y + BAR / 2), BLACK)?;
                let words = figure.words(comparison, index, &summary);
                self.write(words, (LABELS + BARS + MARGIN, y), TEXT_PIXELS, HPos::Left)?;
            } else {
                self.write("not measured", (LABELS + 6, y), TEXT_PIXELS, HPos::Left)?;
            }
            y += ROW;
        }
        Ok(())
    }

    /// Marks from zero on, behind bars that take `height`; the last one has the unit.
    fn axis(&self, scale: &Scale, unit: &str, y: i32, height: i32) -> Done {
        let below = y + height;
        for step in 0..=scale.steps {
            let value = f64::from(step) * scale.step;
            let x = LABELS + scale.pixels(value);
            self.line((x, y - 4), (x, below), GRID)?;
            let unit = if step == scale.steps { format!(" {unit}") } else { String::new() };
            let decimals = scale.decimals();
            self.write(format!("{value:.decimals$}{unit}"), (x, below + 2), MARK_PIXELS, HPos::Center)?;
        }
        self.line((LABELS, below), (LABELS + BARS, below), BLACK)
    }
}

/// All devices, those with a colour of their own first.
fn devices(comparisons: &[Comparison]) -> Vec<&str> {
    let mut devices = KNOWN.to_vec();
    for report in comparisons.iter().flat_map(|comparison| &comparison.lanes) {
        if !devices.contains(&report.lane.device.as_str()) {
            devices.push(&report.lane.device);
        }
    }
    devices
}

/// What the bars of a comparison stand for.
#[derive(Clone, Copy, Debug)]
enum Figure {
    Mpps,
    GbitPerS,
    LatencyUs,
}

impl Figure {
    fn of(comparison: &Comparison) -> Self {
        if comparison.lanes.iter().any(|report| report.latency().is_some()) {
            return Self::LatencyUs;
        }
        let is_large = comparison.lanes.iter().any(|report| report.lane.case.size > LIMITED_BYTES);
        if is_large { Self::GbitPerS } else { Self::Mpps }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Mpps => "Mpps",
            Self::GbitPerS => "Gbit/s",
            Self::LatencyUs => "us",
        }
    }

    fn words(self, comparison: &Comparison, index: usize, summary: &Summary) -> String {
        if matches!(self, Self::LatencyUs) {
            return format!("{:.1} us, 99 %: {:.1}", summary.median, summary.max);
        }
        let ratio = comparison.ratio(index).map_or(String::new(), |ratio| format!(", {:.2} x", ratio.median));
        format!("{:.2} {}{ratio}", summary.median, self.unit())
    }

    fn summary(self, report: &LaneReport) -> Option<Summary> {
        match self {
            Self::Mpps => report.mpps(),
            Self::GbitPerS => report.gbit_per_s(),
            Self::LatencyUs => report.latency().map(|latency| Summary {
                median: latency.p50_us,
                min: latency.p50_us,
                max: latency.p99_us,
                spread: 0.0,
            }),
        }
    }
}

/// An axis from zero on.
#[derive(Clone, Copy, Debug)]
struct Scale {
    step: f64,
    steps: u32,
}

impl Scale {
    /// In steps of 1, 2 or 5 times a power of ten, the last of them at or above `most`.
    fn to(most: f64) -> Self {
        if most <= 0.0 {
            return Self { step: 1.0, steps: 1 };
        }
        let power = 10_f64.powf((most / STEPS_MAX).log10().floor());
        let step = [1.0, 2.0, 5.0].map(|factor| factor * power).into_iter().find(|step| most / step <= STEPS_MAX);
        let step = step.unwrap_or(10.0 * power);
        Self { step, steps: (most / step).ceil().max(1.0) as u32 }
    }

    fn pixels(&self, value: f64) -> i32 {
        (f64::from(BARS) * value / (self.step * f64::from(self.steps))) as i32
    }

    /// Digits after the point that tell marks apart.
    fn decimals(&self) -> usize {
        (-self.step.log10().floor()).max(0.0) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_ends_at_a_round_number_above_the_longest_bar() {
        for (most, step, steps, decimals) in
            [(17.2, 5.0, 4, 0), (12.0, 2.0, 6, 0), (0.021, 0.005, 5, 3), (59.0, 10.0, 6, 0)]
        {
            let scale = Scale::to(most);
            assert!((scale.step - step).abs() < 1e-9, "{most}: {scale:?}");
            assert_eq!((scale.steps, scale.decimals()), (steps, decimals), "{most}");
        }
        assert_eq!(Scale::to(0.0).steps, 1);
    }

    #[test]
    fn a_device_has_one_colour_and_others_than_the_known_follow() {
        let lanes = ["old", "ovs", "old,packed"].map(|lane| LaneReport {
            lane: lane.parse().unwrap(),
            outcome: crate::compare::Outcome::Unavailable { reason: String::new() },
        });
        let comparison = Comparison { title: String::new(), window_s: 0.3, lanes: lanes.into() };
        assert_eq!(devices(&[comparison]), ["io", "dreamwire", "ovs", "kernel", "old"]);
    }
}
