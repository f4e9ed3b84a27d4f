//! Numbers as a reader wants them: 1,234, 3 M, 2×10⁻⁷, and never 0.30000000000000004.

/// A space at which no line breaks.
const NBSP: char = '\u{a0}';

/// Prefixes for powers of a thousand.
const PREFIXES: [&str; 5] = ["", "k", "M", "G", "T"];

/// The decimal number `digits` × 10^`power`, written exactly.
pub(super) fn decimal(digits: i64, power: i32) -> String {
    let sign = if digits < 0 { "−" } else { "" };
    let mut text = digits.unsigned_abs().to_string();
    if power >= 0 {
        if digits != 0 {
            text.push_str(&"0".repeat(power as usize));
        }
        return format!("{sign}{}", grouped(&text));
    }
    let places = power.unsigned_abs() as usize;
    if text.len() <= places {
        text = "0".repeat(places + 1 - text.len()) + &text;
    }
    let (whole, part) = text.split_at(text.len() - places);
    format!("{sign}{}.{part}", grouped(whole))
}

/// With a prefix for 1000^`thousands`.
pub(super) fn prefixed(digits: i64, power: i32, thousands: usize) -> String {
    let number = decimal(digits, power - 3 * thousands as i32);
    match PREFIXES.get(thousands) {
        Some(&prefix) if !prefix.is_empty() && digits != 0 => format!("{number}{NBSP}{prefix}"),
        _ => number,
    }
}

/// As a multiple of 10^`exponent`.
pub(super) fn powered(digits: i64, power: i32, exponent: i32) -> String {
    if digits == 0 {
        return "0".into();
    }
    format!(
        "{}×10{}",
        decimal(digits, power - exponent),
        raised(exponent)
    )
}

/// An exponent in raised digits.
pub(super) fn raised(exponent: i32) -> String {
    exponent
        .to_string()
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            '1' => '¹',
            '2' => '²',
            '3' => '³',
            d => char::from_u32(0x2070 + d.to_digit(10).unwrap_or(0)).unwrap_or(d),
        })
        .collect()
}

/// A number for the text: all digits of a whole number, about four of others.
pub(super) fn plain(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return decimal(value as i64, 0);
    }
    rounded(value, (exponent(value) + 2).clamp(4, 15) as usize)
}

/// A number for the top of a bar or a cell: about three digits.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    if (1e6..1e15).contains(&size) {
        let thousands = (exponent(value) / 3) as usize;
        let (digits, power) = significant(value, 3);
        // Rounding may have carried over into the next prefix: 999,999,999 is 1 G.
        let carried = digits.unsigned_abs() == 1 && power == 3 * (thousands as i32 + 1);
        return prefixed(digits, power, thousands + usize::from(carried));
    }
    if size >= 1000.0 {
        return rounded(value, (exponent(value) + 1).min(15) as usize);
    }
    rounded(value, 3)
}

/// Writes numbers that stand together with equally many digits after the point.
#[derive(Debug, Clone, Copy)]
pub(super) struct Alike {
    places: Option<i32>,
}

impl Alike {
    pub fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let largest = values.clone().fold(0.0_f64, |m, v| m.max(v.abs()));
        let whole = values.clone().all(|v| v.fract() == 0.0);
        let places = match exponent(largest) {
            _ if whole => None,
            power @ -2..=3 => Some((2 - power).clamp(0, 3)),
            _ => None,
        };
        Self { places }
    }

    /// The same, unless it would round the smallest value to less than two digits.
    pub fn of_bars(values: impl Iterator<Item = f64> + Clone) -> Self {
        let alike = Self::of(values.clone());
        let least = 10_f64.powi(1 - alike.places.unwrap_or(0));
        if values.clone().all(|v| v == 0.0 || v.abs() >= least) {
            alike
        } else {
            Self { places: None }
        }
    }

    pub fn write(&self, value: f64) -> String {
        let Some(places) = self.places else {
            return short(value);
        };
        let digits = (value * 10_f64.powi(places)).round() as i64;
        decimal(digits, -places)
    }
}

/// The power of ten of the first digit.
pub(super) fn exponent(value: f64) -> i32 {
    if value == 0.0 || !value.is_finite() {
        return 0;
    }
    let text = format!("{value:e}");
    text.split_once('e')
        .and_then(|(_, power)| power.parse().ok())
        .unwrap_or(0)
}

fn rounded(value: f64, figures: usize) -> String {
    if !value.is_finite() {
        return format!("{value}");
    }
    let (digits, power) = significant(value, figures);
    let first = exponent(value);
    if !(-4..15).contains(&first) {
        return powered(digits, power, first);
    }
    decimal(digits, power)
}

/// `value` to so many figures, as digits × 10^power without zeros at the end.
fn significant(value: f64, figures: usize) -> (i64, i32) {
    let text = format!("{value:.*e}", figures.clamp(1, 17) - 1);
    let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
    let mut power: i32 = power.parse().unwrap_or(0);
    let after_point = mantissa.split_once('.').map_or(0, |(_, part)| part.len());
    let mut digits: i64 = mantissa.replace('.', "").parse().unwrap_or(0);
    power -= after_point as i32;
    while digits != 0 && digits % 10 == 0 {
        digits /= 10;
        power += 1;
    }
    if digits == 0 {
        power = 0;
    }
    (digits, power)
}

/// Digits with a comma after every third one from the right.
pub(crate) fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (index, c) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_the_text() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.1 + 0.2, "0.3"),
            (393_216.0, "393,216"),
            (-1234.5, "−1,234.5"),
            (1.0 / 3.0, "0.3333"),
            (2e-7, "2×10⁻⁷"),
            (12_345.678, "12,345.7"),
            (1.5e300, "1.5×10³⁰⁰"),
            (0.99999999, "1"),
            (1e16, "1×10¹⁶"),
        ] {
            assert_eq!(plain(value), text, "{value}");
        }
    }

    #[test]
    fn numbers_that_stand_together() {
        let write = |values: &[f64]| {
            let alike = Alike::of_bars(values.iter().copied());
            values.iter().map(|v| alike.write(*v)).collect::<Vec<_>>()
        };
        assert_eq!(write(&[0.7, 0.874]), ["0.700", "0.874"]);
        assert_eq!(write(&[12.0, 3.21]), ["12.0", "3.2"]);
        assert_eq!(write(&[12.0, 0.0325]), ["12", "0.0325"]);
        assert_eq!(write(&[12.0, 1_234_567.0]), ["12", "1.23\u{a0}M"]);
        assert_eq!(write(&[-0.05, 0.0]), ["−0.050", "0.000"]);
    }

    #[test]
    fn numbers_above_bars() {
        for (value, text) in [
            (0.8731, "0.873"),
            (12.0, "12"),
            (999.96, "1,000"),
            (1234.4, "1,234"),
            (589_824.0, "589,824"),
            (1_769_472.0, "1.77\u{a0}M"),
            (7e9, "7\u{a0}G"),
            (999_999_999.0, "1\u{a0}G"),
            (120e6, "120\u{a0}M"),
            (0.00001, "1×10⁻⁵"),
        ] {
            assert_eq!(short(value), text, "{value}");
        }
    }
}
