//! NumPy's random numbers, so that a seed gives the start that it gives in Gymnasium.

use rand::RngCore;
use rand_pcg::Pcg64;

/// What `numpy.random.default_rng(seed)` gives: a `SeedSequence` that seeds a PCG64.
///
/// Source: NumPy 2.4, `bit_generator.pyx` (after M. O'Neill's `seed_seq_fe`) and `_pcg64.pyx`.
#[derive(Clone, Debug)]
pub(super) struct NumpyRandom(Pcg64);

impl NumpyRandom {
    pub(super) fn seeded(seed: u32) -> Self {
        let words = seed_sequence(seed);
        let wide = |i: usize| u128::from(words[i]) | u128::from(words[i + 1]) << 32;
        // Four u64, the high half of each u128 first.
        let state = wide(0) << 64 | wide(2);
        let stream = wide(4) << 64 | wide(6);
        Self(Pcg64::new(state, stream))
    }

    /// `Generator.uniform(low, high)`.
    pub(super) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        let unit = (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        low + (high - low) * unit
    }
}

/// Eight words of `SeedSequence(seed).generate_state`.
fn seed_sequence(seed: u32) -> [u32; 8] {
    let mut constant = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ value >> 16
    };
    let mix = |x: u32, y: u32| {
        let mixed = x
            .wrapping_mul(0xca01_f9dd)
            .wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ mixed >> 16
    };
    let mut pool = [seed, 0, 0, 0].map(&mut hash);
    for from in 0..4 {
        for to in (0..4).filter(|to| *to != from) {
            pool[to] = mix(pool[to], hash(pool[from]));
        }
    }
    let mut constant = 0x8b51_f9dd_u32;
    std::array::from_fn(|i| {
        let word = pool[i % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let word = word.wrapping_mul(constant);
        word ^ word >> 16
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `numpy.random.SeedSequence(seed).generate_state(8)` and
    /// `numpy.random.default_rng(seed).random()`, by NumPy 2.4.6.
    #[test]
    fn what_numpy_gives() {
        let first = |seed| {
            let mut random = NumpyRandom::seeded(seed);
            (seed_sequence(seed)[7], random.uniform(0.0, 1.0))
        };
        assert_eq!(first(0), (0x2c40_99de, 0.636_961_687_321_454_3));
        assert_eq!(first(123), (0x136d_e7e3, 0.682_351_863_248_143_5));
        assert_eq!(
            first(2_147_483_647),
            (0xdeb6_da58, 0.270_854_099_145_114_27)
        );
    }
}
