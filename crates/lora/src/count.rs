//! How many parameters a model has, and how many of them train.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

/// Numbers of parameters, printed the way PEFT's `print_trainable_parameters` prints them.
///
/// ```
/// use lora::ParameterCount;
///
/// let count = ParameterCount { trainable: 294_912, all: 124_734_720 };
/// assert_eq!(
///     count.to_string(),
///     "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
/// );
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// Numbers that training changes.
    pub trainable: usize,
    /// All numbers, frozen ones included.
    pub all: usize,
}

impl ParameterCount {
    /// 100 · trainable / all; 0 when there is no parameter at all.
    ///
    /// ```
    /// use lora::ParameterCount;
    ///
    /// assert_eq!(ParameterCount { trainable: 1, all: 8 }.percent(), 12.5);
    /// assert_eq!(ParameterCount::default().percent(), 0.0);
    /// ```
    #[must_use]
    pub fn percent(&self) -> f64 {
        match self.all {
            0 => 0.0,
            all => 100.0 * self.trainable as f64 / all as f64,
        }
    }
}

impl fmt::Display for ParameterCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "trainable params: {} || all params: {} || trainable%: {:.4}",
            grouped(self.trainable),
            grouped(self.all),
            self.percent()
        )
    }
}

impl Add for ParameterCount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            trainable: self.trainable + other.trainable,
            all: self.all + other.all,
        }
    }
}

impl Sum for ParameterCount {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

/// A number with a comma between groups of three digits.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_three() {
        for (number, text) in [
            (0, "0"),
            (7, "7"),
            (999, "999"),
            (1_000, "1,000"),
            (12_345, "12,345"),
            (123_456, "123,456"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn counts_add_up() {
        let one = ParameterCount {
            trainable: 3,
            all: 10,
        };
        let sum: ParameterCount = [one, one, one].into_iter().sum();
        assert_eq!((sum.trainable, sum.all), (9, 30));
    }
}
