//! The other side of an integer product: activations in blocks of 32 signed bytes.

/// 32 activations: `x[k] ≈ scale · qs[k]`.
///
/// `scale = max|x| / 127` and `qs[k] = round(x[k] · (127 / max|x|))`, ties to even, so
/// `|x[k] − scale · qs[k]| ≤ scale · (½ + 2⁻¹⁶)`: half a step, and a little for the three
/// roundings on the way. The scale is a full float because activations span more than half
/// precision does; sums of halves serve formats with minima and groups of 16.
///
/// * A block of zeros, or one whose scale would be below the smallest normal float (2⁻¹²⁶),
///   has scale 0 and only zeros.
/// * A block with a NaN or an infinity has scale NaN and only zeros: the products it enters
///   become NaN, so that a broken model is seen and not smoothed over.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Q8Block {
    /// Factor of all 32.
    pub scale: f32,
    /// Sums of `qs[..16]` and of `qs[16..]`.
    pub sums: [i16; 2],
    /// −127 ..= 127.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<Q8Block>() == 40);

impl Q8Block {
    /// Activations per block.
    pub const LEN: usize = 32;

    /// Quantizes `x[..32]`.
    ///
    /// # Panics
    /// If `x` is shorter.
    pub fn quantize(x: &[f32]) -> Q8Block {
        let x = &x[..Self::LEN];
        // As integers, because there NaN and infinity are larger than every number.
        let amax = f32::from_bits(x.iter().map(|v| v.abs().to_bits()).fold(0, u32::max));
        if !amax.is_finite() {
            return Q8Block { scale: f32::NAN, ..Q8Block::default() };
        }
        let scale = amax / 127.0;
        if scale < f32::MIN_POSITIVE {
            return Q8Block::default();
        }
        let inverse = 127.0 / amax;
        let qs: [i8; 32] = std::array::from_fn(|k| (x[k] * inverse).round_ties_even() as i8);
        let sum = |half: &[i8]| half.iter().map(|q| i16::from(*q)).sum();
        Q8Block { scale, sums: [sum(&qs[..16]), sum(&qs[16..])], qs }
    }

    /// Sum of all 32 codes.
    pub fn sum(&self) -> i32 {
        i32::from(self.sums[0]) + i32::from(self.sums[1])
    }
}

/// Quantizes a row, whose length is a multiple of 32, into as many blocks as it fills.
///
/// # Panics
/// If `blocks` is shorter than `x.len() / 32`.
pub fn quantize_activations(x: &[f32], blocks: &mut [Q8Block]) {
    let rows = x.chunks_exact(Q8Block::LEN);
    let blocks = &mut blocks[..rows.len()];
    for (x, block) in rows.zip(blocks) {
        *block = Q8Block::quantize(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_is_127_and_ties_go_to_even() {
        let mut x = [0.0; 32];
        x[0] = -127.0;
        x[1] = 2.5;
        x[2] = 3.5;
        x[20] = 0.5;
        let b = Q8Block::quantize(&x);
        assert_eq!((b.scale, &b.qs[..3], b.qs[20]), (1.0, &[-127, 2, 4][..], 0));
        assert_eq!((b.sums, b.sum()), ([-121, 0], -121));
    }

    #[test]
    fn the_error_is_half_a_step() {
        for seed in 0..200u32 {
            let x: [f32; 32] = std::array::from_fn(|k| {
                let bits = (seed * 32 + k as u32).wrapping_mul(2_654_435_761);
                (bits as f32 / u32::MAX as f32 - 0.5) * 10f32.powi(seed as i32 % 60 - 30)
            });
            let b = Q8Block::quantize(&x);
            for (x, q) in x.iter().zip(b.qs) {
                let error = (f64::from(*x) - f64::from(b.scale) * f64::from(q)).abs();
                assert!(error <= f64::from(b.scale) * (0.5 + 2f64.powi(-16)), "{x} as {q} x {}", b.scale);
            }
        }
    }

    #[test]
    fn zeros_and_denormals_have_scale_zero() {
        assert_eq!(Q8Block::quantize(&[0.0; 32]), Q8Block::default());
        assert_eq!(Q8Block::quantize(&[1e-40; 32]), Q8Block::default());
        let smallest = f32::MIN_POSITIVE * 127.0;
        assert_eq!(Q8Block::quantize(&[smallest; 32]).qs, [127; 32]);
        assert_eq!(Q8Block::quantize(&[f32::MAX; 32]).qs, [127; 32]);
    }

    #[test]
    fn what_is_not_a_number_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 32];
            x[7] = bad;
            let b = Q8Block::quantize(&x);
            assert!(b.scale.is_nan());
            assert_eq!((b.qs, b.sums), ([0; 32], [0; 2]));
        }
    }
}
