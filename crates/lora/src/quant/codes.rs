//! The values that a code of 4 or 8 bits stands for.

use std::sync::OnceLock;

use super::QuantType;

/// Sixteen values that are equally likely in normal numbers, stretched to [−1, 1], with 0 among
/// them.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Sign, two bits of exponent and one of mantissa, of 12.
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// Seven steps to either side; the sixteenth code, the least, is not used.
const INT4: [f32; 16] = [
    0.0,
    1.0 / 7.0,
    2.0 / 7.0,
    3.0 / 7.0,
    4.0 / 7.0,
    5.0 / 7.0,
    6.0 / 7.0,
    1.0,
    -8.0 / 7.0,
    -1.0,
    -6.0 / 7.0,
    -5.0 / 7.0,
    -4.0 / 7.0,
    -3.0 / 7.0,
    -2.0 / 7.0,
    -1.0 / 7.0,
];

impl QuantType {
    /// What each of the sixteen codes stands for, as a part of the block's largest magnitude.
    ///
    /// NF4: the normal quantiles of evenly spaced probabilities, 7 of them negative and 8 positive,
    /// beside 0, over the largest. FP4: sign, two bits of exponent, one of mantissa. Int4: −7 to 7
    /// sevenths in two's complement; its code 8 is never made.
    ///
    /// Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E; bitsandbytes
    /// `functional.get_4bit_type`.
    ///
    /// ```
    /// use lora::quant::QuantType;
    ///
    /// assert_eq!(QuantType::Nf4.values()[7], 0.0);
    /// assert_eq!(QuantType::Fp4.values()[3], 1.0);
    /// assert_eq!(QuantType::Int4.values()[15], -1.0 / 7.0);
    /// ```
    #[must_use]
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
            Self::Int4 => &INT4,
        }
    }

    /// The values of both codes of a byte, high half first: one look where there would be two.
    pub(super) fn pairs(self) -> &'static [[f32; 2]; 256] {
        static ALL: [OnceLock<[[f32; 2]; 256]>; 3] = [const { OnceLock::new() }; 3];
        let values = self.values();
        ALL[self as usize]
            .get_or_init(|| std::array::from_fn(|byte| [values[byte >> 4], values[byte & 15]]))
    }

    /// The search for the nearest of the values.
    pub(super) fn nearest(self) -> &'static Nearest {
        static ALL: [OnceLock<Nearest>; 3] = [const { OnceLock::new() }; 3];
        // The least code of Int4 is never made.
        let unused = (self == Self::Int4).then_some(8);
        ALL[self as usize].get_or_init(|| Nearest::new(self.values(), unused))
    }
}

/// The 256 values of bitsandbytes' dynamic 8-bit type, in rising order: the nearer to 0, the finer.
///
/// With i from 0 to 6, the range 10^(i − 6) · [0.1, 1] is cut into 2^i parts, whose middles are
/// values, and so are their negatives; and 0 and 1.
///
/// Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes `functional.create_dynamic_map`.
pub(super) fn dynamic() -> &'static [f32] {
    static MAP: OnceLock<Vec<f32>> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = vec![0.0, 1.0];
        for i in 0..7 {
            let (parts, scale) = (1 << i, 10f64.powi(i - 6));
            for part in 0..parts {
                let middle = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
                map.extend([scale * middle, -scale * middle]);
            }
        }
        let mut map: Vec<f32> = map.into_iter().map(|value| value as f32).collect();
        map.sort_by(f32::total_cmp);
        map
    })
}

/// The search for the nearest of [`dynamic`]'s values.
pub(super) fn nearest_dynamic() -> &'static Nearest {
    static NEAREST: OnceLock<Nearest> = OnceLock::new();
    NEAREST.get_or_init(|| Nearest::new(dynamic(), None))
}

/// Finds the code whose value is nearest to a number.
pub(super) struct Nearest {
    /// The codes in the order of their values.
    codes: Vec<u8>,
    /// Halfway between each value and the next.
    halfway: Vec<f32>,
}

impl Nearest {
    fn new(values: &[f32], unused: Option<u8>) -> Self {
        let mut codes: Vec<u8> = (0..=u8::MAX).take(values.len()).collect();
        codes.retain(|code| Some(*code) != unused);
        let value = |code: u8| values[usize::from(code)];
        // FP4's second zero is for what rounds to 0 from above, as in bitsandbytes.
        codes.sort_by(|a, b| value(*a).total_cmp(&value(*b)));
        let halfway = codes.windows(2);
        let halfway = halfway.map(|two| (value(two[0]) + value(two[1])) / 2.0);
        Self {
            halfway: halfway.collect(),
            codes,
        }
    }

    /// The code of the value nearest to `x`, which is no NaN; of two as near the lesser value.
    pub fn of(&self, x: f32) -> u8 {
        self.codes[self.halfway.partition_point(|halfway| *halfway < x)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The part of normal numbers below `x`, by Simpson's rule from 0.
    fn normal_below(x: f64) -> f64 {
        let (n, density) = (2000, |t: f64| (-t * t / 2.0).exp());
        let h = x / f64::from(n);
        let inner = (1..n).map(|i| density(f64::from(i) * h) * f64::from(2 + 2 * (i % 2)));
        let sum = density(0.0) + inner.sum::<f64>() + density(x);
        0.5 + sum * h / 3.0 / (2.0 * std::f64::consts::PI).sqrt()
    }

    /// The number that a part `p` of all normal numbers lies below.
    fn quantile(p: f64) -> f64 {
        let (mut low, mut high) = (0.0, 6.0);
        for _ in 0..100 {
            let middle = (low + high) / 2.0;
            match normal_below(middle) < p {
                true => low = middle,
                false => high = middle,
            }
        }
        low
    }

    #[test]
    fn nf4_are_the_quantiles_of_the_paper() {
        let last = 0.967_708_3;
        let even =
            |n: i32| (0..n - 1).map(move |i| last + (0.5 - last) * f64::from(i) / f64::from(n - 1));
        let mut values: Vec<f64> = even(9).map(quantile).collect();
        values.extend(even(8).map(|p| -quantile(p)));
        values.push(0.0);
        let largest = values.iter().copied().fold(0.0, f64::max);
        let mut values: Vec<f64> = values.into_iter().map(|v| v / largest).collect();
        values.sort_by(f64::total_cmp);
        // The table has the longer side positive.
        assert_eq!(values.len(), 16);
        for (value, nf4) in values.iter().zip(NF4) {
            // bitsandbytes' are rounded to f32, some twice.
            assert!((value - f64::from(nf4)).abs() < 1.5e-7, "{value} and {nf4}");
        }
    }

    #[test]
    fn every_value_is_its_own_nearest() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
            for (code, value) in (0u8..).zip(quant_type.values()) {
                // The second zero of FP4, and the code that Int4 does not use.
                if quant_type != QuantType::Nf4 && code == 8 {
                    continue;
                }
                assert_eq!(
                    quant_type.nearest().of(*value),
                    code,
                    "{quant_type:?} {value}"
                );
            }
        }
        for (code, value) in (0u8..=255).zip(dynamic()) {
            assert_eq!(nearest_dynamic().of(*value), code, "{value}");
        }
        assert_eq!((dynamic().len(), nearest_dynamic().codes.len()), (256, 256));
    }

    #[test]
    fn nearest_is_the_least_distance() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
            let values = quant_type.values();
            for i in -1100..=1100 {
                let x = i as f32 / 1000.0 + 1e-5;
                let got = (x - values[usize::from(quant_type.nearest().of(x))]).abs();
                let made = |code: &usize| quant_type == QuantType::Nf4 || *code != 8;
                let best = (0..16).filter(made).map(|code| (x - values[code]).abs());
                assert_eq!(
                    got,
                    best.fold(f32::INFINITY, f32::min),
                    "{quant_type:?} {x}"
                );
            }
        }
    }
}
