//! Vectors as arrays, which the compiler maps to what the target has.

use super::lanes::{Lanes, Rows};
use super::simd::{Op, Simd};
use crate::ops::sum;

/// The level that every machine has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Runs `op` with what the compiler's target has anyway.
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    op.run(Portable)
}

#[inline(always)]
fn map(a: [f32; 16], f: impl Fn(f32) -> f32) -> [f32; 16] {
    let mut out = a;
    for x in &mut out {
        *x = f(*x);
    }
    out
}

#[inline(always)]
fn zip<T: Copy>(a: [T; 16], b: [T; 16], f: impl Fn(T, T) -> T) -> [T; 16] {
    let mut out = a;
    for (x, y) in out.iter_mut().zip(b) {
        *x = f(*x, y);
    }
    out
}

impl Lanes for Portable {
    type F = [f32; 16];
    type I = [u32; 16];
    const PAIRS: bool = false;
    const FEW_REGISTERS: bool = false;
    const NEIGHBOURS: bool = false;
    const DIRECT_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[[u8; 2]; 16]) -> [f32; 16] {
        x.map(|b| half::f16::from_le_bytes(b).to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> [f32; 16] {
        x.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
    }
    #[inline(always)]
    fn store(self, x: [f32; 16], out: &mut [f32; 16]) {
        *out = x;
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        let mut out = c;
        for (l, c) in out.iter_mut().enumerate() {
            *c = a[l].mul_add(b[l], *c);
        }
        out
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> [u32; 16] {
        let mut out = [0; 16];
        for (word, bytes) in out.iter_mut().zip(x.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        out
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> [u32; 16] {
        [x as u32; 16]
    }
    #[inline(always)]
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> [u32; 16] {
        let mut out = [0; 16];
        for (i, word) in out.iter_mut().enumerate() {
            // SAFETY: the caller promises two readable bytes in every row.
            *word = u32::from(u16::from_le_bytes(unsafe { rows.at(i, offset).cast::<[u8; 2]>().read() }));
        }
        out
    }
    #[inline(always)]
    fn load_u16(self, x: &[u8; 32]) -> [u32; 16] {
        let mut out = [0; 16];
        for (out, x) in out.iter_mut().zip(x.as_chunks::<2>().0) {
            *out = u32::from(u16::from_le_bytes(*x));
        }
        out
    }
    #[inline(always)]
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> [u32; 16] {
        let mut bytes = [0; 64];
        for (lane, row) in bytes.as_chunks_mut::<16>().0.iter_mut().zip(rows) {
            // SAFETY: the caller promises 16 readable bytes.
            *lane = unsafe { row.cast::<[u8; 16]>().read() };
        }
        self.load_i(&bytes)
    }
    #[inline(always)]
    fn transpose4(self, x: [[u32; 16]; 4]) -> [[u32; 16]; 4] {
        let mut out = x;
        for (i, out) in out.iter_mut().enumerate() {
            for lane in 0..4 {
                for j in 0..4 {
                    out[lane * 4 + j] = x[j][lane * 4 + i];
                }
            }
        }
        out
    }
    #[inline(always)]
    fn and(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, x: [u32; 16]) -> [u32; 16] {
        x.map(|x| x << N)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, x: [u32; 16]) -> [u32; 16] {
        x.map(|x| x >> N)
    }
    #[inline(always)]
    fn sra<const N: u32>(self, x: [u32; 16]) -> [u32; 16] {
        x.map(|x| (x as i32 >> N) as u32)
    }
    #[inline(always)]
    fn add_i(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub_i(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn mul_i(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, u32::wrapping_mul)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], bytes: [u32; 16]) -> [u32; 16] {
        bytes.map(|word| u32::from_le_bytes(word.to_le_bytes().map(|b| table[usize::from(b & 15)])))
    }
    #[inline(always)]
    fn to_f(self, x: [u32; 16]) -> [f32; 16] {
        x.map(|x| x as i32 as f32)
    }
    #[inline(always)]
    fn f16_low(self, x: [u32; 16]) -> [f32; 16] {
        x.map(|x| half::f16::from_bits(x as u16).to_f32())
    }
    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: [u32; 16], codes: [u32; 16], q: &[i8; 4]) -> [u32; 16] {
        let mut out = acc;
        for (acc, word) in out.iter_mut().zip(codes) {
            let mut sum = *acc as i32;
            for (code, q) in word.to_le_bytes().into_iter().zip(q) {
                sum += i32::from(code) * i32::from(*q);
            }
            *acc = sum as u32;
        }
        out
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
    #[inline(always)]
    fn prefetch_near(self, _address: *const u8) {}
    #[inline(always)]
    fn prefetch_early(self, _address: *const u8) {}
}

impl Simd for Portable {
    type Low = Self;
    type High = Self;
    type Two = [f32; 2];

    const TILE_ROWS: usize = 2;
    const TILE_PANELS: usize = 1;
    const DIRECT_TILES: usize = 1;
    const DIRECT_ROWS_NEAR: usize = 2;
    const FLOAT_ROWS: usize = 1;
    #[inline(always)]
    fn store_f16(self, x: [f32; 16], out: &mut [[u8; 2]; 16]) {
        *out = x.map(|v| half::f16::from_f32(v).to_le_bytes());
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> [f32; 16] {
        x.map(f32::from)
    }
    #[inline(always)]
    fn store_i8(self, x: [f32; 16], out: &mut [i8; 16]) {
        *out = x.map(|v| v.round_ties_even() as i8);
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_gt(self, a: [f32; 16], b: [f32; 16], x: [f32; 16], y: [f32; 16]) -> [f32; 16] {
        let mut out = y;
        for (l, y) in out.iter_mut().enumerate() {
            *y = if a[l] > b[l] { x[l] } else { *y };
        }
        out
    }
    #[inline(always)]
    fn round(self, x: [f32; 16]) -> [f32; 16] {
        map(x, f32::round_ties_even)
    }
    #[inline(always)]
    fn exp2(self, n: [f32; 16]) -> [f32; 16] {
        map(n, |n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn fold(self, x: [f32; 16]) -> f32 {
        sum::fold(x)
    }
    #[inline(always)]
    fn fold2(self, a: [f32; 16], b: [f32; 16]) -> [f32; 2] {
        [sum::fold(a), sum::fold(b)]
    }
    #[inline(always)]
    fn fold16(self, x: [[f32; 2]; 8]) -> [f32; 16] {
        let mut sums = [0.0; 16];
        sums.copy_from_slice(x.as_flattened());
        sums
    }
    #[inline(always)]
    fn largest(self, x: [f32; 16]) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, |m, v| if v > m { v } else { m })
    }
    #[inline(always)]
    fn store_i(self, x: [u32; 16], out: &mut [u8; 64]) {
        for (word, bytes) in x.into_iter().zip(out.as_chunks_mut::<4>().0) {
            *bytes = word.to_le_bytes();
        }
    }
    #[inline(always)]
    fn bits(self, x: [f32; 16]) -> [u32; 16] {
        x.map(f32::to_bits)
    }
    #[inline(always)]
    fn max_i(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        zip(a, b, |a, b| (a as i32).max(b as i32) as u32)
    }
    #[inline(always)]
    fn largest_i(self, x: [u32; 16]) -> i32 {
        x.into_iter().fold(i32::MIN, |m, v| m.max(v as i32))
    }
    #[inline(always)]
    fn scale_nibbles(self, d: [f32; 16], codes: &[u8; 16]) -> [[f32; 16]; 2] {
        let scaled = |code: u8| d[0] * (f32::from(code) - 8.0);
        [codes.map(|byte| scaled(byte & 15)), codes.map(|byte| scaled(byte >> 4))]
    }

    #[inline(always)]
    fn halves(self) -> (Self, Self) {
        (self, self)
    }
}
