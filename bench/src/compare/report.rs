//! What a comparison came to: as a table for people and as JSON for scripts.

use std::fmt;

use serde::Serialize;

use super::lane::{Lane, Load};
use crate::report::{Paired, Series, Summary, Table};
use crate::traffic::{LatencySummary, Round};

/// Lanes measured in one run.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What is compared.
    pub title: String,
    /// Length of a window, seconds.
    pub window_s: f64,
    /// The baseline first.
    pub lanes: Vec<LaneReport>,
}

/// One lane's windows.
#[derive(Clone, Debug, Serialize)]
pub struct LaneReport {
    /// Device and case.
    pub lane: Lane,
    /// How it went.
    pub outcome: Outcome,
}

/// How a lane went.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was measured.
    Measured {
        /// In order; none where only latency was measured.
        rounds: Vec<Round>,
        /// Over all windows, where it was measured.
        latency: Option<LatencySummary>,
    },
    /// It did not come up, or the device cannot do this.
    Unavailable {
        /// Why.
        reason: String,
    },
}

impl LaneReport {
    /// Its windows; empty if it was not measured.
    #[must_use]
    pub fn rounds(&self) -> &[Round] {
        match &self.outcome {
            Outcome::Measured { rounds, .. } => rounds,
            Outcome::Unavailable { .. } => &[],
        }
    }

    /// Latency, if it was measured.
    #[must_use]
    pub fn latency(&self) -> Option<LatencySummary> {
        match self.outcome {
            Outcome::Measured { latency, .. } => latency,
            Outcome::Unavailable { .. } => None,
        }
    }

    fn series(&self, figure: impl Fn(&Round) -> f64) -> Series {
        Series::new(self.rounds().iter().map(figure))
    }

    /// Millions of frames per second.
    #[must_use]
    pub fn mpps(&self) -> Option<Summary> {
        self.series(|round| round.mpps).summary()
    }

    /// Gigabits per second, of the ring's bytes.
    #[must_use]
    pub fn gbit_per_s(&self) -> Option<Summary> {
        self.series(|round| round.gbit_per_s).summary()
    }

    /// Lost frames, of those that the device took in all windows.
    #[must_use]
    pub fn loss(&self) -> f64 {
        let sum = |figure: fn(&Round) -> u64| self.rounds().iter().map(figure).sum::<u64>() as f64;
        sum(|round| round.lost) / sum(|round| round.sent).max(1.0)
    }
}

impl Comparison {
    /// Ratio of a lane to the first, window by window.
    #[must_use]
    pub fn ratio(&self, lane: usize) -> Option<Summary> {
        let mut paired = Paired::default();
        for (subject, baseline) in self.lanes[lane].rounds().iter().zip(self.lanes[0].rounds()) {
            paired.push(subject.mpps, baseline.mpps);
        }
        paired.ratio()
    }

    /// As JSON: every window, and what they come to.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let lanes: Vec<_> = (0..)
            .zip(&self.lanes)
            .map(|(index, report)| {
                serde_json::json!({
                    "lane": report.lane, "outcome": report.outcome, "mpps": report.mpps(),
                    "gbit_per_s": report.gbit_per_s(), "loss": report.loss(), "ratio": self.ratio(index),
                })
            })
            .collect();
        serde_json::json!({ "title": self.title, "window_s": self.window_s, "lanes": lanes })
    }
}

impl Comparison {
    fn latencies(&self) -> Table {
        let mut table =
            Table::new(["latency, us", "load", "50 %", "99 %", "99.9 %", "most", "sent", "received", "lost"]);
        for report in &self.lanes {
            let Some(latency) = report.latency() else { continue };
            let load = match report.lane.case.latency {
                Some(Load::Idle) => "idle",
                _ => "10 %",
            };
            let mut row = vec![report.lane.label.clone(), load.into()];
            let figures = [latency.p50_us, latency.p99_us, latency.p999_us, latency.max_us];
            row.extend(figures.map(|figure| format!("{figure:.1}")));
            row.extend([latency.sent, latency.received, latency.lost].map(|frames| frames.to_string()));
            table.row(row);
        }
        table
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new([
            self.title.as_str(),
            "Mpps",
            "least",
            "most",
            "Gbit/s",
            "loss %",
            "idle %",
            "ratio",
            "least",
            "most",
        ]);
        for (index, report) in self.lanes.iter().enumerate() {
            if report.lane.case.latency == Some(Load::Idle) {
                continue;
            }
            let mut row = vec![report.lane.label.clone()];
            let number = |value: f64| format!("{value:.2}");
            match (report.mpps(), report.gbit_per_s()) {
                (Some(mpps), Some(gbit)) => {
                    row.extend([mpps.median, mpps.min, mpps.max, gbit.median].map(number));
                    row.push(format!("{:.3}", 100.0 * report.loss()));
                    let idle = report.series(|round| round.idle).summary().map_or(0.0, |idle| idle.median);
                    row.push(format!("{:.0}", 100.0 * idle));
                    match self.ratio(index) {
                        Some(ratio) => row.extend([ratio.median, ratio.min, ratio.max].map(number)),
                        None => row.extend(["-"; 3].map(String::from)),
                    }
                }
                _ => row.extend(["-"; 9].map(String::from)),
            }
            table.row(row);
        }
        write!(formatter, "{table}")?;
        if self.lanes.iter().any(|report| report.lane.case.latency.is_some()) {
            write!(formatter, "{}", self.latencies())?;
        }
        for report in &self.lanes {
            if let Outcome::Unavailable { reason } = &report.outcome {
                // A daemon's log is quoted from its second line on: what comes first in it is why. JSON has all.
                let reason: Vec<_> = reason.lines().take(2).collect();
                writeln!(formatter, "{}: not measured: {}", report.lane.label, reason.join(" "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(label: &str, mpps: &[f64]) -> LaneReport {
        let round = |mpps: &f64| Round {
            mpps: *mpps,
            gbit_per_s: mpps * 0.512,
            sent: 1000,
            received: 999,
            lost: 1,
            corrupt: 0,
            foreign: 0,
            in_order: true,
            idle: 0.5,
        };
        let lane = Lane { label: label.into(), ..label.parse().unwrap() };
        LaneReport { lane, outcome: Outcome::Measured { rounds: mpps.iter().map(round).collect(), latency: None } }
    }

    #[test]
    fn ratio_is_that_of_windows_in_the_same_round() {
        let comparison = Comparison {
            title: "64 B".into(),
            window_s: 0.3,
            lanes: vec![lane("io", &[10.0, 4.0, 8.0]), lane("dreamwire", &[12.0, 6.0, 8.0])],
        };
        assert_eq!(comparison.ratio(1).unwrap().median, 1.2);
        assert_eq!(comparison.lanes[1].loss(), 0.001);
        let json = comparison.to_json();
        assert_eq!(json["lanes"][1]["mpps"]["median"], 8.0);
        assert_eq!(json["lanes"][1]["ratio"]["max"], 1.5);
        let table = comparison.to_string();
        assert_eq!(
            table.lines().nth(2).unwrap().split_whitespace().collect::<Vec<_>>()[..3],
            ["dreamwire", "8.00", "6.00"]
        );
    }

    #[test]
    fn plot_has_a_bar_for_each_lane_that_was_measured() {
        let mut lanes = vec![lane("io", &[10.0, 4.0, 8.0]), lane("a < b", &[12.0, 6.0, 8.0])];
        let unavailable = Outcome::Unavailable { reason: "not installed".into() };
        lanes.push(LaneReport { lane: "ovs".parse().unwrap(), outcome: unavailable });
        let comparison = Comparison { title: "64 B".into(), window_s: 0.3, lanes };
        let svg = crate::compare::svg(&[comparison]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        // The background is one too, and the legend has one for each device.
        assert_eq!(svg.matches("<rect").count(), 5, "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains("not measured"), "{svg}");
        assert!(svg.contains("(baseline: io)") && svg.contains("8.00 Mpps, 1.20 x"), "{svg}");
    }

    #[test]
    fn plot_has_large_frames_in_gigabits() {
        let mut report = lane("dreamwire", &[0.05]);
        report.lane.case.size = 65_214;
        let svg =
            crate::compare::svg(&[Comparison { title: "TSO".into(), window_s: 0.3, lanes: vec![report] }]).unwrap();
        // 0.512 Gbit/s per Mpps, as all of these rounds.
        assert!(svg.contains("0.03 Gbit/s, 1.00 x") && !svg.contains("Mpps"), "{svg}");
    }

    #[test]
    fn latency_has_a_table_and_bars_of_its_own() {
        let mut report = lane("io,wake-up", &[]);
        let summary = LatencySummary {
            frames: 9,
            sent: 12,
            received: 9,
            lost: 3,
            p50_us: 12.3,
            p99_us: 45.6,
            p999_us: 50.0,
            max_us: 60.0,
        };
        if let Outcome::Measured { latency, .. } = &mut report.outcome {
            *latency = Some(summary);
        }
        let comparison = Comparison { title: "wake-up".into(), window_s: 0.3, lanes: vec![report] };
        let row: Vec<_> = ["io,wake-up", "idle", "12.3", "45.6", "50.0", "60.0", "12", "9", "3"].into();
        assert!(comparison.to_string().lines().any(|line| line.split_whitespace().eq(row.iter().copied())));
        let svg = crate::compare::svg(&[comparison]).unwrap();
        assert!(svg.contains("12.3 us, 99 %: 45.6") && !svg.contains("not measured"), "{svg}");
    }

    #[test]
    fn a_lane_that_did_not_come_up_says_why() {
        let mut comparison = Comparison { title: "64 B".into(), window_s: 0.3, lanes: vec![lane("io", &[1.0])] };
        let lane = "ovs".parse().unwrap();
        comparison.lanes.push(LaneReport { lane, outcome: Outcome::Unavailable { reason: "not installed".into() } });
        assert!(comparison.to_string().contains("ovs: not measured: not installed"));
        assert_eq!(comparison.ratio(1), None);
    }
}
