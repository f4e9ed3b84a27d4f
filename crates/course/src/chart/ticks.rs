//! Where an axis gets its marks, and how they are written.

use super::axis::Scale;
use super::number::{decimal, exponent, powered, prefixed, raised};

/// A mark on an axis; one without a label gets a lighter grid line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tick {
    pub value: f64,
    pub label: String,
}

impl Scale {
    /// About `wanted` labelled ticks inside the range. With `whole`, none between whole numbers.
    pub fn ticks(&self, wanted: usize, whole: bool) -> Vec<Tick> {
        let wanted = wanted.clamp(2, 20);
        let straight = self.even(wanted, whole);
        if !self.log {
            return straight;
        }
        let decades = self.decades(wanted);
        let labelled = decades.iter().filter(|t| !t.label.is_empty()).count();
        if labelled >= 2 { decades } else { straight }
    }

    /// Ticks at multiples of 1, 2 or 5 times a power of ten.
    fn even(&self, wanted: usize, whole: bool) -> Vec<Tick> {
        let (mut factor, mut power) = step((self.high - self.low) / wanted as f64);
        if whole && power < 0 {
            (factor, power) = (1, 0);
        }
        let size = exact(factor, power);
        let first = (self.low / size - 1e-6).ceil() as i64;
        let last = (self.high / size + 1e-6).floor() as i64;
        let largest = self.low.abs().max(self.high.abs());
        // Every tick is written in whole multiples of the step, so no digits can be off.
        (first..=last.min(first.saturating_add(100)))
            .map(|i| i * factor)
            .map(|digits| Tick {
                value: exact(digits, power),
                label: even_label(digits, power, largest),
            })
            .collect()
    }

    /// Ticks at powers of ten; over few decades also at twice and five times those.
    fn decades(&self, wanted: usize) -> Vec<Tick> {
        let first = exponent(self.low);
        let last = exponent(self.high) + 1;
        let count = self.high.log10() - self.low.log10();
        let every = (count / wanted as f64).ceil().max(1.0) as i32;
        let between = every == 1 && 3.0 * count <= wanted as f64;
        let powers = first < -4 || last > 15;
        let mut ticks = Vec::new();
        for power in first..=last {
            for factor in 1..10 {
                let value = exact(factor, power);
                let major =
                    (factor == 1 && power % every == 0) || (between && [2, 5].contains(&factor));
                if !self.holds(value) || (!major && count > 6.0) {
                    continue;
                }
                let label = if major {
                    decade_label(factor, power, powers)
                } else {
                    String::new()
                };
                ticks.push(Tick { value, label });
            }
        }
        ticks
    }
}

/// `digits` × 10^`power` as the nearest float.
fn exact(digits: i64, power: i32) -> f64 {
    format!("{digits}e{power}").parse().unwrap_or(0.0)
}

/// The next larger 1, 2 or 5 times a power of ten.
fn step(raw: f64) -> (i64, i32) {
    let power = exponent(raw);
    let rest = raw / exact(1, power);
    match rest {
        r if r <= 1.0 => (1, power),
        r if r <= 2.0 => (2, power),
        r if r <= 5.0 => (5, power),
        _ => (1, power + 1),
    }
}

fn even_label(digits: i64, power: i32, largest: f64) -> String {
    let top = exponent(largest);
    if !(-3..15).contains(&top) {
        return powered(digits, power, top);
    }
    if largest < 1e4 {
        return decimal(digits, power);
    }
    // A prefix must not cost more than three digits after the point.
    let thousands = (top / 3).min(4);
    if 3 * thousands - power > 3 {
        return decimal(digits, power);
    }
    prefixed(digits, power, thousands as usize)
}

fn decade_label(factor: i64, power: i32, powers: bool) -> String {
    if powers {
        return match (factor, power) {
            (_, 0) => factor.to_string(),
            (1, _) => format!("10{}", raised(power)),
            _ => format!("{factor}×10{}", raised(power)),
        };
    }
    prefixed(factor, power, (power.max(0) / 3) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64, log: bool, wanted: usize) -> Vec<String> {
        let ticks = Scale::new(low, high, log).ticks(wanted, false);
        let labels = ticks.into_iter().map(|t| t.label.replace('\u{a0}', " "));
        labels.filter(|l| !l.is_empty()).collect()
    }

    #[test]
    fn straight_ticks_are_round_numbers() {
        assert_eq!(
            labels(0.0, 0.5, false, 5),
            ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
        );
        assert_eq!(
            labels(0.0, 3000.0, false, 4),
            ["0", "1,000", "2,000", "3,000"]
        );
        assert_eq!(
            labels(0.0, 4e5, false, 4),
            ["0", "100 k", "200 k", "300 k", "400 k"]
        );
        assert_eq!(
            labels(0.0, 2.5e6, false, 5),
            ["0.0", "0.5 M", "1.0 M", "1.5 M", "2.0 M", "2.5 M"]
        );
        assert_eq!(labels(-1.0, 1.0, false, 2), ["−1", "0", "1"]);
        assert_eq!(labels(0.0, 2e-5, false, 2), ["0", "1×10⁻⁵", "2×10⁻⁵"]);
        assert_eq!(
            labels(1e6, 1_000_010.0, false, 2),
            ["1,000,000", "1,000,005", "1,000,010"]
        );
    }

    #[test]
    fn log_ticks_are_decades() {
        assert_eq!(
            labels(1.0, 1e6, true, 7),
            ["1", "10", "100", "1 k", "10 k", "100 k", "1 M"]
        );
        assert_eq!(
            labels(1.0, 256.0, true, 9),
            ["1", "2", "5", "10", "20", "50", "100", "200"]
        );
        assert_eq!(labels(0.001, 1.0, true, 4), ["0.001", "0.01", "0.1", "1"]);
        assert_eq!(
            labels(1e-8, 1.0, true, 5),
            ["10⁻⁸", "10⁻⁶", "10⁻⁴", "10⁻²", "1"]
        );
        assert_eq!(labels(30.0, 42.0, true, 3), ["30", "35", "40"]);
    }

    #[test]
    fn whole_ticks_stay_whole() {
        let ticks = Scale::new(1.0, 3.0, false).ticks(10, true);
        assert_eq!(ticks.len(), 3);
    }

    #[test]
    fn no_range_gives_many_ticks_or_none() {
        let mut range = 1e-100;
        while range < 1e100 {
            for log in [false, true] {
                for scale in [
                    Scale::new(range, range * 1.00001, log),
                    Scale::new(range, range * 7.3, log),
                    Scale::new(range, 1e101, log),
                ] {
                    let count = scale.ticks(6, false).len();
                    assert!((2..=200).contains(&count), "{scale:?}: {count}");
                }
            }
            range *= 1e10;
        }
    }
}
