//! Two things measured in turns, seconds apart: only the ratio of neighbours means anything on a shared machine.

use serde::Serialize;

use super::series::{Series, Summary};

/// Rounds of a subject and of its baseline, taken alternately.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Paired {
    subject: Vec<f64>,
    baseline: Vec<f64>,
}

impl Paired {
    /// Adds a round of each.
    pub fn push(&mut self, subject: f64, baseline: f64) {
        self.subject.push(subject);
        self.baseline.push(baseline);
    }

    /// The subject's rounds.
    pub fn subject(&self) -> Series {
        Series::new(self.subject.iter().copied())
    }

    /// The baseline's rounds.
    pub fn baseline(&self) -> Series {
        Series::new(self.baseline.iter().copied())
    }

    /// Ratio subject / baseline, round by round, summarised: its median is not the ratio of the medians.
    /// `None` if no round has a baseline above zero.
    pub fn ratio(&self) -> Option<Summary> {
        let pairs = self.subject.iter().zip(&self.baseline);
        Series::new(pairs.filter(|(_, baseline)| **baseline > 0.0).map(|(subject, baseline)| subject / baseline))
            .summary()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_taken_round_by_round() {
        let mut paired = Paired::default();
        // The machine slowed down by half in the second round, for both alike.
        for (subject, baseline) in [(12.0, 10.0), (6.0, 5.0), (11.0, 10.0)] {
            paired.push(subject, baseline);
        }
        let ratio = paired.ratio().unwrap();
        assert_eq!((ratio.median, ratio.min, ratio.max), (1.2, 1.1, 1.2));
        assert_eq!(paired.subject().summary().unwrap().median, 11.0);
    }

    #[test]
    fn rounds_without_a_baseline_do_not_count() {
        let mut paired = Paired::default();
        paired.push(1.0, 0.0);
        assert_eq!(paired.ratio(), None);
        paired.push(1.0, 2.0);
        assert_eq!(paired.ratio().unwrap().median, 0.5);
    }
}
