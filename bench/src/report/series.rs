//! One figure, measured in several rounds.

use serde::Serialize;

/// Measurements of one thing, in order of rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Series {
    values: Vec<f64>,
}

/// What a series comes to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle value; of an even number the mean of the middle two.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
    /// (max - min) / median: a difference smaller than this says nothing.
    pub spread: f64,
}

impl Series {
    /// Of these values.
    ///
    /// # Panics
    /// If one is not a number.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<_> = values.into_iter().collect();
        assert!(values.iter().all(|value| !value.is_nan()), "a measurement is not a number: {values:?}");
        Self { values }
    }

    /// The measurements.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Median, extremes and spread; `None` without measurements.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        let spread = if median == 0.0 { 0.0 } else { (max - min) / median };
        Some(Summary { median, min, max, spread })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(Series::new([3.0, 1.0, 2.0]).summary().unwrap().median, 2.0);
        assert_eq!(Series::new([4.0, 1.0, 2.0, 3.0]).summary().unwrap().median, 2.5);
        assert_eq!(Series::new([]).summary(), None);
    }

    #[test]
    fn spread_is_relative_to_the_median() {
        let summary = Series::new([8.0, 10.0, 13.0]).summary().unwrap();
        assert_eq!(summary, Summary { median: 10.0, min: 8.0, max: 13.0, spread: 0.5 });
        assert_eq!(Series::new([0.0, 0.0]).summary().unwrap().spread, 0.0);
    }
}
