//! Eight scales and eight minima of six bits in twelve bytes: Q4_K and Q5_K
//! (source: ggml-quants.c `get_scale_min_k4`).
//!
//! Bytes 0–3 hold scales 0–3 and bytes 4–7 minima 0–3, six bits each; bytes 8–11 hold the low
//! nibbles of scales (low) and minima (high) 4–7, whose top two bits fill up bytes 0–3 and 4–7.

/// `(scales, minima)`.
pub(super) fn unpack(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let p = packed;
    let scales = |j: usize| if j < 4 { p[j] & 63 } else { p[j + 4] & 15 | p[j - 4] >> 6 << 4 };
    let mins = |j: usize| if j < 4 { p[j + 4] & 63 } else { p[j + 4] >> 4 | p[j] >> 6 << 4 };
    (std::array::from_fn(scales), std::array::from_fn(mins))
}

/// The reverse of [`unpack`]; all values are below 64.
pub(super) fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | scales[i + 4] >> 4 << 6,
        4..8 => mins[i - 4] | mins[i] >> 4 << 6,
        _ => scales[i - 4] & 15 | mins[i - 4] << 4,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_reverses() {
        let scales = [0, 63, 17, 32, 15, 16, 48, 63];
        let mins = [63, 0, 33, 21, 31, 47, 1, 62];
        assert_eq!(unpack(&pack(&scales, &mins)), (scales, mins));
        let bytes: [u8; 12] = std::array::from_fn(|i| (i as u8).wrapping_mul(97) ^ 0x5a);
        let (scales, mins) = unpack(&bytes);
        assert_eq!(pack(&scales, &mins), bytes);
    }
}
