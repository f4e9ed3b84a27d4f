//! A scale: from values to places between 0 and 1, straight or logarithmic.

/// The range of an axis; `low < high`, and both above 0 if it is logarithmic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    pub low: f64,
    pub high: f64,
    pub log: bool,
}

impl Scale {
    pub fn new(low: f64, high: f64, log: bool) -> Self {
        Self { low, high, log }
    }

    /// The place of a value: 0 at the lower end, 1 at the upper one.
    /// What lies far outside stays finite.
    pub fn place(&self, value: f64) -> f64 {
        let place = if self.log {
            let (low, high) = (self.low.ln(), self.high.ln());
            (value.max(f64::MIN_POSITIVE).ln() - low) / (high - low)
        } else {
            (value - self.low) / (self.high - self.low)
        };
        place.clamp(-1e4, 1e4)
    }

    /// The value at a place.
    fn value(&self, place: f64) -> f64 {
        if self.log {
            let (low, high) = (self.low.ln(), self.high.ln());
            (low + place * (high - low)).exp()
        } else {
            self.low + place * (self.high - self.low)
        }
    }

    /// The same scale with some air below and above, as shares of its length.
    pub fn widened(&self, below: f64, above: f64) -> Self {
        // An end without air stays exactly where it was.
        let end = |share: f64, place: f64, kept: f64| {
            if share > 0.0 { self.value(place) } else { kept }
        };
        Self {
            low: end(below, -below, self.low),
            high: end(above, 1.0 + above, self.high),
            log: self.log,
        }
    }

    pub fn holds(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_even_on_both_kinds_of_scale() {
        let straight = Scale::new(10.0, 30.0, false);
        assert_eq!(straight.place(20.0), 0.5);
        let log = Scale::new(1.0, 100.0, true);
        assert!((log.place(10.0) - 0.5).abs() < 1e-12);
        assert!(log.place(0.0) < 0.0 && log.place(0.0).is_finite());
        assert!(straight.place(1e100).is_finite());
    }

    #[test]
    fn widening_keeps_an_end_that_gets_no_air() {
        let scale = Scale::new(0.0, 0.3, false).widened(0.0, 0.1);
        assert_eq!(scale.low, 0.0);
        assert!((scale.high - 0.33).abs() < 1e-12);
        let log = Scale::new(1.0, 100.0, true).widened(0.5, 0.5);
        assert!((log.low - 0.1).abs() < 1e-9 && (log.high - 1000.0).abs() < 1e-6);
    }
}
