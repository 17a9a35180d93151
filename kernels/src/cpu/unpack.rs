//! Every integer format, 16 rows at a time.
//!
//! Sixteen rows × 16 bytes come in as four vectors of four rows each and are transposed within lanes;
//! then every vector holds the same four bytes of all rows, and shifts and masks do for 16
//! rows what [`IntBlock::codes`](crate::quant::IntBlock::codes) does for one.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::mem::offset_of;

use super::panel::{PanelBlock, ROWS, Slot};
use super::simd::Simd;
use crate::quant::{IQ4_NL, IQ4_VALUES, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

type Rows = [*const u8; ROWS];

/// Bytes `offset..offset + 16` of each row as four vectors of four bytes of all rows.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn columns<S: Simd>(s: S, rows: &Rows, offset: usize) -> [S::I; 4] {
    let mut x = [s.splat_i(0); 4];
    for (r, x) in x.iter_mut().enumerate() {
        // Rows r, r + 4, r + 8, r + 12: after the transposition lane l holds rows 4l .. 4l + 4.
        // SAFETY: the caller's promise.
        *x = unsafe {
            s.load_lanes([
                rows[r].add(offset),
                rows[r + 4].add(offset),
                rows[r + 8].add(offset),
                rows[r + 12].add(offset),
            ])
        };
    }
    s.transpose4(x)
}

/// A half-precision number of each row.
///
/// # Safety
/// Two bytes are readable there.
#[inline(always)]
unsafe fn half<S: Simd>(s: S, rows: &Rows, offset: usize) -> S::F {
    // SAFETY: the caller's promise.
    s.f16_low(unsafe { s.gather_u16(rows, offset) })
}

/// A word of each row.
///
/// # Safety
/// Four bytes are readable there.
#[inline(always)]
unsafe fn word<S: Simd>(s: S, rows: &Rows, offset: usize) -> S::I {
    // SAFETY: the caller's promise.
    let (low, high) = unsafe { (s.gather_u16(rows, offset), s.gather_u16(rows, offset + 2)) };
    s.or(low, s.shl::<16>(high))
}

#[inline(always)]
fn mask<S: Simd>(s: S, x: S::I, byte: u8) -> S::I {
    s.and(x, s.splat_i(i32::from_ne_bytes([byte; 4])))
}

/// Byte `j` of each word, as a number.
#[inline(always)]
fn byte<S: Simd>(s: S, x: S::I, j: usize) -> S::I {
    let x = match j {
        0 => x,
        1 => s.shr::<8>(x),
        2 => s.shr::<16>(x),
        _ => s.shr::<24>(x),
    };
    s.and(x, s.splat_i(0xff))
}

/// Byte `j` of each word, as a signed number.
#[inline(always)]
fn signed_byte<S: Simd>(s: S, x: S::I, j: usize) -> S::I {
    let x = match j {
        0 => s.shl::<24>(x),
        1 => s.shl::<16>(x),
        2 => s.shl::<8>(x),
        _ => x,
    };
    s.sra::<24>(x)
}

/// Bits 2p and 2p + 1 of every byte.
#[inline(always)]
fn pair<S: Simd>(s: S, x: S::I, p: usize) -> S::I {
    let x = match p {
        0 => x,
        1 => s.shr::<2>(x),
        2 => s.shr::<4>(x),
        _ => s.shr::<6>(x),
    };
    mask(s, x, 3)
}

/// Bit `n` of every byte, moved to bit `TO`, which is 2 or 4.
#[inline(always)]
fn bit<S: Simd, const TO: u32>(s: S, x: S::I, n: usize) -> S::I {
    let x = match n {
        0 => s.shl::<TO>(x),
        1 if TO == 2 => s.shl::<1>(x),
        1 => s.shl::<3>(x),
        2 if TO == 2 => x,
        2 => s.shl::<2>(x),
        3 if TO == 2 => s.shr::<1>(x),
        3 => s.shl::<1>(x),
        4 if TO == 2 => s.shr::<2>(x),
        4 => x,
        5 if TO == 2 => s.shr::<3>(x),
        5 => s.shr::<1>(x),
        6 if TO == 2 => s.shr::<4>(x),
        6 => s.shr::<2>(x),
        _ if TO == 2 => s.shr::<5>(x),
        _ => s.shr::<3>(x),
    };
    mask(s, x, 1 << TO)
}

/// The nibbles of 16 bytes per row: 32 codes, the low ones first.
///
/// # Safety
/// 16 bytes at `offset` of each row, and room in `slot`.
#[inline(always)]
unsafe fn nibbles<S: Simd>(s: S, rows: &Rows, offset: usize) -> [S::I; 8] {
    // SAFETY: the caller's promise.
    let x = unsafe { columns(s, rows, offset) };
    let mut out = [x[0]; 8];
    for i in 0..4 {
        out[i] = mask(s, x[i], 15);
        out[i + 4] = mask(s, s.shr::<4>(x[i]), 15);
    }
    out
}

/// # Safety
/// Room for 32 codes.
#[inline(always)]
unsafe fn put<S: Simd>(s: S, slot: Slot, codes: [S::I; 8]) {
    for (i, codes) in codes.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { slot.codes(s, i, codes) };
    }
}

impl PanelBlock for Q8_0 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(Q8_0, d)));
            for part in 0..2 {
                let x = columns(s, rows, offset_of!(Q8_0, qs) + 16 * part);
                for (i, x) in x.into_iter().enumerate() {
                    slot.codes(s, 4 * part + i, s.xor(x, s.splat_i(i32::from_ne_bytes([0x80; 4]))));
                }
            }
        }
    }
}

impl PanelBlock for Q4_0 {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(Q4_0, d)));
            put(s, slot, nibbles(s, rows, offset_of!(Q4_0, qs)));
        }
    }
}

impl PanelBlock for Q4_1 {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(Q4_1, d)));
            slot.min(s, 0, s.sub(s.splat(-0.0), half(s, rows, offset_of!(Q4_1, m))));
            put(s, slot, nibbles(s, rows, offset_of!(Q4_1, qs)));
        }
    }
}

/// Adds bit `k` of each row's word to code `k`, as its bit 4.
#[inline(always)]
fn add_fifth_bits<S: Simd>(s: S, qh: S::I, codes: &mut [S::I; 8]) {
    let mut qh = qh;
    for codes in codes {
        // Four bits to four bytes: the product shifts bit j by 7j + 4, and nothing overlaps.
        let four = s.and(qh, s.splat_i(15));
        let spread = s.mul_i(four, s.splat_i(0x0204_0810));
        *codes = s.or(*codes, mask(s, spread, 16));
        qh = s.shr::<4>(qh);
    }
}

impl PanelBlock for Q5_0 {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(Q5_0, d)));
            let mut codes = nibbles(s, rows, offset_of!(Q5_0, qs));
            add_fifth_bits(s, word(s, rows, offset_of!(Q5_0, qh)), &mut codes);
            put(s, slot, codes);
        }
    }
}

impl PanelBlock for Q5_1 {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(Q5_1, d)));
            slot.min(s, 0, s.sub(s.splat(-0.0), half(s, rows, offset_of!(Q5_1, m))));
            let mut codes = nibbles(s, rows, offset_of!(Q5_1, qs));
            add_fifth_bits(s, word(s, rows, offset_of!(Q5_1, qh)), &mut codes);
            put(s, slot, codes);
        }
    }
}

/// The table of the IQ4 formats as codes.
const IQ4_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = IQ4_VALUES[i] as u8 ^ 0x80;
        i += 1;
    }
    codes
};

impl PanelBlock for IQ4_NL {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            slot.scale(s, 0, half(s, rows, offset_of!(IQ4_NL, d)));
            let indices = nibbles(s, rows, offset_of!(IQ4_NL, qs));
            for (i, x) in indices.into_iter().enumerate() {
                slot.codes(s, i, s.lookup(&IQ4_CODES, x));
            }
        }
    }
}

impl PanelBlock for IQ4_XS {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            let d = half(s, rows, offset_of!(IQ4_XS, d));
            let high = s.gather_u16(rows, offset_of!(IQ4_XS, scales_h));
            let low = word(s, rows, offset_of!(IQ4_XS, scales_l));
            let (mut high, mut low) = (high, low);
            for g in 0..8 {
                let scale = s.or(s.and(low, s.splat_i(15)), s.shl::<4>(s.and(high, s.splat_i(3))));
                slot.scale(s, g, s.mul(d, s.to_f(s.sub_i(scale, s.splat_i(32)))));
                (high, low) = (s.shr::<2>(high), s.shr::<4>(low));
                let indices = nibbles(s, rows, offset_of!(IQ4_XS, qs) + 16 * g);
                for (i, x) in indices.into_iter().enumerate() {
                    slot.codes(s, 8 * g + i, s.lookup(&IQ4_CODES, x));
                }
            }
        }
    }
}

/// Scales and minima of Q4_K and Q5_K, whose first 16 bytes are d, dmin and twelve packed bytes.
///
/// # Safety
/// 16 bytes are readable in each row, and `slot` has room for 8 groups.
#[inline(always)]
unsafe fn k_scales<S: Simd>(s: S, rows: &Rows, slot: Slot) {
    // SAFETY: the caller's promise.
    let [d, p0, p1, p2] = unsafe { columns(s, rows, 0) };
    let (d, dmin) = (s.f16_low(d), s.f16_low(s.shr::<16>(d)));
    let top = [s.shl::<4>(pair(s, p0, 3)), s.shl::<4>(pair(s, p1, 3))];
    let scales = [mask(s, p0, 63), s.or(mask(s, p2, 15), top[0])];
    let mins = [mask(s, p1, 63), s.or(mask(s, s.shr::<4>(p2), 15), top[1])];
    for g in 0..8 {
        // SAFETY: 8 groups.
        unsafe {
            slot.scale(s, g, s.mul(d, s.to_f(byte(s, scales[g / 4], g % 4))));
            slot.min(s, g, s.mul(dmin, s.to_f(byte(s, mins[g / 4], g % 4))));
        }
    }
}

impl PanelBlock for Q4_K {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            k_scales(s, rows, slot);
            for i in 0..4 {
                for part in 0..2 {
                    let x = columns(s, rows, offset_of!(Q4_K, qs) + 32 * i + 16 * part);
                    for (j, x) in x.into_iter().enumerate() {
                        slot.codes(s, 16 * i + 4 * part + j, mask(s, x, 15));
                        slot.codes(s, 16 * i + 4 * part + j + 8, mask(s, s.shr::<4>(x), 15));
                    }
                }
            }
        }
    }
}

impl PanelBlock for Q5_K {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            k_scales(s, rows, slot);
            for part in 0..2 {
                let high = columns(s, rows, offset_of!(Q5_K, qh) + 16 * part);
                for i in 0..4 {
                    let x = columns(s, rows, offset_of!(Q5_K, qs) + 32 * i + 16 * part);
                    for (j, x) in x.into_iter().enumerate() {
                        let (even, odd) =
                            (bit::<S, 4>(s, high[j], 2 * i), bit::<S, 4>(s, high[j], 2 * i + 1));
                        slot.codes(s, 16 * i + 4 * part + j, s.or(mask(s, x, 15), even));
                        slot.codes(s, 16 * i + 4 * part + j + 8, s.or(mask(s, s.shr::<4>(x), 15), odd));
                    }
                }
            }
        }
    }
}

impl PanelBlock for Q6_K {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            let d = half(s, rows, offset_of!(Q6_K, d));
            let scales = columns(s, rows, offset_of!(Q6_K, scales));
            for g in 0..16 {
                slot.scale(s, g, s.mul(d, s.to_f(signed_byte(s, scales[g / 4], g % 4))));
            }
            for i in 0..4 {
                // 16 bytes of high bits serve groups h·8 + part + 2p, p < 4, of 16 weights.
                let (h, part) = (i / 2, i % 2);
                let high = columns(s, rows, offset_of!(Q6_K, qh) + 16 * i);
                for p in 0..2 {
                    let low = columns(s, rows, offset_of!(Q6_K, ql) + 64 * h + 32 * p + 16 * part);
                    for j in 0..4 {
                        let first = 4 * (8 * h + part + 2 * p) + j;
                        let top = s.shl::<4>(pair(s, high[j], p));
                        slot.codes(s, first, s.or(mask(s, low[j], 15), top));
                        let top = s.shl::<4>(pair(s, high[j], p + 2));
                        slot.codes(s, first + 16, s.or(mask(s, s.shr::<4>(low[j]), 15), top));
                    }
                }
            }
        }
    }
}

impl PanelBlock for Q2_K {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            let (d, dmin) = (half(s, rows, offset_of!(Q2_K, d)), half(s, rows, offset_of!(Q2_K, dmin)));
            let packed = columns(s, rows, offset_of!(Q2_K, scales));
            for g in 0..16 {
                let (scale, min) = (mask(s, packed[g / 4], 15), mask(s, s.shr::<4>(packed[g / 4]), 15));
                slot.scale(s, g, s.mul(d, s.to_f(byte(s, scale, g % 4))));
                slot.min(s, g, s.mul(dmin, s.to_f(byte(s, min, g % 4))));
            }
            for i in 0..4 {
                let (h, part) = (i / 2, i % 2);
                let x = columns(s, rows, offset_of!(Q2_K, qs) + 16 * i);
                for p in 0..4 {
                    for (j, x) in x.iter().enumerate() {
                        slot.codes(s, 4 * (8 * h + part + 2 * p) + j, pair(s, *x, p));
                    }
                }
            }
        }
    }
}

impl PanelBlock for Q3_K {
    #[inline(always)]
    unsafe fn unpack<S: Simd>(s: S, rows: &Rows, slot: Slot) {
        // SAFETY: offsets within the block, indices within its parts.
        unsafe {
            let d = half(s, rows, offset_of!(Q3_K, d));
            let at = offset_of!(Q3_K, scales);
            let low = [word(s, rows, at), word(s, rows, at + 4)];
            let top = word(s, rows, at + 8);
            for g in 0..16 {
                // Words of four scales: low nibbles from byte g % 8, top pairs from byte g % 4.
                let nibble = if g < 8 { low[g / 4] } else { s.shr::<4>(low[g / 4 - 2]) };
                let scale = s.or(mask(s, nibble, 15), s.shl::<4>(pair(s, top, g / 4)));
                let scale = s.sub_i(byte(s, scale, g % 4), s.splat_i(32));
                slot.scale(s, g, s.mul(d, s.to_f(scale)));
            }
            let high =
                [columns(s, rows, offset_of!(Q3_K, hmask)), columns(s, rows, offset_of!(Q3_K, hmask) + 16)];
            for i in 0..4 {
                let (h, part) = (i / 2, i % 2);
                let x = columns(s, rows, offset_of!(Q3_K, qs) + 16 * i);
                for p in 0..4 {
                    for (j, x) in x.iter().enumerate() {
                        let third = bit::<S, 2>(s, high[part][j], 4 * h + p);
                        slot.codes(s, 4 * (8 * h + part + 2 * p) + j, s.or(pair(s, *x, p), third));
                    }
                }
            }
        }
    }
}
