//! Random blocks of every format: random quants, scales chosen for a wanted deviation.
//!
//! For each format the deviation of `x / d` under uniformly random quants follows from its
//! formula; `d` is the wanted deviation divided by it. Formats with a minimum get the one that
//! centres them; those without a centre (Q4_0's values run from -8 to 7) get scales of random sign.
//! Layouts: `ggml-common.h`.

use std::io;

use half::f16;
use lory_kernels::QuantType;

use super::rng::Rng;

/// Root mean square of `q - 7.5` for q in 0..16, and of `q - 15.5` for q in 0..32.
const RMS_4_BIT: f32 = 4.609_772;
const RMS_5_BIT: f32 = 9.233_093;
/// Root mean square of `q - 32` for q in 0..64, and of `q` for q in -127..=127.
const RMS_6_BIT: f32 = 18.481_072;
const RMS_8_BIT: f32 = 73.611_594;
/// Root mean square of a 6-bit scale in 0..64.
const RMS_SCALE_6_BIT: f32 = 36.517_12;
/// Root mean square of IQ4_NL's sixteen values.
const RMS_IQ4: f32 = 67.438;

/// Fills `out`, whole blocks of `ty`, with weights of mean 0 and deviation `sigma`.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] for formats that no file type of this module uses.
pub(super) fn fill(ty: QuantType, sigma: f32, rng: &mut Rng, out: &mut [u8]) -> io::Result<()> {
    use QuantType as T;
    // Uniform in ±sqrt(3) sigma has deviation sigma.
    let width = 3f32.sqrt() * sigma;
    match ty {
        T::F32 => each::<4>(out, |b| *b = (width * rng.signed()).to_le_bytes()),
        T::F16 => each::<2>(out, |b| *b = f16::from_f32(width * rng.signed()).to_le_bytes()),
        T::BF16 => each::<2>(out, |b| *b = half::bf16::from_f32(width * rng.signed()).to_le_bytes()),
        T::Q4_0 => each::<18>(out, |b| {
            rng.fill(b);
            put_signed(b, 0, sigma / (RMS_4_BIT + 0.027));
        }),
        T::Q4_1 => each::<20>(out, |b| {
            rng.fill(b);
            put(b, 0, sigma / RMS_4_BIT);
            put(b, 2, -7.5 * sigma / RMS_4_BIT);
        }),
        T::Q5_0 => each::<22>(out, |b| {
            rng.fill(b);
            put_signed(b, 0, sigma / (RMS_5_BIT + 0.014));
        }),
        T::Q5_1 => each::<24>(out, |b| {
            rng.fill(b);
            put(b, 0, sigma / RMS_5_BIT);
            put(b, 2, -15.5 * sigma / RMS_5_BIT);
        }),
        T::Q8_0 => each::<34>(out, |b| {
            rng.fill(b);
            // -128 is no quantizer's output, and kernels may rely on that.
            b.iter_mut().for_each(|q| *q = if *q == 0x80 { 0 } else { *q });
            put(b, 0, sigma / RMS_8_BIT);
        }),
        // x = d sc q - dmin m with m = sc and dmin = 1.5 d: d sc (q - 1.5), sc in 1..16.
        T::Q2_K => each::<84>(out, |b| {
            rng.fill(b);
            b[..16].iter_mut().for_each(|s| *s = (*s % 15 + 1) * 0x11);
            let d = sigma / (9.092 * 1.118);
            put(b, 80, d);
            put(b, 82, 1.5 * d);
        }),
        // x = d (sc - 32) (q - 4), both factors over their whole range.
        T::Q3_K => each::<110>(out, |b| {
            rng.fill(b);
            put(b, 108, sigma / (RMS_6_BIT * 2.345_208));
        }),
        T::Q4_K => each::<144>(out, |b| {
            rng.fill(b);
            scales_equal_mins(b, 7.5, sigma / (RMS_SCALE_6_BIT * RMS_4_BIT));
        }),
        T::Q5_K => each::<176>(out, |b| {
            rng.fill(b);
            scales_equal_mins(b, 15.5, sigma / (RMS_SCALE_6_BIT * RMS_5_BIT));
        }),
        T::Q6_K => each::<210>(out, |b| {
            rng.fill(b);
            put(b, 208, sigma / (RMS_8_BIT * RMS_6_BIT));
        }),
        T::IQ4_NL => each::<18>(out, |b| {
            rng.fill(b);
            put_signed(b, 0, sigma / RMS_IQ4);
        }),
        T::IQ4_XS => each::<136>(out, |b| {
            rng.fill(b);
            put(b, 0, sigma / (RMS_6_BIT * RMS_IQ4));
        }),
        other => {
            let m = format!("random blocks of {other} are not implemented");
            return Err(io::Error::new(io::ErrorKind::Unsupported, m));
        }
    }
    Ok(())
}

fn each<const N: usize>(out: &mut [u8], make: impl FnMut(&mut [u8; N])) {
    out.as_chunks_mut::<N>().0.iter_mut().for_each(make);
}

fn put<const N: usize>(block: &mut [u8; N], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// As [`put`], with a sign taken from the random bits that stand there.
fn put_signed<const N: usize>(block: &mut [u8; N], at: usize, value: f32) {
    put(block, at, if block[at] & 1 == 0 { value } else { -value });
}

/// Makes Q4_K's and Q5_K's eight packed minima equal to the packed scales, so that
/// x = d sc q - dmin m becomes d sc (q - centre).
fn scales_equal_mins<const N: usize>(block: &mut [u8; N], centre: f32, d: f32) {
    put(block, 0, d);
    put(block, 2, centre * d);
    for j in 4..8 {
        block[j + 4] = block[j];
        block[j + 8] = (block[j + 8] & 0xf) * 0x11;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_the_root_mean_squares_they_claim() {
        let rms = |v: Vec<f64>| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt() as f32;
        let near = |a: f32, b: f32| assert!((a / b - 1.0).abs() < 1e-3, "{a} {b}");
        near(rms((0..16).map(|q| f64::from(q) - 7.5).collect()), RMS_4_BIT);
        near(rms((0..32).map(|q| f64::from(q) - 15.5).collect()), RMS_5_BIT);
        near(rms((0..64).map(|q| f64::from(q) - 32.0).collect()), RMS_6_BIT);
        near(rms((-127..128).map(f64::from).collect()), RMS_8_BIT);
        near(rms((0..64).map(f64::from).collect()), RMS_SCALE_6_BIT);
    }
}
