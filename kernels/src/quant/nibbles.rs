//! The order of 32 codes in the formats with blocks of 32: byte `j` holds weight `j` in its low
//! nibble and weight `j + 16` in its high one; fifth bits lie apart, one per weight.

/// Writes the 32 codes below 16 of `qs` to `codes[..32]`.
pub(super) fn unpack(qs: &[u8; 16], codes: &mut [u8]) {
    let (low, high) = codes[..32].split_at_mut(16);
    for ((low, high), q) in low.iter_mut().zip(high).zip(qs) {
        *low = q & 15;
        *high = q >> 4;
    }
}

/// The reverse of [`unpack`]; drops bits above the fourth.
pub(super) fn pack(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] & 15 | codes[j + 16] << 4)
}

/// Sets bit 4 of `codes[k]` where bit `k` of `qh` (little-endian) is set.
pub(super) fn add_fifth_bits(qh: [u8; 4], codes: &mut [u8]) {
    let qh = u32::from_le_bytes(qh);
    for (k, code) in codes[..32].iter_mut().enumerate() {
        *code |= (qh >> k & 1) as u8 * 16;
    }
}

/// The fifth bits of `codes`.
pub(super) fn fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let bits = codes.iter().enumerate().map(|(k, code)| u32::from(code >> 4 & 1) << k);
    bits.sum::<u32>().to_le_bytes()
}
