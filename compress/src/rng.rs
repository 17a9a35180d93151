//! A small deterministic generator: the same seed gives the same pack on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014): one 64-bit state, full period, good enough for starts and seeds.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// An independent generator for item `index` of whatever this seed is for, so that parallel
    /// work draws the same numbers at any thread count.
    pub fn stream(seed: u64, index: u64) -> Self {
        let mut base = Rng(seed ^ index.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        base.next_u64();
        Rng(base.next_u64())
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n (`n` > 0), by the high part of a product.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal: the sum of twelve uniforms, which needs no logarithm and is exact enough here.
    pub fn normal(&mut self) -> f32 {
        let mut sum = 0.0f32;
        for _ in 0..3 {
            // Four 16-bit uniforms per draw.
            let mut bits = self.next_u64();
            for _ in 0..4 {
                sum += (bits & 0xFFFF) as f32 + 0.5;
                bits >>= 16;
            }
        }
        sum / 65536.0 - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let mut rng = Rng::new(7);
        let n = 200_000;
        let (mut s1, mut s2) = (0.0f64, 0.0f64);
        for _ in 0..n {
            let x = f64::from(rng.normal());
            s1 += x;
            s2 += x * x;
        }
        let mean = s1 / n as f64;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((s2 / n as f64 - 1.0).abs() < 0.02);
        assert!((0..1000).all(|_| rng.below(3) < 3));
    }

    #[test]
    fn streams_differ_and_repeat() {
        assert_eq!(Rng::stream(1, 2).next_u64(), Rng::stream(1, 2).next_u64());
        assert_ne!(Rng::stream(1, 2).next_u64(), Rng::stream(1, 3).next_u64());
    }
}
