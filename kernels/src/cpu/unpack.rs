//! Every integer format, 16 rows at a time.
//!
//! A [`Source`] gives vectors that hold the same four bytes of all rows; shifts and masks then do for 16
//! rows what [`IntBlock::codes`](crate::quant::IntBlock::codes) does for one.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::mem::offset_of;

use super::lanes::{Lanes, unroll};
use super::panel::{PanelBlock, Sink};
use super::repack::Weave;
use super::source::Source;
use crate::quant::{IQ4_NL, IQ4_VALUES, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

/// A half-precision number of each row.
///
/// # Safety
/// Two bytes are readable there.
#[inline(always)]
unsafe fn half<S: Lanes>(s: S, from: &impl Source, offset: usize) -> S::F {
    // SAFETY: the caller's promise.
    s.f16_low(unsafe { from.halves(s, offset) })
}

/// A word of each row.
///
/// # Safety
/// Four bytes are readable there.
#[inline(always)]
unsafe fn word<S: Lanes>(s: S, from: &impl Source, offset: usize) -> S::I {
    // SAFETY: the caller's promise.
    let (low, high) = unsafe { (from.halves(s, offset), from.halves(s, offset + 2)) };
    s.or(low, s.shl::<16>(high))
}

#[inline(always)]
fn mask<S: Lanes>(s: S, x: S::I, byte: u8) -> S::I {
    s.and(x, s.splat_i(i32::from_ne_bytes([byte; 4])))
}

/// Byte `j` of each word, as a number.
#[inline(always)]
fn byte<S: Lanes>(s: S, x: S::I, j: usize) -> S::I {
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
fn signed_byte<S: Lanes>(s: S, x: S::I, j: usize) -> S::I {
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
fn pair<S: Lanes>(s: S, x: S::I, p: usize) -> S::I {
    let x = match p {
        0 => x,
        1 => s.shr::<2>(x),
        2 => s.shr::<4>(x),
        _ => s.shr::<6>(x),
    };
    mask(s, x, 3)
}

/// Bits 2p and 2p + 1 of every byte, moved to bits 4 and 5.
#[inline(always)]
fn top_bits<S: Lanes>(s: S, x: S::I, p: usize) -> S::I {
    let x = match p {
        0 => s.shl::<4>(x),
        1 => s.shl::<2>(x),
        2 => x,
        _ => s.shr::<2>(x),
    };
    mask(s, x, 0x30)
}

/// Bit `n` of every byte, moved to bit `TO`, which is 2 or 4.
#[inline(always)]
fn bit<S: Lanes, const TO: u32>(s: S, x: S::I, n: usize) -> S::I {
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

/// The low nibbles of all bytes, or the high ones.
#[inline(always)]
fn nibble<S: Lanes>(s: S, x: S::I, high: bool) -> S::I {
    mask(s, if high { s.shr::<4>(x) } else { x }, 15)
}

/// A group of 32 nibbles, the low ones first, but for its end.
#[inline(always)]
fn four_bits<S: Lanes>(s: S, x: [S::I; 4], sink: &mut impl Sink<S>) {
    unroll! { HALF in [0, 1] { unroll! { J in [0, 1, 2, 3] {
        sink.step::<8>(s, 0, 4 * HALF + J, nibble(s, x[J], HALF == 1));
    }}}}
}

impl Weave for Q8_0 {
    const HALVES: &[usize] = &[offset_of!(Q8_0, d)];
}

impl PanelBlock for Q8_0 {
    const MOST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        unroll! { PART in [0, 1] {
            // SAFETY: offsets within the block.
            let x = unsafe { from.columns(s, offset_of!(Q8_0, qs) + 16 * PART) };
            unroll! { J in [0, 1, 2, 3] {
                sink.step::<8>(s, 0, 4 * PART + J, s.xor(x[J], s.splat_i(i32::from_ne_bytes([0x80; 4]))));
            }}
        }}
        // SAFETY: as above.
        let d = unsafe { half(s, from, offset_of!(Q8_0, d)) };
        sink.end::<8>(s, 0, d, d);
        sink.advance::<8>(1);
    }
}

impl Weave for Q4_0 {
    const HALVES: &[usize] = &[offset_of!(Q4_0, d)];
}

impl PanelBlock for Q4_0 {
    const MOST: u8 = 15;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, x) = unsafe { (half(s, from, offset_of!(Q4_0, d)), from.columns(s, offset_of!(Q4_0, qs))) };
        four_bits(s, x, sink);
        sink.end::<8>(s, 0, d, d);
        sink.advance::<8>(1);
    }
}

impl PanelBlock for Q4_1 {
    const MOST: u8 = 15;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, m, x) = unsafe {
            let x = from.columns(s, offset_of!(Q4_1, qs));
            (half(s, from, offset_of!(Q4_1, d)), half(s, from, offset_of!(Q4_1, m)), x)
        };
        four_bits(s, x, sink);
        sink.end::<8>(s, 0, d, s.sub(s.splat(-0.0), m));
        sink.advance::<8>(1);
    }
}

/// Bits `N .. N + 4` of each row's word as bit 4 of its four bytes.
#[inline(always)]
fn fifth_bits<S: Lanes, const N: u32>(s: S, qh: S::I) -> S::I {
    // Four bits to four bytes: the product shifts bit j by 7j + 4, and nothing overlaps.
    let four = s.and(s.shr::<N>(qh), s.splat_i(15));
    mask(s, s.mul_i(four, s.splat_i(0x0204_0810)), 16)
}

/// The same with fifth bits.
#[inline(always)]
fn five_bits<S: Lanes>(s: S, x: [S::I; 4], qh: S::I, sink: &mut impl Sink<S>) {
    unroll! { HALF in [0, 1] { unroll! { J in [0, 1, 2, 3] {
        const STEP: usize = 4 * HALF + J;
        let fifth = fifth_bits::<S, { 4 * STEP as u32 }>(s, qh);
        sink.step::<8>(s, 0, STEP, s.or(nibble(s, x[J], HALF == 1), fifth));
    }}}}
}

impl PanelBlock for Q5_0 {
    const MOST: u8 = 31;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, qh, x) = unsafe {
            let x = from.columns(s, offset_of!(Q5_0, qs));
            (half(s, from, offset_of!(Q5_0, d)), word(s, from, offset_of!(Q5_0, qh)), x)
        };
        five_bits(s, x, qh, sink);
        sink.end::<8>(s, 0, d, d);
        sink.advance::<8>(1);
    }
}

impl PanelBlock for Q5_1 {
    const MOST: u8 = 31;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, m, qh, x) = unsafe {
            let (d, m) = (half(s, from, offset_of!(Q5_1, d)), half(s, from, offset_of!(Q5_1, m)));
            (d, m, word(s, from, offset_of!(Q5_1, qh)), from.columns(s, offset_of!(Q5_1, qs)))
        };
        five_bits(s, x, qh, sink);
        sink.end::<8>(s, 0, d, s.sub(s.splat(-0.0), m));
        sink.advance::<8>(1);
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

/// A group of 32 codes through [`IQ4_CODES`], but for its end.
///
/// # Safety
/// 16 bytes are readable at `offset` of each row.
#[inline(always)]
unsafe fn looked_up<S: Lanes>(s: S, from: &impl Source, offset: usize, sink: &mut impl Sink<S>) {
    // SAFETY: the caller's promise.
    let x = unsafe { from.columns(s, offset) };
    unroll! { HALF in [0, 1] { unroll! { J in [0, 1, 2, 3] {
        sink.step::<8>(s, 0, 4 * HALF + J, s.lookup(&IQ4_CODES, nibble(s, x[J], HALF == 1)));
    }}}}
}

impl PanelBlock for IQ4_NL {
    const MOST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let d = unsafe {
            looked_up(s, from, offset_of!(IQ4_NL, qs), sink);
            half(s, from, offset_of!(IQ4_NL, d))
        };
        sink.end::<8>(s, 0, d, d);
        sink.advance::<8>(1);
    }
}

impl PanelBlock for IQ4_XS {
    const MOST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, mut high, mut low) = unsafe {
            let high = from.halves(s, offset_of!(IQ4_XS, scales_h));
            (half(s, from, offset_of!(IQ4_XS, d)), high, word(s, from, offset_of!(IQ4_XS, scales_l)))
        };
        for g in 0..8 {
            let scale = s.or(s.and(low, s.splat_i(15)), s.shl::<4>(s.and(high, s.splat_i(3))));
            let scale = s.mul(d, s.to_f(s.sub_i(scale, s.splat_i(32))));
            (high, low) = (s.shr::<2>(high), s.shr::<4>(low));
            // SAFETY: offsets within the block.
            unsafe { looked_up(s, from, offset_of!(IQ4_XS, qs) + 16 * g, sink) };
            sink.end::<8>(s, 0, scale, scale);
            sink.advance::<8>(1);
        }
    }
}

/// Scales and minima of Q4_K and Q5_K, packed, four groups in a word.
struct KScales<S: Lanes> {
    d: S::F,
    dmin: S::F,
    scales: [S::I; 2],
    mins: [S::I; 2],
}

impl<S: Lanes> KScales<S> {
    /// From the first 16 bytes of the blocks: d, dmin and twelve packed bytes.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn new(s: S, from: &impl Source) -> Self {
        // SAFETY: the caller's promise.
        let [d, p0, p1, p2] = unsafe { from.columns(s, 0) };
        let top = [s.shl::<4>(pair(s, p0, 3)), s.shl::<4>(pair(s, p1, 3))];
        KScales {
            d: s.f16_low(d),
            dmin: s.f16_low(s.shr::<16>(d)),
            scales: [mask(s, p0, 63), s.or(mask(s, p2, 15), top[0])],
            mins: [mask(s, p1, 63), s.or(mask(s, s.shr::<4>(p2), 15), top[1])],
        }
    }

    /// Of group `4 h + g`.
    #[inline(always)]
    fn scale(&self, s: S, h: usize, g: usize) -> S::F {
        let word = if h == 0 { self.scales[0] } else { self.scales[1] };
        s.mul(self.d, s.to_f(byte(s, word, g)))
    }

    /// Of group `4 h + g`.
    #[inline(always)]
    fn min(&self, s: S, h: usize, g: usize) -> S::F {
        let word = if h == 0 { self.mins[0] } else { self.mins[1] };
        s.mul(self.dmin, s.to_f(byte(s, word, g)))
    }
}

/// Bytes `offset .. offset + 16 · N` of each row. They are taken once where that means to transpose, and anew at each
/// use where it is only a load: registers are few.
struct Columns<'a, S: Lanes, R, const N: usize> {
    from: &'a R,
    offset: usize,
    held: [[S::I; 4]; N],
}

impl<'a, S: Lanes, R: Source, const N: usize> Columns<'a, S, R, N> {
    /// # Safety
    /// They are readable as long as this is used.
    #[inline(always)]
    unsafe fn new(s: S, from: &'a R, offset: usize) -> Self {
        let mut held = [[s.splat_i(0); 4]; N];
        if !R::READY {
            for (i, held) in held.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *held = unsafe { from.columns(s, offset + 16 * i) };
            }
        }
        Columns { from, offset, held }
    }

    /// Bytes 16 i .. 16 (i + 1).
    #[inline(always)]
    fn get(&self, s: S, i: usize) -> [S::I; 4] {
        // SAFETY: promised to `new`.
        if R::READY { unsafe { self.from.columns(s, self.offset + 16 * i) } } else { self.held[i] }
    }
}

impl Weave for Q4_K {
    const HALVES: &[usize] = &[];
}

impl PanelBlock for Q4_K {
    const MOST: u8 = 15;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: the scales come first in the block.
        let scales = unsafe { KScales::new(s, from) };
        for h in 0..2 {
            unroll! { I in [0, 1] {
                // SAFETY: offsets within the block.
                let x: Columns<'_, S, _, 2> =
                    unsafe { Columns::new(s, from, offset_of!(Q4_K, qs) + 64 * h + 32 * I) };
                unroll! { HALF in [0, 1] {
                    const G: usize = 2 * I + HALF;
                    unroll! { PART in [0, 1] {
                        let x = x.get(s, PART);
                        unroll! { J in [0, 1, 2, 3] {
                            sink.step::<8>(s, G, 4 * PART + J, nibble(s, x[J], HALF == 1));
                        }}
                    }}
                    sink.end::<8>(s, G, scales.scale(s, h, G), scales.min(s, h, G));
                }}
            }}
            sink.advance::<8>(4);
        }
    }
}

impl Weave for Q5_K {
    const HALVES: &[usize] = &[];
}

impl PanelBlock for Q5_K {
    const MOST: u8 = 31;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: the scales come first in the block; offsets within it.
        let (scales, fifth) = unsafe {
            let fifth: Columns<'_, S, _, 2> = Columns::new(s, from, offset_of!(Q5_K, qh));
            (KScales::new(s, from), fifth)
        };
        unroll! { H in [0, 1] {
            unroll! { I in [0, 1] {
                // SAFETY: offsets within the block.
                let x: Columns<'_, S, _, 2> =
                    unsafe { Columns::new(s, from, offset_of!(Q5_K, qs) + 64 * H + 32 * I) };
                unroll! { HALF in [0, 1] {
                    const G: usize = 2 * I + HALF;
                    unroll! { PART in [0, 1] {
                        let (x, fifth) = (x.get(s, PART), fifth.get(s, PART));
                        unroll! { J in [0, 1, 2, 3] {
                            let fifth = bit::<S, 4>(s, fifth[J], 4 * H + G);
                            sink.step::<8>(s, G, 4 * PART + J, s.or(nibble(s, x[J], HALF == 1), fifth));
                        }}
                    }}
                    sink.end::<8>(s, G, scales.scale(s, H, G), scales.min(s, H, G));
                }}
            }}
            sink.advance::<8>(4);
        }}
    }
}

impl Weave for Q6_K {
    const HALVES: &[usize] = &[offset_of!(Q6_K, d)];
}

impl PanelBlock for Q6_K {
    const MOST: u8 = 63;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, scales) =
            unsafe { (half(s, from, offset_of!(Q6_K, d)), from.columns(s, offset_of!(Q6_K, scales))) };
        for h in 0..2 {
            let scales = if h == 0 { [scales[0], scales[1]] } else { [scales[2], scales[3]] };
            macro_rules! end {
                ($g:expr) => {{
                    let scale = s.mul(d, s.to_f(signed_byte(s, scales[$g / 4], $g % 4)));
                    sink.end::<4>(s, $g, scale, scale);
                }};
            }
            let (ql, qh) = (offset_of!(Q6_K, ql) + 64 * h, offset_of!(Q6_K, qh) + 32 * h);
            if S::FEW_REGISTERS {
                // Sixteen bytes of either kind at a time.
                unroll! { PART in [0, 1] {
                    // SAFETY: offsets within the block.
                    let top = unsafe { from.columns(s, qh + 16 * PART) };
                    unroll! { LOW in [0, 1] {
                        // SAFETY: offsets within the block.
                        let low = unsafe { from.columns(s, ql + 32 * LOW + 16 * PART) };
                        unroll! { J in [0, 1, 2, 3] { unroll! { HIGH in [0, 1] {
                            const P: usize = 2 * HIGH + LOW;
                            let codes = s.or(nibble(s, low[J], HIGH == 1), top_bits(s, top[J], P));
                            sink.step::<4>(s, 2 * P + PART, J, codes);
                        }}}}
                    }}
                }}
                unroll! { G in [0, 1, 2, 3, 4, 5, 6, 7] { end!(G); }}
            } else {
                // SAFETY: offsets within the block.
                let (low, top) = unsafe {
                    let low: Columns<'_, S, _, 4> = Columns::new(s, from, ql);
                    let top: Columns<'_, S, _, 2> = Columns::new(s, from, qh);
                    (low, top)
                };
                unroll! { P in [0, 1, 2, 3] { unroll! { PART in [0, 1] {
                    let (low, top) = (low.get(s, P % 2 * 2 + PART), top.get(s, PART));
                    unroll! { J in [0, 1, 2, 3] {
                        let codes = s.or(nibble(s, low[J], P / 2 == 1), top_bits(s, top[J], P));
                        sink.step::<4>(s, 2 * P + PART, J, codes);
                    }}
                    end!(2 * P + PART);
                }}}}
            }
            sink.advance::<4>(8);
        }
    }
}

impl PanelBlock for Q2_K {
    const MOST: u8 = 3;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, dmin, packed) = unsafe {
            let packed = from.columns(s, offset_of!(Q2_K, scales));
            (half(s, from, offset_of!(Q2_K, d)), half(s, from, offset_of!(Q2_K, dmin)), packed)
        };
        for h in 0..2 {
            // SAFETY: offsets within the block.
            let x: Columns<'_, S, _, 2> = unsafe { Columns::new(s, from, offset_of!(Q2_K, qs) + 32 * h) };
            let packed = if h == 0 { [packed[0], packed[1]] } else { [packed[2], packed[3]] };
            unroll! { P in [0, 1, 2, 3] {
                unroll! { PART in [0, 1] {
                    const G: usize = 2 * P + PART;
                    let x = x.get(s, PART);
                    unroll! { J in [0, 1, 2, 3] {
                        sink.step::<4>(s, G, J, pair(s, x[J], P));
                    }}
                    let packed = byte(s, packed[G / 4], G % 4);
                    let scale = s.mul(d, s.to_f(s.and(packed, s.splat_i(15))));
                    sink.end::<4>(s, G, scale, s.mul(dmin, s.to_f(s.shr::<4>(packed))));
                }}
            }}
            sink.advance::<4>(8);
        }
    }
}

impl PanelBlock for Q3_K {
    const MOST: u8 = 7;

    #[inline(always)]
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>) {
        // SAFETY: offsets within the block.
        let (d, low, top, third) = unsafe {
            let at = offset_of!(Q3_K, scales);
            let low = [word(s, from, at), word(s, from, at + 4)];
            let third: Columns<'_, S, _, 2> = Columns::new(s, from, offset_of!(Q3_K, hmask));
            (half(s, from, offset_of!(Q3_K, d)), low, word(s, from, at + 8), third)
        };
        unroll! { H in [0, 1] {
            // SAFETY: offsets within the block.
            let x: Columns<'_, S, _, 2> = unsafe { Columns::new(s, from, offset_of!(Q3_K, qs) + 32 * H) };
            unroll! { P in [0, 1, 2, 3] {
                unroll! { PART in [0, 1] {
                    const G: usize = 8 * H + 2 * P + PART;
                    let (x, third) = (x.get(s, PART), third.get(s, PART));
                    unroll! { J in [0, 1, 2, 3] {
                        sink.step::<4>(s, G % 8, J, s.or(pair(s, x[J], P), bit::<S, 2>(s, third[J], 4 * H + P)));
                    }}
                    // Words of four scales: low nibbles from byte G % 8, top pairs from byte G % 4.
                    let low = low[G / 4 % 2];
                    let nibble = if G < 8 { low } else { s.shr::<4>(low) };
                    let scale = s.or(mask(s, nibble, 15), s.shl::<4>(pair(s, top, G / 4)));
                    let scale = s.sub_i(byte(s, scale, G % 4), s.splat_i(32));
                    sink.end::<4>(s, G % 8, s.mul(d, s.to_f(scale)), d);
                }}
            }}
            sink.advance::<4>(8);
        }}
    }
}
